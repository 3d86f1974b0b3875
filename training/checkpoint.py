"""Checkpoints: dicts of plain values and tensors, written atomically.

A checkpoint with sharded tensors is a folder. Its state.pt holds the dict without them, and each process writes its
share of the tensors to a file of its own.
"""
import json
import os
import re
import shutil
import warnings
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from common import distributed
from common.errors import ArgumentParser, DamagedFile, found, reading
from common.files import atomic_write, of_system, writing
from models.pretrained import PRETRAINED, check_finite, load_state, read_pretrained
from training import fsdp

FORMAT = 1
# The types of a checkpoint's entries. The dicts are read by their keys, models by `load_state`.
DICTS = ("config", "disc_config", "interpolant", "statistics", "data", "args")
TYPES = {"step": int, "best": int | float, "rng": list, "classes": list, "tokenizer": str, "num_cond_frames": int,
         **dict.fromkeys(DICTS, dict)}
NAME = re.compile(r"step_(\d+)(\.pt)?")  # a file, or a folder if the state has sharded tensors


def rng_state() -> dict:
    """The states of this process's random generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(states: list[dict]) -> None:
    """Restore this process's generators. A process that the saving run did not have keeps its own seed."""
    if distributed.rank() < len(states):
        state = states[distributed.rank()]
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


def start_rng(seed: int, states: list[dict] | None) -> None:
    """Set the random generators before the first step: to the states in the checkpoint, or to a seed for each process.

    Call it last. Anything built after it would draw from these generators, and a resumed run would then differ from an
    uninterrupted one.
    """
    torch.manual_seed(seed + distributed.rank())
    if states is not None:
        set_rng_state(states)


def save(folder: Path, step: int, state: dict, keep: int = 3) -> Path:
    """Write `folder`/step_0001000.pt, or a folder step_0001000 if the state has sharded tensors. It gets its name when
    it is complete; then all but the newest `keep` (1 or more) are deleted. Every process must call this."""
    if keep < 1:
        raise ValueError(f"--keep_checkpoints is {keep}, expected 1 or more")
    state = {name: dict(value) if isinstance(value, State) else value for name, value in state.items()}  # plain values
    rng = distributed.gather(rng_state())
    state, shards = fsdp.split({"format": FORMAT, "step": step, "rng": rng, **state})
    suffix = "" if shards else ".pt"
    path = folder / f"step_{step:07d}{suffix}"
    partial = path.with_suffix(".partial")
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.partial"):  # left by a save that was killed
            remove(left)
    if shards:
        distributed.barrier()
        fsdp.write(partial, shards)
    if distributed.is_main():
        with writing(partial / "state.pt" if shards else partial, path) as file:
            torch.save(state, file)
        rename(partial, path)
        others = [other for other in list_checkpoints(folder) if other != path]
        for old in others[: max(len(others) - keep + 1, 0)]:
            remove(old)
    distributed.barrier()
    return path


def save_run(folder: Path, step: int, args: Namespace, parts: dict[str, Any], listed: dict, **facts) -> None:
    """Save a run to `folder`/checkpoints: the states of its parts, its position in the data and its flags.

    parts: as in `restore`. listed: identifies the data, from `training_files`. facts: further entries to save.
    """
    data = {"position": step * args.batch_size, **listed}
    save(folder / "checkpoints", step, {**facts, **state_dicts(parts), "data": data, "args": vars(args)},
         args.keep_checkpoints)


def state_dicts(parts: dict[str, Any]) -> dict:
    """The state dict of each model, optimizer, ..., by name. The name "ema/DECAY" is entry DECAY of the dict "ema"."""
    states: dict[str, Any] = {}
    for name, part in parts.items():
        group, _, name = name.rpartition("/")
        inner = states.setdefault(group, {}) if group else states
        inner[name] = part.state_dict()
    return states


def mark_best(folder: Path, step: int) -> None:
    """Also keep the checkpoint of `step` as best.pt, or as the folder best. Does nothing if `folder` has no checkpoint
    of that step, as at the start of a run that resumed from another folder."""
    path = next((path for path in list_checkpoints(folder) if step_of(path) == step), None)
    if path is None or not distributed.is_main():
        return
    best, link = folder / f"best{path.suffix}", folder / "best.partial"
    remove(link)  # left by a process that was killed
    if path.is_dir():
        shutil.copytree(path, link, copy_function=link_file)
    elif not (best.exists() and best.samefile(path)):  # os.replace does nothing between two links to one file
        link_file(path, link)
    if link.exists():
        rename(link, best)


