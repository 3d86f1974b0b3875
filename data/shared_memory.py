"""Transfer of batches from a loader worker to the training process, through a pool of reusable shared memory.

`ship` packs a batch in the worker; unpickling it in the training process gives the batch, whose frames are views of the
shared memory.
"""
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
    """The batch with its frames, packed for the training process. There the frames are one tensor if their shapes are
    `alike`, else a list."""
    batch = {name: ByValue(value) if isinstance(value, Tensor) else value for name, value in batch.items()}
    # Pickled here: an error in the queue's own thread would be lost, and the training process would wait for ever.
    try:
        return Packed(bytes(ForkingPickler.dumps({**batch, "frames": POOL.pack(frames, alike)})))
    except OSError as error:
        raise OSError(f"a batch cannot be handed over in shared memory: {error.strerror or error}: lower --num_workers "
                      "or the batch size, or raise the limit (`ulimit -n` for files)") from error


class Packed(NamedTuple):
    """An object that is already pickled."""

    content: bytes

    def __reduce__(self):
        return pickle.loads, (self.content,)


class ByValue(NamedTuple):
    """A small tensor, pickled by value. torch would share it through a file of its own, which takes half a
    millisecond."""

    tensor: Tensor

    def __reduce__(self):
        return torch.from_numpy, (self.tensor.numpy(),)


class SharedTensor(NamedTuple):
    """Large tensors in shared memory, all in one file, since a process may have only so many open."""

    file: io.FileIO
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype
    alike: bool

    def __reduce__(self):
        return unpack, (DupFd(self.file.fileno()), *self[1:])


def unpack(file: DupFd, shapes: list[tuple[int, ...]], dtype: torch.dtype, alike: bool) -> Tensor | list[Tensor]:
    """What a SharedTensor becomes when it is unpickled."""
    descriptor = file.detach()
    # mmap duplicates the descriptor, and closes its copy when the tensor is freed.
    memory = mmap.mmap(descriptor, sum(map(prod, shapes)) * dtype.itemsize)
    os.close(descriptor)
    values = torch.frombuffer(memory, dtype=dtype)
    if alike:
        return values.view(len(shapes), *shapes[0])
    return [part.view(shape) for part, shape in zip(values.split([prod(shape) for shape in shapes]), shapes)]


class SharedMemoryPool:
    """A worker's shared memory. A piece is reused once the training process has freed the tensors in it. Allocating new
    memory for each batch, as torch does, costs five times as much as copying the clips: the system clears and maps
    pages.

    The file of a piece in use is locked. The lock is released when the last descriptor closes, that is, when the
    receiver frees the tensor.
    """

    def __init__(self):
        self.pieces: dict[int, Tensor] = {}  # file descriptor: its bytes

    def pack(self, clips: list[Tensor], alike: bool) -> SharedTensor | Tensor | list[Tensor]:
        """Copy clips of one dtype into a free piece. The receiver gets one stacked tensor if they are `alike` in shape,
        else a list."""
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
        file = io.FileIO(f"/proc/self/fd/{piece}", "r+")  # opened again, so that it has its own lock
        fcntl.flock(file, fcntl.LOCK_SH)
        return SharedTensor(file, shapes, dtype, alike)


def is_free(piece: int) -> bool:
    """Whether nobody holds the lock of a piece, which is given by its descriptor."""
    try:
        fcntl.flock(piece, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(piece, fcntl.LOCK_UN)
    return True


POOL = SharedMemoryPool()
