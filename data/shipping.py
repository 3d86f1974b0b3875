"""Batches on their way from a loader worker to the training process, through shared memory that is used again."""
import fcntl
import io
import math
import mmap
import os
from multiprocessing.resource_sharer import DupFd
from typing import NamedTuple

import torch
from torch import Tensor


def ship(batch: dict, frames: list[Tensor], alike: bool) -> dict:
    """What the training process receives as the batch with its frames."""
    batch = {name: ByValue(value) if isinstance(value, Tensor) else value for name, value in batch.items()}
    if alike:
        return {**batch, "frames": SHELF.pack(frames, (len(frames), *frames[0].shape))}
    return {**batch, "frames": [SHELF.pack([clip], clip.shape) for clip in frames]}


class ByValue(NamedTuple):
    """A small tensor on its way. torch would share it through a file of its own, which takes half a millisecond."""

    tensor: Tensor

    def __reduce__(self):
        return torch.from_numpy, (self.tensor.numpy(),)


class Parcel(NamedTuple):
    """A large tensor on its way, through shared memory."""

    file: io.FileIO
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __reduce__(self):
        return unpack, (DupFd(self.file.fileno()), self.shape, self.dtype)


def unpack(file: DupFd, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    descriptor = file.detach()
    memory = mmap.mmap(descriptor, math.prod(shape) * dtype.itemsize)  # has a copy of the descriptor until its end
    os.close(descriptor)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Shelf:
    """A worker's shared memory, used again once the training process has let go of the tensor in it. Memory made anew
    for each batch, as torch does, costs five times as much as copying the clips: the system clears and maps its pages.

    A parcel's file is locked, and the lock lasts until no process has the descriptor any more: the tensor holds one.
    """

    def __init__(self):
        self.pieces: dict[int, Tensor] = {}  # file descriptor: its bytes

    def pack(self, clips: list[Tensor], shape: tuple[int, ...]) -> Parcel:
        """Clips of one shape, stacked to `shape`."""
        size, dtype = math.prod(shape) * clips[0].element_size(), clips[0].dtype
        piece = next(filter(is_free, self.pieces), None)
        if piece is None:
            piece = os.memfd_create("clips")
            self.pieces[piece] = torch.empty(0, dtype=torch.uint8)
        if len(self.pieces[piece]) < size:
            os.ftruncate(piece, size)
            self.pieces[piece] = torch.frombuffer(mmap.mmap(piece, size), dtype=torch.uint8)
        torch.stack(clips, out=self.pieces[piece][:size].view(dtype).view(len(clips), *clips[0].shape))
        file = io.FileIO(f"/proc/self/fd/{piece}", "r+")  # opened anew, for a lock of its own
        fcntl.flock(file, fcntl.LOCK_SH)
        return Parcel(file, shape, dtype)


def is_free(piece: int) -> bool:
    try:
        fcntl.flock(piece, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(piece, fcntl.LOCK_UN)
    return True


SHELF = Shelf()
