"""Checkpoints: dicts of plain values and tensors, written whole or not at all."""
import argparse
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from training import distributed

FORMAT = 1


def rng_state() -> dict:
    """The generators' states of this process."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(states: list[dict]) -> None:
    """Restore this process's generators; a process the saving run did not have keeps its fresh seed."""
    if distributed.rank() < len(states):
        state = states[distributed.rank()]
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


def save(folder: Path, step: int, state: dict, keep: int = 3, best: bool = False) -> Path:
    """Write `folder`/step_0001000.pt and drop all but the newest `keep`; every process must call it.

    The file appears under its name only when complete. `best` also keeps it as best.pt.
    """
    path = folder / f"step_{step:07d}.pt"
    rng = distributed.gather(rng_state())
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            torch.save({"format": FORMAT, "step": step, "rng": rng, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        if best:
            link = folder / "best.partial"
            link.unlink(missing_ok=True)
            try:
                os.link(path, link)  # no second write of a file of several GB
            except OSError:
                shutil.copyfile(path, link)
            os.replace(link, folder / "best.pt")
        for old in sorted(folder.glob("step_*.pt"))[:-keep]:
            old.unlink()
    distributed.barrier()
    return path


def load(path: str | Path, mmap: bool = False) -> dict:
    """A checkpoint of this project on the CPU; of a folder of them, the newest whole one.

    mmap: leave tensors in the file until they are used. Raises FileNotFoundError, or ValueError where it is not ours.
    """
    path = Path(path)
    if path.is_dir():
        state = newest(path)
        if state is None:
            raise FileNotFoundError(f"no checkpoint step_*.pt in {path}")
        return state
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        reason = (str(error) or "it is empty").splitlines()[0]
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path} is not a checkpoint of this project: it has no 'format' entry")
    if state["format"] != FORMAT:
        raise ValueError(f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}")
    return state


def is_ours(path: str | Path) -> bool:
    """Whether `path` is a checkpoint of this project, rather than a file the papers' authors released."""
    try:
        load(path, mmap=True)
    except ValueError:
        return False
    return True


def newest(folder: Path) -> dict | None:
    """The newest checkpoint in `folder` that can be read, or None."""
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        try:
            return load(path)
        except ValueError as error:
            warnings.warn(f"{error}; trying the checkpoint before it", stacklevel=2)
    return None


def find(folder: Path, resume: str | None) -> dict | None:
    """What a run in `folder` starts from: None (anew), the newest whole checkpoint (`auto`), or the one at a path."""
    if resume == "auto":
        return newest(folder)
    if resume is not None:
        return load(resume)
    written = sorted(folder.glob("step_*.pt"))
    if written:
        raise ValueError(
            f"{folder} already holds {written[-1].name}: continue it with --resume auto, or choose another --exp_name"
        )
    return None


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
    return found[version]


def export(state: dict, folder: Path, version: str = "sd") -> None:
    """Weights alone: `folder`/model.safetensors and config.json."""
    weights = select_weights(state, version)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(state["config"], indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a checkpoint's weights to safetensors and config.json.")
    parser.add_argument("checkpoint", help="checkpoint, or a folder of them (the newest)")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", default="sd", metavar="sd|ema|ema_DECAY", help="live weights, or an average")
    args = parser.parse_args()
    try:
        export(load(args.checkpoint), args.folder, args.version)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
