"""Batches of clips: the sampler that decides which process takes which samples, the loader and its workers.

Everything random is a pure function of (seed, position), where position is the number of a sample in the run. So a
clip does not depend on the number of workers, processes or accumulation steps, and a resumed run sees the same clips.
"""
import atexit
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, get_worker_info

from common.rng import Stream, generator
from data.clips import ClipDataset, ClipKey
from data.shared_memory import Packed, ship


def collate(samples: list[dict]) -> dict | Packed:
    """A batch: frames (B, T, h, w, 3), or a list of clips where sizes differ; n_frames, label, position (B,) long;
    path, start lists; index (B, N, 3) long where patches are drawn; skipped: (path, reason) of each sample left out."""
    good = [sample for sample in samples if "error" not in sample]
    frames = [sample["frames"] for sample in good]
    batch: dict[str, Any] = {name: torch.tensor([sample[name] for sample in good], dtype=torch.long)
                             for name in ("n_frames", "label", "position")}
    batch |= {name: [sample[name] for sample in good] for name in ("path", "start")}
    if good and "index" in good[0]:
        batch["index"] = torch.stack([sample["index"] for sample in good])
    batch["skipped"] = [(sample["path"], sample["error"]) for sample in samples if "error" in sample]
    return deliver(batch, frames, alike=len({clip.shape for clip in frames}) == 1)


def deliver(batch: dict, frames: list[torch.Tensor], alike: bool) -> dict | Packed:
    """The batch with its frames, stacked if they are `alike` in shape. A worker sends them through shared memory."""
    if get_worker_info() and hasattr(os, "memfd_create"):  # on Linux
        return ship(batch, frames, alike)
    return {**batch, "frames": torch.stack(frames) if alike else frames}


def check_shares(global_batch: int, world_size: int, accum: int) -> None:
    """ValueError where a global batch cannot be split equally over processes and accumulation steps."""
    if global_batch < 1 or global_batch % (world_size * accum):
        raise ValueError(f"a global batch of {global_batch} cannot be shared by {world_size} processes x {accum} "
                         f"accumulation steps: give a multiple of {world_size * accum}")


class GlobalBatchSampler(Sampler):
    """The keys of one process's micro-batches, step by step. The global batch does not depend on the number of
    processes.

    Sample `slot` of step `step` has position step * global_batch + slot. The slots are split into W equal runs, one for
    each rank, and those into `accum` micro-batches. order "replacement": each sample draws its video. "epoch": each
    epoch is a permutation of the videos, whose last partial batch is dropped.
    """

    def __init__(self, num_files: int, global_batch: int, num_steps: int, rank: int = 0, world_size: int = 1,
                 accum: int = 1, seed: int = 0, start_step: int = 0, order: str = "replacement"):
        check_shares(global_batch, world_size, accum)
        if order not in ("replacement", "epoch"):
            raise ValueError(f"order={order!r} is neither 'replacement' nor 'epoch'")
        if order == "epoch" and num_files < global_batch:
            raise ValueError(f"{num_files} videos do not fill one batch of {global_batch}: lower the batch size")
        self.num_files, self.global_batch, self.num_steps = num_files, global_batch, num_steps
        self.rank, self.world_size, self.accum = rank, world_size, accum
        self.seed, self.start_step, self.order = seed, start_step, order

    @property
    def steps_per_epoch(self) -> int:
        return self.num_files // self.global_batch

    def __len__(self) -> int:
        return (self.num_steps - self.start_step) * self.accum

    def __iter__(self) -> Iterator[list[ClipKey]]:
        micro = self.global_batch // self.world_size // self.accum
        epoch = None
        for step in range(self.start_step, self.num_steps):
            if self.order == "epoch" and step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                permutation = generator(self.seed, epoch, Stream.EPOCH).permutation(self.num_files)
            for part in range(self.rank * self.accum, (self.rank + 1) * self.accum):
                slots = range(part * micro, (part + 1) * micro)
                if self.order == "epoch":
                    offset = step % self.steps_per_epoch * self.global_batch
                    yield [ClipKey(step * self.global_batch + slot, int(permutation[offset + slot])) for slot in slots]
                else:
                    yield [ClipKey(step * self.global_batch + slot) for slot in slots]


class Loader(DataLoader):
    """A DataLoader whose failures are OSErrors of one line. Its workers start with the first iteration."""

    dataset: Any  # a ClipDataset, where the loader is of make_loader

    def __iter__(self) -> Iterator:  # type: ignore[override]  # torch's type is its own iterator
        raise_file_limit()
        batches = reason = None
        # A half-built iterator of torch's prints errors when it is freed. So Ctrl-C waits until it is built, and a new
        # OSError is raised below: the original one would keep the iterator until the process ends.
        with interrupts_deferred():
            try:
                batches = super().__iter__()
            except OSError as error:
                reason = error.strerror
        if batches is None:
            raise OSError(f"{self.num_workers} loader workers cannot start: {reason}: lower --num_workers, or look at "
                          "`df /dev/shm`, `ulimit -n`, `ulimit -u` and the memory")

        def in_one_line() -> Iterator:
            try:
                yield from batches
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker (pid"):
                    raise
                raise ChildProcessError(f"{str(error).splitlines()[0].strip()} Lower --num_workers if memory is short; "
                                        "a run goes on with --resume auto") from error

        return in_one_line()


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended. A signal mask would not do: it holds for one thread, and the kernel
    gives the signal to another, such as BLAS's."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in the main thread alone
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


def raise_file_limit(wanted: int = 2**16) -> None:
    """Raise the limit of open files of this process and its children, as far as the system allows: the usual 1,024 are
    few for a loader of many workers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if resource.RLIM_INFINITY != soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def make_loader(dataset: ClipDataset, batches: Iterable[list[ClipKey]], num_workers: int, prefetch_factor: int = 2,
                pin_memory: bool = False) -> Loader:
    """A loader of the batches of keys that `batches` yields, with single-threaded worker processes."""
    return Loader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=num_workers, worker_init_fn=init_worker,
        prefetch_factor=prefetch_factor if num_workers else None, persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # otherwise each pass over the loader would draw from the global generator
    )


def init_worker(worker: int) -> None:
    """Set up a worker process: one thread, and no reaction to SIGTERM and SIGINT."""
    torch.set_num_threads(1)
    # Schedulers send SIGTERM to all processes of a job, and terminals send Ctrl-C: the training process saves and then
    # ends its workers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Kill the workers that an error has left behind. Otherwise multiprocessing, whose exit handler runs after this
    one, would send them SIGTERM, which they ignore, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # otherwise torch would report their end as an error
    for process in multiprocessing.active_children():
        if process.daemon:  # loader workers are
            process.kill()
