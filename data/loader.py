"""Batches of clips: which samples, in which process, by which workers."""
import atexit
import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler, get_worker_info

from common.rng import Stream, generator
from data.clips import ClipDataset, ClipKey
from data.shared_memory import ship


def collate(samples: list[dict]) -> dict:
    """A batch: frames (B, T, h, w, 3), or a list of clips where sizes differ; n_frames, label, position (B,) long;
    path, start lists; index (B, N, 3) long where there are points; skipped: (path, reason) of samples left out."""
    good = [sample for sample in samples if "error" not in sample]
    frames = [sample["frames"] for sample in good]
    batch = {name: torch.tensor([sample[name] for sample in good], dtype=torch.long)
             for name in ("n_frames", "label", "position")}
    batch |= {name: [sample[name] for sample in good] for name in ("path", "start")}
    if good and "index" in good[0]:
        batch["index"] = torch.stack([sample["index"] for sample in good])
    batch["skipped"] = [(sample["path"], sample["error"]) for sample in samples if "error" in sample]
    return deliver(batch, frames, alike=len({clip.shape for clip in frames}) == 1)


def deliver(batch: dict, frames: list[torch.Tensor], alike: bool) -> dict:
    """The batch with its frames, stacked where they are `alike` in shape; from a worker through shared memory."""
    if get_worker_info() and hasattr(os, "memfd_create"):  # Linux has it
        return ship(batch, frames, alike)
    return {**batch, "frames": torch.stack(frames) if alike else frames}


# --- order ---
def check_shares(global_batch: int, world_size: int, accum: int) -> None:
    """ValueError where a batch cannot be shared equally."""
    if global_batch < 1 or global_batch % (world_size * accum):
        raise ValueError(f"a global batch of {global_batch} cannot be shared by {world_size} processes x {accum} "
                         f"accumulation steps: give a multiple of {world_size * accum}")


class GlobalBatchSampler(Sampler):
    """The keys of one process's micro-batches, step after step; the global batch does not depend on the process count.

    Sample `slot` of step `step` has position step * global_batch + slot. Rank r of W takes the r-th W-th of the slots,
    in `accum` micro-batches. order "replacement": each sample draws its video. "epoch": each epoch is a permutation of
    the videos, whose last partial batch is dropped.
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
    """A DataLoader whose failures are an OSError of one line. Its workers start when it is first iterated over."""

    def __iter__(self) -> Iterator:
        raise_file_limit()
        batches = reason = None
        # torch's iterator, left half-made, complains when it is freed: Ctrl-C waits until it is whole, and an error of
        # the system, which would keep it until the process ends, is raised anew.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            batches = super().__iter__()
        except OSError as error:
            reason = error.strerror
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
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


def raise_file_limit(wanted: int = 2**16) -> None:
    """Let this process and those it starts have more files open, as far as the system lets anyone: the usual limit of
    1,024 is low for a loader of many workers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if resource.RLIM_INFINITY != soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def make_loader(dataset: ClipDataset, batches: Sampler, num_workers: int, prefetch_factor: int = 2,
                pin_memory: bool = False) -> Loader:
    """Loads the batches of keys that `batches` yields, in worker processes of one thread each."""
    return Loader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=num_workers, worker_init_fn=init_worker,
        prefetch_factor=prefetch_factor if num_workers else None, persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else every pass over the loader would draw from the global generator
    )


def init_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Schedulers send SIGTERM to all processes of a job, and terminals send Ctrl-C: the training process saves and then
    # ends its workers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """End the workers that an error has left. multiprocessing, whose turn at exit comes after this, would send them
    SIGTERM, which they ignore, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch would report their end as an error
    for process in multiprocessing.active_children():
        if process.daemon:  # as loader workers are
            process.kill()
