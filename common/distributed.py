"""Process groups and devices. Every function works under torchrun on many nodes, in one process, and without a process
group."""
import contextlib
import datetime
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import follow

Item = TypeVar("Item")


def setup(device: str = "auto", timeout_minutes: int = 30, group: bool = False) -> torch.device:
    """Join torchrun's process group where there is one, and return this process's device.

    device: auto (cuda where there is one), cpu or cuda. Collectives use gloo for CPU tensors and NCCL for CUDA tensors.
    group: without torchrun, create a process group of one process.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}; lower --nproc_per_node"
            )
        # By the local rank: the global rank would be right on the first node only.
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    launched = "RANK" in os.environ
    follow()
    if (launched or group) and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        alone: dict[str, Any] = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes), **alone)
    return torch.device(device)


def teardown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def of_rank(items: Sequence[Item]) -> list[Item]:
    """This process's share of `items`: every world_size-th, from its rank on."""
    return list(items[rank() :: world_size()])


def barrier() -> None:
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # a CPU tensor, so gloo: dist.barrier would choose a GPU by itself


def wait_until(done: Callable[[], bool]) -> None:
    """Poll `done` instead of a barrier: filling a cache can outlast the process group's timeout, and files on a network
    disk appear on other nodes with a delay."""
    while not done():
        time.sleep(1)


def all_sum(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all processes, in a new tensor."""
    tensor = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_mean(tensor: Tensor) -> Tensor:
    """Mean of `tensor` over all processes, for use in a loss. Its gradient is the gradient of this process's `tensor`;
    DDP's mean over processes turns that into the gradient of the mean."""
    return all_sum(tensor) / world_size() + (tensor - tensor.detach())


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is true on any process. It reduces a CPU tensor, so it never waits for a GPU."""
    return [bool(count) for count in all_sum(torch.tensor(flags, dtype=torch.float32)).tolist()]


def gather(value) -> list:
    """[value of rank 0, value of rank 1, ...] on every process; values are pickled."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value):
    """Rank 0's value on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def wrap(model: nn.Module, device: torch.device, static_graph: bool) -> nn.Module:
    """`model` in DDP where there is more than one process. Gradient buckets are all-reduced while the backward pass
    runs. Gradients are views into the buckets. Buffers are not broadcast: none is trained. A bucket holds the largest
    block (79 MB of LARP-AR-LP): at DDP's default of 25 MB each compiled block would be cut at the buckets' borders.

    static_graph: set it only where every backward pass gives gradients to the same parameters and is followed by an
    all-reduce: DDP cannot combine it with `sync_gradients`.
    """
    if world_size() == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():  # new versions of torch rename broadcast_buffers; the old name works in all
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, bucket_cap_mb=100,
                                       broadcast_buffers=False, static_graph=static_graph)


def sync_gradients(model: nn.Module, sync: bool):
    """Context in which DDP averages gradients only if `sync` is true: once a step, not once a micro-batch."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not sync else contextlib.nullcontext()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`, without waiting for the copy to end."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def prefetch(batches: Iterator, device: torch.device) -> Iterator:
    """On a GPU, read the next batch on a background thread while the current one is in use. On a CPU, only iterate."""
    if device.type != "cuda":
        yield from batches
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, batches, None)
        while (batch := ahead.result()) is not None:
            ahead = pool.submit(next, batches, None)
            yield batch


@contextlib.contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, `model` is on `device`; afterwards it is back where it was. A frozen tokenizer thus takes
    GPU memory only while it is in use."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
