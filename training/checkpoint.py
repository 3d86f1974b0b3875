"""Checkpoints: dicts of plain values and tensors, written whole or not at all. One with sharded tensors is a folder:
state.pt holds the dict without them, and each process writes its share of them to a file of its own. What reads them is
models/checkpoint_files.py."""
import contextlib
import json
import os
import shutil
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import distributed
from common.errors import ArgumentParser, reading
from common.files import writing
from models.checkpoint_files import (
    FORMAT,
    State,
    expect,
    is_ours,
    list_checkpoints,
    load,
    load_export,
    newest,
    select_weights,
    step_of,
)
from models.coordtok import CoordTok
from models.hub import Pretrained, is_of, locate, write_pretrained
from models.larp_ar import LARPGenerator
from models.larp_tokenizer import LARPTokenizer
from models.pretrained import load_state, read_released, weights_sha256
from models.sit import SiT
from training import fsdp


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


def find(folder: Path, resume: str | None, kind: str) -> dict | None:
    """What a run in `folder` starts from: None (anew), the newest whole checkpoint (`auto`), or the one at a path.
    kind: that the script writes and goes on from."""
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


# --- export ---
MODELS: dict[str, type[Pretrained]] = {each.kind: each for each in (CoordTok, SiT, LARPTokenizer, LARPGenerator)}


def export(state: dict, folder: Path, version: str | None = None, reports: list[dict] | None = None) -> list[Path]:
    """Write a checkpoint's weights alone, without what training needs, as `Pretrained.save_pretrained` does. Returns
    the paths of the files.

    version: as `select_weights` takes it; None: those that are sampled from, a SiT's average and else the live ones.
    reports: numbers with their records, as `eval.report.read_record` gives them. ValueError for those of other weights.
    """
    kind = state.get("kind")
    weights = select_weights(state, version or ("ema" if kind == "sit" else "sd"))
    if reports:
        sha256 = weights_sha256(weights)
        for report in reports:
            if not is_of(report, sha256):
                raise ValueError(f"a report is of {report['record'].get('model')}, not of these weights "
                                 f"({sha256[:12]}): leave it out")
    return write_pretrained(folder, kind, state["config"], weights,
                            {**state, "reports": [*(state.get("reports") or []), *(reports or [])]})


def kind_of_authors(path: Path) -> str:
    """The kind of model in an authors' file."""
    content = read_released(path, "model")
    inner = content["model"]
    if "sd" in inner:
        return "larp_tokenizer" if "bottleneck" in inner["args"] else "larp_ar"
    return "sit" if "ema" in content else "coordtok"


def kind_of(source: str) -> str:
    """The kind of whatever `Pretrained.read` takes."""
    path = locate(source)
    if path is None:
        return load_export(source)["kind"]
    return load(path, mmap=True)["kind"] if not path.is_file() or is_ours(path) else kind_of_authors(path)


def read_any(source: str, version: str | None, config: dict) -> tuple[dict, str | None]:
    """Whatever `Pretrained.read` takes, as a checkpoint, and the version of its weights to take. config: architecture
    of an authors' CoordTok or SiT, where it is not the published one."""
    path = locate(source)
    if path is None:
        return load_export(source), version
    if not path.is_file() or is_ours(path):
        return load(path), version
    kind = MODELS[kind_of_authors(path)]
    model = kind.from_stored(kind.read(path, version), config)
    state = {"kind": kind.kind, "config": asdict(model.config), **model.facts, "model": model.state_dict()}
    return State(state, path), "sd"


def main() -> None:
    parser = ArgumentParser(
        prog="python -m training.checkpoint",
        description="Export a model to a folder of safetensors, config.json and a model card, which all scripts take.",
    )
    parser.add_argument("checkpoint", help="checkpoint, folder of them (the newest), run's folder, exported folder, "
                        "hub id, or an authors' file")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", metavar="sd|ema|ema_DECAY",
                        help="live weights, or an average (default: ema of a SiT, else sd)")
    parser.add_argument("--config", nargs="+", default=[], metavar="NAME=VALUE",
                        help="architecture of an authors' CoordTok or SiT file, where it is not the published one")
    parser.add_argument("--reports", nargs="+", type=Path, default=[], metavar="REPORT.json",
                        help="what evaluation and sampling have measured of it, for the model card")
    args = parser.parse_args()
    from common.cli import one_line_errors
    from eval.report import read_record

    with one_line_errors():
        config = dict(as_setting(text) for text in args.config)
        state, version = read_any(args.checkpoint, args.version, config)
        files = export(state, args.folder, version, [read_record(path) for path in args.reports])
        step = f" of step {state['step']}" if "step" in state else ""
        sizes = ", ".join(f"{path.name} ({path.stat().st_size / 1e6:.1f} MB)" for path in files)
        print(f"{args.folder}: {state['kind']}{step}: {sizes}")


def as_setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value a JSON one or else text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--config takes NAME=VALUE, got {text!r}")
    with contextlib.suppress(json.JSONDecodeError):
        value = json.loads(value)
    return name, value


if __name__ == "__main__":
    main()
