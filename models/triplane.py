"""The three coordinate planes of a clip, as one value."""
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor


class Planes(NamedTuple):
    """A clip's latent: `xy` has axes h, w; `yt` has axes t, w; `xt` has axes t, h (the published names)."""

    xy: Tensor
    yt: Tensor
    xt: Tensor

    def map(self, function: Callable, *others: tuple) -> "Planes":
        """Apply `function` plane by plane: map(f, other) is f(self.xy, other.xy), ..."""
        return Planes(*(function(*planes) for planes in zip(self, *others, strict=True)))

    def channels_first(self) -> "Planes":
        """(B, R, R, C) planes, as CoordTok holds them, to (B, C, R, R), as SiT does."""
        return self.map(lambda plane: rearrange(plane, "b r s c -> b c r s"))

    def channels_last(self) -> "Planes":
        """(B, C, R, R) planes, as SiT holds them, to (B, R, R, C), as CoordTok does."""
        return self.map(lambda plane: rearrange(plane, "b c r s -> b r s c"))


def stored(planes: Planes, bits: int | None = None) -> tuple[Planes, int]:
    """(the planes as they are after storage, bits that this takes for a clip).

    planes: (B, R, S, C) floating point each. bits: of a value. 32, 16: float32, float16. 8: 256 even steps between the
    least and the greatest value of each clip's plane, which are two float32 numbers beside it. None: the planes as they
    are, in the precision that they have. Raises ValueError for other bits.
    """
    values = sum(plane[0].numel() for plane in planes)
    if bits is None:
        return planes, 8 * planes.xy.element_size() * values
    if bits == 8:
        return planes.map(_in_256_steps), 8 * values + len(planes) * 2 * 32
    if bits not in (16, 32):
        raise ValueError(f"a value of a plane is stored in 8, 16 or 32 bits, got {bits}: change --plane_bits")
    dtype = {16: torch.float16, 32: torch.float32}[bits]
    return planes.map(lambda plane: plane.to(dtype).to(plane.dtype)), bits * values


def _in_256_steps(plane: Tensor) -> Tensor:
    x = plane.float()
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    step = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    return (low + step * ((x - low) / step).round()).to(plane.dtype)
