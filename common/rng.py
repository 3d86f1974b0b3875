"""Random numbers from (seed, position, stream) alone, so that no draw depends on how samples are shared by processes,
workers and batches. Every use of them is a stream, and all streams are listed here."""
import enum
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


class Stream(enum.IntEnum):
    """What random numbers are for. Two uses with one number would draw the same values."""

    WINDOW = 1  # a clip's video, its first frame and its patches
    EPOCH = 2  # the order of the videos in an epoch
    CACHED_VIEW = 4  # which of a video's cached windows
    LABEL = 5  # the class of a sample
    FLIP = 6  # whether a clip is mirrored
    LABEL_DROP = 7  # whether a label is hidden
    HELD_OUT = 8  # the order of validation videos


def generator(seed: int, position: int, stream: Stream, attempt: int = 0) -> np.random.Generator:
    """A generator that is a function of its arguments alone."""
    return np.random.default_rng((seed, position, attempt, int(stream)))


def uniform_per_sample(seed: int, positions: Sequence[int], stream: Stream) -> Tensor:
    """(B,) float64 on the CPU, uniform in [0, 1): one number a sample, from (seed, position) alone."""
    return torch.tensor([generator(seed, position, stream).random() for position in positions])


def sample_generators(seed: int, indices: Iterable[int], device: str | torch.device = "cpu") -> list[torch.Generator]:
    """One generator for each sample index, a function of (seed, index) alone, on `device`.

    CPU and GPU generators draw different numbers: samples are reproducible on the same kind of device.
    """
    # torch's CPU generator uses only 32 bits of its seed: distinct indices must differ in those.
    return [torch.Generator(device).manual_seed((seed * 0x9E3779B1 + index) % 2**32) for index in indices]
