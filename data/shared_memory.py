"""Batches on their way from a loader worker to the training process, through shared memory that is used again."""
import fcntl
import io
import mmap
import os
import pickle
from math import prod
from multiprocessing.reduction import ForkingPickler
from multiprocessing.resource_sharer import DupFd
from typing import NamedTuple

import torch
from torch import Tensor


def ship(batch: dict, frames: list[Tensor], alike: bool) -> "Packed":
    """What the training process receives as the batch with its frames: one tensor, or a list where sizes differ."""
    batch = {name: ByValue(value) if isinstance(value, Tensor) else value for name, value in batch.items()}
    # Pickled here, as the error of a queue's own thread would reach nobody, and the batch would be waited for for ever.
    try:
        return Packed(bytes(ForkingPickler.dumps({**batch, "frames": SHELF.pack(frames, alike)})))
    except OSError as error:
        raise OSError(f"a batch cannot be handed over in shared memory: {error.strerror or error}: lower --num_workers "
                      "or the batch size, or raise the limit (`ulimit -n` for files)") from error


class Packed(NamedTuple):
    """What is pickled already."""

    content: bytes

    def __reduce__(self):
        return pickle.loads, (self.content,)


class ByValue(NamedTuple):
    """A small tensor on its way. torch would share it through a file of its own, which takes half a millisecond."""

    tensor: Tensor

    def __reduce__(self):
        return torch.from_numpy, (self.tensor.numpy(),)


class SharedTensor(NamedTuple):
    """Large tensors on their way, through shared memory: one file, as a process may have few open."""

    file: io.FileIO
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype
    alike: bool

    def __reduce__(self):
        return unpack, (DupFd(self.file.fileno()), *self[1:])


def unpack(file: DupFd, shapes: list[tuple[int, ...]], dtype: torch.dtype, alike: bool) -> Tensor | list[Tensor]:
    descriptor = file.detach()
    # The map has a copy of the descriptor until its end.
    memory = mmap.mmap(descriptor, sum(map(prod, shapes)) * dtype.itemsize)
    os.close(descriptor)
    values = torch.frombuffer(memory, dtype=dtype)
    if alike:
        return values.view(len(shapes), *shapes[0])
    return [part.view(shape) for part, shape in zip(values.split([prod(shape) for shape in shapes]), shapes)]


class SharedMemoryPool:
    """A worker's shared memory, used again once the training process has let go of the tensors in it. Memory made anew
    for each batch, as torch does, costs five times as much as copying the clips: the system clears and maps its pages.

    A parcel's file is locked, and the lock lasts until no process has the descriptor any more: the tensors hold one.
    """

    def __init__(self):
        self.pieces: dict[int, Tensor] = {}  # file descriptor: its bytes

    def pack(self, clips: list[Tensor], alike: bool) -> SharedTensor | Tensor | list[Tensor]:
        """Clips of one type. They arrive as one tensor, stacked, where they are alike in shape, else as a list."""
        if not any(clip.numel() for clip in clips):
            return torch.stack(clips) if alike else clips
        shapes, dtype = [tuple(clip.shape) for clip in clips], clips[0].dtype
        size = sum(map(prod, shapes)) * dtype.itemsize
        piece = next(filter(is_free, self.pieces), None)
        if piece is None:
            piece = os.memfd_create("clips")
            self.pieces[piece] = torch.empty(0, dtype=torch.uint8)
        if len(self.pieces[piece]) < size:
            os.ftruncate(piece, size)
            self.pieces[piece] = torch.frombuffer(mmap.mmap(piece, size), dtype=torch.uint8)
        room = self.pieces[piece][:size].view(dtype)
        for part, clip in zip(room.split([clip.numel() for clip in clips]), clips):
            part.view(clip.shape).copy_(clip)
        file = io.FileIO(f"/proc/self/fd/{piece}", "r+")  # opened anew, for a lock of its own
        fcntl.flock(file, fcntl.LOCK_SH)
        return SharedTensor(file, shapes, dtype, alike)


def is_free(piece: int) -> bool:
    try:
        fcntl.flock(piece, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(piece, fcntl.LOCK_UN)
    return True


SHELF = SharedMemoryPool()
