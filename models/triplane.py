"""The three coordinate planes of a clip, as one value."""
from collections.abc import Callable
from typing import NamedTuple

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
