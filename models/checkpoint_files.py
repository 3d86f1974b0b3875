"""Reads this project's checkpoints, which `training/checkpoint.py` writes, and folders that `models/hub.py` writes."""
import re
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from common.errors import DamagedFile, found, reading
from common.files import of_system
from models.pretrained import PRETRAINED, check_finite, read_facts, read_pretrained, verify

FORMAT = 1
# The type of what a checkpoint holds, where it holds it. The dicts are read by their keys, models by `load_state`.
DICTS = ("config", "disc_config", "interpolant", "statistics", "data", "args")
TYPES = {"step": int, "best": int | float, "rng": list, "classes": list, "tokenizer": str, "num_cond_frames": int,
         "reports": list,
         **dict.fromkeys(DICTS, dict)}
NAME = re.compile(r"step_(\d+)(\.pt)?")  # of a file, or of a folder where the state has sharded tensors


def step_of(path: Path) -> int:
    return int(NAME.sub(r"\1", path.name))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first: by the number of their step, which may have any number of digits."""
    return sorted((path for path in folder.glob("step_*") if NAME.fullmatch(path.name)), key=step_of)


def is_sharded(path: Path) -> bool:
    return (path / "state.pt").is_file()


def load(path: str | Path, mmap: bool = False) -> "State":
    """A checkpoint of this project on the CPU; of a folder of them, the newest whole one.

    A sharded one comes without its sharded tensors: "shards" is its folder, for `select_weights` and fsdp.fill.
    mmap: leave tensors in the file until they are used, and do not look whether they are damaged. Raises
    FileNotFoundError; DamagedFile; ValueError where it is not ours, or of another version; OSError where the system
    does not give it, which says nothing of the file.
    """
    path = Path(path)
    if is_export(path):
        return load_export(path)
    if path.is_dir() and not is_sharded(path):
        state = newest(path)
        if state is None:
            raise FileNotFoundError(f"no checkpoint step_*.pt in {path}")
        return state
    file = path / "state.pt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if not mmap:
            verify(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        if path.is_dir():
            from models import sharded  # late: it takes a second to import

            sharded.check(path)
    except Exception as error:
        reason = found(file, error)
        if of_system(error):
            raise OSError(f"{path} cannot be read: {getattr(error, 'strerror', None) or reason}") from error
        raise DamagedFile(f"{path} cannot be read as a checkpoint: {reason}; give another, or move it away") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path} is not a checkpoint of this project: it has no 'format' entry")
    if state["format"] != FORMAT:
        raise ValueError(f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}")
    state = typed(state, path)
    if not mmap:
        check_finite(state.get("statistics", {}), path)
        averages = state.get("ema") or {}
        nested = any(isinstance(value, dict) for value in averages.values())
        for weights in (state.get("model") or {}, *(averages.values() if nested else [averages])):
            if isinstance(weights, dict):  # else `restore` says so
                check_finite(weights, path)
    if path.is_dir():
        state["shards"] = path
    return state


def typed(content: dict, path: Path) -> "State":
    """What was read from the checkpoint or export `path`, as a State. DamagedFile where a value is of a wrong type."""
    with reading(path, "a checkpoint", "give another"):
        for key in TYPES.keys() & content.keys():
            if not isinstance(content[key], TYPES[key]):
                raise ValueError(f"its {key} is a {type(content[key]).__name__}")
        if content.get("step", 0) < 0:
            raise ValueError(f"its step is {content['step']}")
        if any(one["cpu"].dtype != torch.uint8 for one in content.get("rng", [])):
            raise ValueError("its rng are not generators' states")
    return State({key: nested(value, path) if key in DICTS else value for key, value in content.items()}, path)


def nested(value, path: Path):
    """A dict as a State, with those in it."""
    return State({key: nested(inner, path) for key, inner in value.items()}, path) if isinstance(value, dict) else value


class State(dict):
    """What a checkpoint holds. A key that it lacks raises DamagedFile. path: the checkpoint."""

    def __init__(self, content: dict, path: Path):
        super().__init__(content)
        self.path = path

    def __reduce__(self):
        """Pickles as a plain dict, which `torch.load(weights_only=True)` admits."""
        return OrderedDict, (list(self.items()),)

    def __missing__(self, key: str):
        raise DamagedFile(f"{self.path} has no {key!r}, but {', '.join(map(str, list(self)[:12])) or 'nothing'}: it is "
                          "of another model or version, or damaged; give another checkpoint")


def is_ours(path: str | Path) -> bool:
    """Whether `path` is a checkpoint of this project, rather than a file the papers' authors released."""
    if is_export(Path(path)):
        return True
    try:
        load(path, mmap=True)
    except ValueError:
        return False
    return True


