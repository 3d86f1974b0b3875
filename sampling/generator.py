"""The interface between sample.py and the models: a Generator, which sampling/sit.py and sampling/larp.py build."""
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Generator(NamedTuple):
    """A trained model and its sampling settings, as sample.py uses them."""

    # (sample indices, labels of the paired real clips, and, if needs_real, those clips (B, 3, T, H, W)) -> videos
    # (B, 3, T, H, W), and values by name, (B, ...) each: label, nll in nats where it is known, ...
    generate: Callable[[list[int], list[int], Tensor | None], tuple[Tensor, dict[str, Tensor]]]
    num_labels: int  # `generate` takes labels below this; 0: it takes none
    needs_real: bool  # whether `generate` takes real clips
    num_frames: int
    size: int
    protocols: list[str]  # names of the protocols that fit the model; the first is the default
    settings: dict  # everything that the samples depend on, as plain JSON values
    model: str  # names the weights, for the record
    row: dict  # columns of the table of results that name the models
    class_names: list[str]  # by label; empty if unknown, or if there are no classes
    num_cond_frames: int = 0  # frames of the real clip that the model is given
    patch: tuple[int, int, int] | None = None  # (t, h, w) of the patches that the tokenizer decodes


def check_class_label(label: int | None, num_classes: int) -> None:
    """Raise ValueError where --class_label is not a class of the model."""
    if label is not None and not 0 <= label < num_classes:
        raise ValueError(f"--class_label is {label}, expected 0 to {num_classes - 1}")
