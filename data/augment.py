"""Augmentation of clips: mirror images, drawn from (seed, position)."""
from collections.abc import Sequence

import torch
from torch import Tensor

from common.distributed import to_device
from common.rng import Stream, uniform_per_sample


def draw_flips(seed: int, positions: Sequence[int]) -> Tensor:
    """(B,) bool: which clips are mirrored."""
    return uniform_per_sample(seed, positions, Stream.FLIP) < 0.5


def flip_half(video: Tensor, seed: int, positions: Sequence[int]) -> Tensor:
    """The clips (B, 3, T, H, W) at these positions of the run, half of them mirrored."""
    flips = to_device(draw_flips(seed, positions), video.device)
    return torch.where(flips[:, None, None, None, None], video.flip(-1), video)
