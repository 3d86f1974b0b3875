"""Processes and devices: right with torchrun on many nodes, with one process, and with no process group at all."""
import contextlib
import datetime
import os
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import follow


def setup(device: str = "auto", timeout_minutes: int = 30, group: bool = False) -> torch.device:
    """Join torchrun's process group where there is one, and return this process's device.

    device: auto (cuda where there is one), cpu or cuda. CPU tensors travel by gloo, CUDA tensors by NCCL.
    group: without torchrun, have a process group of one.
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
        # The local rank chooses the device; the global rank does so on the first node only.
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    launched = "RANK" in os.environ
    follow()
    if (launched or group) and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        alone = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
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


def wait_until(done: Callable[[], bool]) -> None:
    """Look again until `done`. Processes that work for hours on unequal shares outlast the process group's timeout, and
    what one has written to a network's disk others see later."""
    while not done():
        time.sleep(1)


def barrier() -> None:
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # by gloo: dist.barrier would take a GPU of its own choosing


def all_sum(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all processes, in a new tensor."""
    tensor = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_mean(tensor: Tensor) -> Tensor:
    """Mean of `tensor` over all processes, to be used in a loss. Its gradient is that of this process's share, which
    DDP's mean over processes makes whole."""
    return all_sum(tensor) / world_size() + (tensor - tensor.detach())


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any process. Between hosts only: it never waits for a GPU."""
    return bool(all_sum(torch.tensor([float(flag)])).item()) if dist.is_initialized() else flag


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
    """`model` in DDP where there is more than one process. Gradients travel in buckets while others are computed, and
    are views of them, not copies; buffers do not travel, as none is trained.

    static_graph: whether the same parameters get gradients in every backward pass, and each is followed by an exchange:
    DDP does not combine it with `sync_gradients`.
    """
    if world_size() == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():  # the newest torch names broadcast_buffers differently, and the oldest must do
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True,
                                       broadcast_buffers=False, static_graph=static_graph)


def sync_gradients(model: nn.Module, sync: bool):
    """Context in which DDP averages gradients only where `sync` is true: once a step, not once a micro-batch."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not sync else contextlib.nullcontext()
