"""Reads published weights: the files of the papers' authors, without running code that they may contain, and folders or
Hugging Face hub ids with config.json and model.safetensors."""
import argparse
import collections
import hashlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import DamagedFile, foreign_name, read_json, reading

Model = TypeVar("Model", bound=nn.Module)


class WeightsError(OSError):
    """Published weights that cannot be obtained. The message is one line: what was tried, and what to do."""


# What the unpickler admits beside torch's own list (tensors, plain containers). Names with numpy.core are those of
# numpy 1, numpy._core those of numpy 2.
_ADMITTED: list[Any] = [
    argparse.Namespace,
    # The configuration type inside LARP's trainer files: a dict that repeats its items as attributes. torch's
    # unpickler gives both to an OrderedDict.
    (collections.OrderedDict, "easydict.EasyDict"),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("bool", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")},
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((np.zeros(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


def read_released(path: str | Path, *keys: str) -> dict:
    """The dict in an authors' .pth or .pt file, tensors on the CPU; argparse and EasyDict values become dicts.

    keys: what it must hold. Raises FileNotFoundError or ValueError, in one line, for a file that is missing, is not a
    PyTorch file (an HTML page, a git-lfs pointer, ...), holds types beyond plain containers, numbers, numpy arrays and
    tensors, or lacks a key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the path of a downloaded checkpoint")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a git-lfs pointer, not the file itself; fetch it with git lfs pull")
    if start.lstrip().startswith(b"<"):
        raise ValueError(f"{path}: an HTML page, not a checkpoint; the download failed, fetch the file again")
    try:
        with torch.serialization.safe_globals(_ADMITTED):
            # Memory-mapped if the format allows: the files also hold optimizer states, which are not read.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # an unpickler raises too many kinds of errors to list
        foreign = foreign_name(error)
        reason = f"holds a {foreign}, which is not admitted" if foreign else "not a whole PyTorch file"
        raise ValueError(f"{path}: {reason}; expected plain containers, numpy arrays and tensors") from error
    content = _plain(content)
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        found = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: no {', '.join(missing)} in it but {found}; is it a checkpoint of another model?")
    return content


def _plain(value):
    """Namespace, EasyDict, OrderedDict, ... to dict and numpy scalars to numbers, all the way down."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`state` without `prefix` ("module." of DistributedDataParallel, say) where a name has it."""
    return {name.removeprefix(prefix): value for name, value in state.items()}


def verify(file: BinaryIO | Path) -> None:
    """ValueError where what torch.save wrote is not what was written: it is a zip, which holds checksums."""
    with zipfile.ZipFile(file) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it is not what was written")


def weights_sha256(model: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 of a model's tensors with their names: the same for equal weights in whatever file.

    A LARP tokenizer's prior does not count: neither codes nor clips depend on it, and released files lack it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((model.state_dict() if isinstance(model, nn.Module) else model).items()):
        if name.startswith("prior_model."):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_finite(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """ValueError where a weight is NaN or infinite. path: of the file, for the error."""
    for name, tensor in weights.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite: the file is damaged, or of a run that has diverged; give "
                             "another")


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path, flags: Mapping[str, str] | None = None
) -> None:
    """Load `state` into `model`, all of it. A difference in names or shapes raises a one-line ValueError with the
    first few of them. path: of the file, for the error. flags: {start of a tensor's name: the flags behind it}."""
    expected = model.state_dict()
    differences = [(name, f"{name} is missing") for name in expected if name not in state]
    differences += [(name, f"{name} is not expected") for name in state if name not in expected]
    differences += [
        (name, f"{name} is {tuple(state[name].shape)} and not {tuple(expected[name].shape)}")
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if not differences:
        check_finite(state, path)
        model.load_state_dict(state)
        return
    behind = [
        set(text.split(", "))
        for start, text in (flags or {}).items()
        if any(name.startswith(start) for name, _ in differences)
    ]
    # If one wrong flag explains all differences, name it; otherwise several flags are wrong.
    suspects = sorted(set.intersection(*behind) or set.union(*behind)) if behind else []
    advice = f"; check {', '.join('--' + flag for flag in suspects)}" if suspects else ""
    first = ", ".join(text for _, text in differences[:3])
    raise DamagedFile(f"{path}: {len(differences)} tensors do not fit this model: {first}{advice}")


def build(kind: type[Model], config: dict, path: str | Path | None) -> Model:
    """kind(**config). path: the file that `config` is from, whose errors become DamagedFile; None: it is from flags."""
    if path is None:
        return kind(**config)
    with reading(path, f"a {kind.__name__}", "it is of another model or version, or damaged: give another"):
        return kind(**config)


PRETRAINED = ("config.json", "model.safetensors")
FACTS_FILE = "facts.json"  # beside them, where there is more to say


def read_pretrained(source: str | Path, **hub: Any) -> tuple[dict, dict[str, Tensor], Path]:
    """What save_pretrained wrote: the configuration, the weights by name, and the path of the weights.

    source: a folder, or the Hugging Face hub id of one. hub: revision, cache_dir, token, local_files_only, ... as
    huggingface_hub.snapshot_download takes them. Raises WeightsError where there is neither, FileNotFoundError for a
    path that is none or a folder that lacks a file, and ValueError for a damaged one, each in one line.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            validate_repo_id(str(source))
        except HFValidationError as error:
            raise FileNotFoundError(f"{source}: no such file or folder; give one, or a Hugging Face hub id such as "
                                    "NAME/MODEL") from error
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=[*PRETRAINED, FACTS_FILE], **hub))
        except (HfHubHTTPError, OSError, ValueError) as error:  # no such id, no network, not in the cache, ...
            reason = str(error).strip().split("\n")[0]
            raise WeightsError(
                f"{source}: not a folder, and as a Hugging Face hub id it is neither in the cache "
                f"{hub.get('cache_dir') or constants.HF_HUB_CACHE} nor to be had ({reason}); put config.json and "
                "model.safetensors into a folder and give its path, or fetch it once where there is a network and set "
                "HF_HUB_OFFLINE=1 to use the cache"
            ) from error
    missing = [name for name in PRETRAINED if not (folder / name).is_file()]
    if missing:
        expected = "both, as save_pretrained writes them"
        if len(missing) > 1:  # else it is an export that lacks a file
            missing = ["checkpoint", *missing]
            expected = "a run's folder, which has a checkpoint, or an exported model's, which has the other two"
        raise FileNotFoundError(f"{folder}: no {' and no '.join(missing)} in it; expected {expected}")
    config, weights = (folder / name for name in PRETRAINED)
    advice = "fetch it again"
    content = read_json(config, "a model's configuration", advice)
    with reading(weights, "a model's weights", advice):
        return content, load_file(weights), weights


def read_facts(folder: Path) -> dict:
    """What facts.json says; {} where there is none. Raises DamagedFile."""
    path = folder / FACTS_FILE
    return read_json(path, "what is known of a model", "fetch it again, or remove it") if path.is_file() else {}


SIT_STATISTICS = ("xy_mean", "xy_std", "yt_mean", "yt_std", "xt_mean", "xt_std")


def read_sit_statistics(path: str | Path) -> dict[str, Tensor]:
    """The latent statistics of the authors' SiT run, which only its log.txt holds.

    Returns {"xy_mean", "xy_std", "yt_mean", ..., "xt_std"}: (C,) float32 each, to four decimals.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the log.txt of the run that made the checkpoint belongs there")
    text = re.sub(r"\x1b\[[0-9;]*m", "", path.read_text(errors="replace"))  # dates are coloured
    statistics = {}
    for name in SIT_STATISTICS:
        found = re.search(rf"\b{name}:\s*tensor\(\s*\[([^\]]*)\]", text)
        if not found:
            raise ValueError(f"{path}: no line '{name}: tensor([...])' in it; is it the log.txt of a SiT run?")
        statistics[name] = torch.tensor([float(number) for number in found[1].replace(",", " ").split()])
    sizes = {len(values) for values in statistics.values()}
    if len(sizes) != 1 or not all(values.isfinite().all() for values in statistics.values()):
        raise ValueError(f"{path}: statistics of {sorted(sizes)} channels; expected finite numbers, as many for each")
    return statistics