def link_file(path: str | Path, link: str | Path) -> None:
    """Hard-link a file, which saves writing many GB again; copy it where the file system has no links."""
    try:
        os.link(path, link)
    except OSError:
        shutil.copyfile(path, link)


def rename(partial: Path, path: Path) -> None:
    """Give a complete checkpoint its name, replacing what has it."""
    if partial.is_dir() and path.exists():
        remove(path)
    os.replace(partial, path)


def remove(path: Path) -> None:
    """Delete a checkpoint. A folder is renamed first, so that a kill leaves no incomplete one under its name."""
    if path.is_dir():
        unnamed = path.with_suffix(".old.partial")
        os.replace(path, unnamed)
        shutil.rmtree(unnamed)
    else:
        path.unlink(missing_ok=True)


def step_of(path: Path) -> int:
    return int(NAME.sub(r"\1", path.name))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, sorted by step (as numbers: a name may have any number of digits)."""
    return sorted((path for path in folder.glob("step_*") if NAME.fullmatch(path.name)), key=step_of)


def is_sharded(path: Path) -> bool:
    return (path / "state.pt").is_file()


def load(path: str | Path, mmap: bool = False) -> "State":
    """Read a checkpoint of this project onto the CPU. path: a checkpoint, an export, or a folder of checkpoints, of
    which the newest undamaged one is read.

    Sharded tensors are not read: entry "shards" is their folder, for `fsdp.fill` and `select_weights`.
    mmap: leave tensors in the file until they are used, and skip the check for damage.
    Raises FileNotFoundError, DamagedFile, ValueError for a file that is not ours or of another version, and OSError
    where the system cannot read it, which does not mean that it is damaged.
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
            fsdp.verify(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        if path.is_dir():
            fsdp.check(path)
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
            if isinstance(weights, dict):  # otherwise `restore` raises the error
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
    """The content of a checkpoint. A missing key raises DamagedFile. path: the checkpoint's, for messages."""

    def __init__(self, content: dict, path: Path):
        super().__init__(content)
        self.path = path

    def __reduce__(self):
        """Pickles as an OrderedDict, which `torch.load(weights_only=True)` accepts."""
        return OrderedDict, (list(self.items()),)

    def __missing__(self, key: str):
        raise DamagedFile(f"{self.path} has no {key!r}, but {', '.join(map(str, list(self)[:12])) or 'nothing'}: it is "
                          "of another model or version, or damaged; give another checkpoint")


def restore(parts: dict[str, Any], state: State) -> None:
    """Load the states in a checkpoint into the models, optimizers, ... of the same names. Raises DamagedFile."""
    for name, part in parts.items():
        content = select_weights(state, name.replace("/", "_")) if name.startswith("ema/") else state[name]
        with reading(state.path, "the state of this run", f"its {name} does not fit the flags, or is damaged"):
            if isinstance(part, nn.Module):
                load_state(part, content, state.path)
            else:
                part.load_state_dict(content)
            if isinstance(part, torch.optim.Optimizer):
                check_moments(part)


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """ValueError where what was loaded into Adam does not fit its parameters, which torch finds at the first step."""
    for parameter, state in optimizer.state.items():
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        if shapes != (expected := {"step": (), **dict.fromkeys(("exp_avg", "exp_avg_sq"), tuple(parameter.shape))}):
            raise ValueError(f"it holds {shapes} for a parameter that needs {expected}")


def resume(parts: dict[str, Any], state: State | None, best: float = 0.0) -> tuple[int, list[dict] | None, float, Any]:
    """Load the parts from the checkpoint that a run continues, if there is one. Returns its step, its random number
    generators, its best score and its data; without a checkpoint 0, None, `best` and None."""
    if state is None:
        return 0, None, best, None
    restore(parts, state)
    return state["step"], state["rng"], state.get("best", best), state["data"]


def is_ours(path: str | Path) -> bool:
    """Whether `path` is a checkpoint of this project, and not a file that a paper's authors released."""
    if is_export(Path(path)):
        return True
    try:
        load(path, mmap=True)
    except ValueError:
        return False
    return True


def newest(folder: Path) -> State | None:
    """The newest undamaged checkpoint in `folder`; None if it holds none. Raises DamagedFile if all are damaged, and
    the other errors of `load`."""
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


def expect(state: State, kind: str, source: str | Path) -> State:
    """Return `state`, which was read from `source`. Raises ValueError if another script wrote it."""
    if state.get("kind") != kind:
        raise ValueError(f"{source} holds a {state.get('kind')} model, expected a {kind} checkpoint")
    return state


def find(folder: Path, resume: str | None, kind: str) -> State | None:
    """The checkpoint that a run in `folder` resumes from: the newest undamaged one there (resume="auto"), the one at
    path `resume`, or None for a new run. kind: of the checkpoints that the script writes.

    Raises ValueError for a checkpoint of another kind, and if a new run would overwrite those of another.
    """
    if resume == "auto":
        state = newest(folder)
        return state and expect(state, kind, folder)
    if resume is not None:
        return expect(load(resume), kind, f"--resume {resume}")
    if there := list_checkpoints(folder):
        raise ValueError(
            f"{folder} already holds {there[-1].name}: continue it with --resume auto, or choose another --exp_name"
        )
    return None


def select_weights(state: dict, version: str = "sd") -> dict[str, Tensor]:
    """A checkpoint's live weights ("sd") or their moving average ("ema", or "ema_DECAY" if it holds several)."""
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
    path = "model" if version == "sd" else version.replace("_", "/", 1)  # ema_0.9 is stored as ema/0.9
    return found[version] | fsdp.read_whole(state["shards"], f"{path}/")


# The entries that an export needs besides its architecture, by kind of model. LARP's models are not listed: their
# exports have the released layout, which from_pretrained reads.
EXPORTED = {
    "coordtok": (),
    "sit": ("interpolant", "statistics", "classes", "tokenizer", "args"),
}


def export(state: dict, folder: Path, version: str | None = None) -> None:
    """Write the weights alone, as `folder`/model.safetensors and config.json, which `load` reads.

    version: as in `select_weights`; None exports the moving average of a SiT and the live weights of other models.
    """
    kind = state.get("kind")
    weights = select_weights(state, version or ("ema" if kind == "sit" else "sd"))
    config = state["config"]
    if kind in EXPORTED:
        config = {"kind": kind, "config": config, **{name: state[name] for name in EXPORTED[kind]}}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "model.safetensors") as file:
        file.write(serialize({name: tensor.contiguous() for name, tensor in weights.items()}))
    with atomic_write(folder / "config.json", "w") as file:
        file.write(json.dumps(config, indent=2, default=as_plain) + "\n")


