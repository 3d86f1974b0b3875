"""What sample.py samples from."""
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Generator(NamedTuple):
    """What sample.py needs to know of a model."""

    # (sample indices, labels and, where needs_real, clips (B, 3, T, H, W) of the real clips beside them) -> videos
    # (B, 3, T, H, W), and values by name, (B, ...) each: label, nll in nats where it is known, ...
    generate: Callable[[list[int], list[int], Tensor | None], tuple[Tensor, dict[str, Tensor]]]
    num_labels: int  # the real clips' labels that `generate` takes are below it; 0: it takes none
    needs_real: bool  # whether it takes those clips
    num_frames: int
    size: int
    protocols: list[str]  # that fit; the first is the default
    settings: dict  # all that the samples depend on, plain JSON values
    model: str  # names the weights, for the record
    row: dict  # of the table of results, beside the settings
    class_names: list[str]  # by label; empty where unknown, or where there are no classes
    num_cond_frames: int = 0  # of the real clip, given to the model
    patch: tuple[int, int, int] | None = None  # t, h, w of the blocks that the tokenizer's clips are made of


def check_class_label(label: int | None, num_classes: int) -> None:
    if label is not None and not 0 <= label < num_classes:
        raise ValueError(f"--class_label is {label}, expected 0 to {num_classes - 1}")

