"""Checks of what users give to the models. Types are always looked at; values only where they lie on the CPU, as a look
at those on a GPU would wait for it."""
from typing import Any

import torch
from torch import Tensor


def check_tensor(name: str, given: Any) -> None:
    """ValueError where `given` is no tensor."""
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(given).__name__}: give torch.as_tensor of it")


def check_video(video: Tensor, values: bool = True, dtype: torch.dtype | None = None) -> None:
    """ValueError where a clip is not of a floating-point type, or far outside [0, 1]: bytes, or 0 to 255.

    video: (B, 3, T, H, W). values: look at these too. Between -1 and 1.5 all passes: -1 is the authors' padding, and
    resizing overshoots. dtype: of the weights, which the video must have outside of autocast; None: it is converted.
    """
    check_tensor("the video", video)
    if not video.is_floating_point():
        raise ValueError(f"the video is of type {str(video.dtype).removeprefix('torch.')}, expected floats in [0, 1]: "
                         "give video.float() / 255")
    if dtype not in (None, video.dtype) and not torch.is_autocast_enabled(video.device.type):
        here, there = (str(each).removeprefix("torch.") for each in (video.dtype, dtype))
        raise ValueError(f"the video is of type {here}, but the model of {there}: give video.to(torch.{there})")
    if values and video.device.type == "cpu" and video.numel():
        low, high = video.detach().aminmax()
        if low < -1 or high > 1.5:  # NaN passes: whatever stands in padding is left out
            raise ValueError(f"the video's values are {low:g} to {high:g}, expected [0, 1]: divide by 255, or scale it")


def check_integers(name: str, given: Tensor, below: int, low: int | None = 0, advice: str = "") -> None:
    """ValueError where `given` is not of an integer type or, on the CPU, has a value outside low, ..., below - 1.

    name: what they are, for the message. low: None: any negative value passes.
    """
    check_tensor(name, given)
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"{name} are of type {str(given.dtype).removeprefix('torch.')}, expected long{advice}")
    if given.device.type == "cpu" and given.numel():
        least, most = given.aminmax()
        if most >= below or (low is not None and least < low):
            first = "negative for none, or 0" if low is None else low
            raise ValueError(f"{name} are {least} to {most}, expected {first} to {below - 1}{advice}")