def as_plain(value) -> list | str:
    """JSON's form of a tensor (a list of numbers) or a path (text)."""
    return value.tolist() if isinstance(value, Tensor) else str(value)


def is_export(path: Path) -> bool:
    return all((path / name).is_file() for name in PRETRAINED)


def load_export(folder: Path) -> State:
    """Read an export of a CoordTok or a SiT as a checkpoint whose "model" and "ema" are both the exported weights.
    Raises ValueError if the files are damaged or hold something else."""
    config, weights, path = read_pretrained(folder)
    kind = config.get("kind") if isinstance(config, dict) else None
    if kind not in EXPORTED:
        raise ValueError(f"{folder / 'config.json'} is not of an exported {' or '.join(EXPORTED)}: kind {kind!r}")
    if missing := [name for name in ("config", *EXPORTED[kind]) if name not in config]:
        raise ValueError(f"{folder / 'config.json'} is damaged: it lacks {', '.join(missing)}")
    check_finite(weights, path)
    if kind == "sit":
        with reading(folder / "config.json", "a SiT", "fetch it again"):
            config["statistics"] = {name: torch.tensor(values) for name, values in config["statistics"].items()}
    return typed({"format": FORMAT, **config, "model": weights, "ema": weights}, folder)


def main() -> None:
    parser = ArgumentParser(
        prog="python -m training.checkpoint",
        description="Export a checkpoint's weights to safetensors and config.json, a folder that all scripts take.",
    )
    parser.add_argument("checkpoint", help="checkpoint, or a folder of them (the newest)")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", metavar="sd|ema|ema_DECAY",
                        help="live weights, or an average (default: ema of a SiT, else sd)")
    args = parser.parse_args()
    from common.cli import one_line_errors

    with one_line_errors():
        export(load(args.checkpoint), args.folder, args.version)


if __name__ == "__main__":
    main()