def newest(folder: Path) -> "State | None":
    """The newest whole checkpoint in `folder`, or None where there is none. Raises DamagedFile where all are damaged,
    and what `load` raises for other reasons than damage."""
    there = list_checkpoints(folder)
    for path in reversed(there):
        try:
            return load(path)
        except (DamagedFile, FileNotFoundError) as error:  # a folder without its state.pt is damaged too
            warnings.warn(f"{error}; trying the checkpoint before it", stacklevel=2)
    if there:
        names = ", ".join(path.name for path in there)
        raise DamagedFile(f"none of the {len(there)} checkpoints in {folder} is whole ({names}): put a whole one in "
                           "their place, or move them away to start anew")
    return None


def expect(state: dict, kind: str, source: str | Path) -> dict:
    """The state itself, read from `source`. ValueError where another script wrote it."""
    if state.get("kind") != kind:
        raise ValueError(f"{source} holds a {state.get('kind')} model, expected a {kind} checkpoint")
    return state


def select_weights(state: dict, version: str = "sd") -> dict[str, Tensor]:
    """A checkpoint's live weights ("sd"), or their moving average: "ema", or "ema_DECAY" where it holds several."""
    found = {"sd": state["model"]}
    averages = state.get("ema") or {}
    if any(isinstance(value, dict) for value in averages.values()):
        found |= {f"ema_{decay}": weights for decay, weights in averages.items()}
    elif averages:
        found["ema"] = averages
    if version not in found:
        raise ValueError(f"no weights {version!r} in this checkpoint; it holds {', '.join(found)}: choose one of them")
    if "shards" not in state:
        return found[version]
    path = "model" if version == "sd" else version.replace("_", "/", 1)  # ema_0.9 lies under ema/0.9
    from models import sharded

    return found[version] | sharded.read_whole(state["shards"], f"{path}/")


def is_export(path: Path) -> bool:
    return all((path / name).is_file() for name in PRETRAINED)


# What else the files of a model may say of it, beside its architecture and weights.
FACTS = ("step", "interpolant", "statistics", "classes", "tokenizer", "num_cond_frames", "args", "reports")
# Kinds whose config.json is {"kind", "config", these}. LARP's is its architecture alone, as released; the rest is in
# facts.json.
EXPORTED = {
    "coordtok": (),
    "sit": ("interpolant", "statistics", "classes", "tokenizer", "args"),
}


def kind_of_export(config: dict) -> str | None:
    """The kind of the model whose config.json this is; None where it is of something else."""
    if (kind := config.get("kind")) is not None:
        return kind if kind in EXPORTED else None
    return "larp_tokenizer" if "bottleneck" in config else "larp_ar" if "n_layer" in config else None


def load_export(source: str | Path, **hub) -> State:
    """What save_pretrained wrote, as a checkpoint whose "model" (of a SiT also "ema") are these weights.

    source, hub: as `read_pretrained` takes them. Raises what it does, and ValueError for files of something else.
    """
    config, weights, path = read_pretrained(source, **hub)
    folder, kind = path.parent, kind_of_export(config)
    if kind is None:
        raise ValueError(f"{folder / 'config.json'} is not of an exported model of this project: "
                         f"kind {config.get('kind')!r}")
    if kind not in EXPORTED:
        config = {"kind": kind, "config": config, **read_facts(folder)}
    elif missing := [name for name in ("config", *EXPORTED[kind]) if name not in config]:
        raise ValueError(f"{folder / 'config.json'} is damaged: it lacks {', '.join(missing)}")
    check_finite(weights, path)
    if config.get("statistics") is not None:
        with reading(folder / "config.json", "a SiT", "fetch it again"):
            config["statistics"] = {name: torch.tensor(values) for name, values in config["statistics"].items()}
    averages = {"ema": weights} if kind == "sit" else {}
    unknown = [name for name in FACTS if name in config and config[name] is None]
    known = {name: value for name, value in config.items() if name not in unknown}
    state = typed({"format": FORMAT, **known, "model": weights, **averages}, folder)
    state.update(dict.fromkeys(unknown))
    return state
