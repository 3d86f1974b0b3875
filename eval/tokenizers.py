"""Any tokenizer, as the evaluation takes it: a callable video -> (video, bits).

video: (B, 3, T, size, size) float in [0, 1], both ways, of one shape, on one device; the callable gets a copy that it
may change. bits: what the codes of a clip take, one number or (B,) of them. The callable declares the clips that it
takes by two attributes, `num_frames` and `size`: whole numbers, or None where any will do.

`FILE.py:NAME` is such a callable, or a function or class that makes one of key=value arguments. An nn.Module is moved
to the device and put in evaluation mode.
"""
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from common.errors import shown

OVERSHOOT = 0.01  # by which a reconstruction may leave [0, 1]
DECLARED = ("num_frames", "size")


class TokenizerError(ValueError):
    """A tokenizer that cannot be used. The message is one line: what was found, what is expected."""


def parse_arguments(words: Sequence[str]) -> dict[str, Any]:
    """["key=value", ...] to a dict; values are read as YAML: 1, 0.5, true, null, or text."""
    arguments = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name.isidentifier() and equals):
            raise TokenizerError(f"--tokenizer_args {word} is not of the form key=value")
        try:
            arguments[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            arguments[name] = value
    return arguments


def load_tokenizer(source: str, arguments: dict[str, Any]) -> Callable:
    """The callable of "FILE.py:NAME", which is called with `arguments` unless it is a tokenizer itself. Raises
    TokenizerError."""
    path, colon, name = source.rpartition(":")
    if not (colon and path.endswith(".py") and name.isidentifier()):
        raise TokenizerError(f"--tokenizer {shown(source)} is neither FILE.py:NAME nor codec:h264, codec:h265, "
                             "codec:av1")
    if not Path(path).is_file():
        raise TokenizerError(f"{shown(path)}: no such file; --tokenizer takes FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(f"tokenizer_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None, "a .py file has both"
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(path).resolve().parent))  # its neighbours, after everything else
    _call(f"{path} cannot be imported", spec.loader.exec_module, module)
    if not hasattr(module, name):
        raise TokenizerError(f"{path} has no {name}: --tokenizer takes FILE.py:NAME")
    found = getattr(module, name)
    if not callable(found):
        raise TokenizerError(f"{source} is of type {type(found).__name__}, expected a function or a class")
    if isinstance(found, type) or not any(hasattr(found, attribute) for attribute in DECLARED):
        found = _call(f"{source} cannot be called with {arguments or 'no --tokenizer_args'} to make a tokenizer, and "
                      f"is none itself: it declares no {' and no '.join(DECLARED)}", found, **arguments)
    elif arguments:
        raise TokenizerError(f"{source} is a tokenizer and takes no --tokenizer_args: leave them out")
    if not callable(found):
        raise TokenizerError(f"{source} made a value of type {type(found).__name__}, expected a callable "
                             "video -> (video, bits)")
    for attribute in DECLARED:
        value = getattr(found, attribute, "missing")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise TokenizerError(f"{source}: its attribute {attribute} is {value}; expected a whole number, or None "
                                 "where any will do")
    return found.eval() if isinstance(found, nn.Module) else found


def clip_of(tokenizer: Callable, name: str, num_frames: int | None, size: int | None, default: Sequence[int]) -> tuple:
    """(frames, height and width) of the clips that a tokenizer is evaluated on: its own, else those asked for, else
    `default`. Raises TokenizerError where it is asked for others than its own."""
    chosen = []
    for attribute, asked, usual in zip(DECLARED, (num_frames, size), default):
        own = getattr(tokenizer, attribute)
        if own is not None and asked not in (None, own):
            raise TokenizerError(f"--{attribute} is {asked}, but {name} takes {own} alone: leave the flag out")
        chosen.append(own or asked or usual)
    return tuple(chosen)


class Checked:
    """A tokenizer whose every output is checked: (B, 3, T, H, W) and clips' global indices -> (B, 3, T, H, W).

    reconstruct: (video, indices) -> (video, bits). name: for errors. `bits` holds the bits of every clip, by index.
    """

    def __init__(self, reconstruct: Callable[[Tensor, list[int]], tuple[Tensor, Any]], name: str):
        self.reconstruct, self.name = reconstruct, name
        self.bits: dict[int, float] = {}

    def __call__(self, video: Tensor, indices: list[int]) -> Tensor:
        shape = tuple(video.shape)
        result = _call(f"{self.name} fails on clips of shape {shape}", self.reconstruct, video.clone(), indices)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor)):
            raise self._error(f"a {type(result).__name__}", "(video, bits)")
        output, bits = result
        if output.shape != video.shape:
            raise self._error(f"a video of shape {tuple(output.shape)}", f"that of its input, {shape}")
        if not output.is_floating_point():
            raise self._error(f"a video of {output.dtype}", "floating point in [0, 1]")
        if output.device != video.device:
            raise self._error(f"a video on {output.device}", f"the device of its input, {video.device}")
        low, high = output.min().item(), output.max().item()
        if not output.isfinite().all():
            raise self._error("a video with values that are not finite", "floating point in [0, 1]")
        # Checked on the first batch, which shows a wrong range. A rare overshoot must not end a long evaluation.
        if not self.bits and not -OVERSHOOT <= low <= high <= 1 + OVERSHOOT:
            raise self._error(f"a video with values from {low:.3g} to {high:.3g}", "[0, 1]: scale or clamp it")
        self.bits |= zip(indices, self._per_clip(bits, len(video)))
        return output

    def _per_clip(self, bits: Any, count: int) -> list[float]:
        try:
            values = torch.as_tensor(bits, dtype=torch.float64, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError):
            values = torch.empty(0)
        if values.shape not in ((), (count,)) or not (values.isfinite() & (values > 0)).all():
            found = f"bits of shape {tuple(values.shape)}" if values.numel() else f"bits of type {type(bits).__name__}"
            raise self._error(found if values.shape not in ((), (count,)) else f"bits {values.tolist()}",
                              f"one number above 0, or {count}, one for each clip")
        return values.expand(count).tolist()

    def _error(self, found: str, expected: str) -> TokenizerError:
        return TokenizerError(f"{self.name} returns {found}; expected {expected}")


def _call(failure: str, function: Callable, *args, **options) -> Any:
    """The result of somebody else's function, whose errors become a TokenizerError of one line. A lack of memory stays
    what it is."""
    try:
        return function(*args, **options)
    except (MemoryError, torch.OutOfMemoryError, TokenizerError):
        raise
    except (Exception, SystemExit) as error:
        text = (str(error).strip() or "no text").splitlines()[-1]
        raise TokenizerError(f"{shown(failure)}: {type(error).__name__}: {text} (VT_TRACEBACK=1 shows where)") \
            from error
