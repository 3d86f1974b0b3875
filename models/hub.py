"""One loader of models: `Pretrained` gives CoordTok, SiT, LARPTokenizer and LARPGenerator save_pretrained,
from_pretrained and push_to_hub."""
import contextlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi
from safetensors.torch import save as serialize
from torch import Tensor, nn
from typing_extensions import Self

from common.cli import check_carried
from common.files import atomic_write
from models.checkpoint_files import (
    EXPORTED,
    FACTS,
    State,
    expect,
    is_export,
    is_ours,
    is_sharded,
    kind_of_export,
    list_checkpoints,
    load,
    load_export,
    select_weights,
)
from models.configs import plain
from models.pretrained import FACTS_FILE, build, load_state, weights_sha256


class Stored(NamedTuple):
    """A model as its files hold it."""

    config: dict | None  # its architecture; None: an authors' file that does not say
    weights: dict[str, Tensor]
    facts: dict  # what else is known of it: see FACTS
    path: Path  # of the files, for messages


def locate(source: str | Path) -> Path | None:
    """The file or folder that names a model: an exported folder, a run's folder (its newest checkpoint), a folder of
    checkpoints, a checkpoint, or an authors' file. None: it can only be a hub id."""
    path = Path(source)
    if is_export(path) or is_sharded(path) or list_checkpoints(path):
        return path
    if list_checkpoints(path / "checkpoints"):
        return path / "checkpoints"
    # A run's folder of SiT's authors: checkpoints/0600000.pt beside log.txt.
    if numbered := sorted(path.glob("checkpoints/[0-9]*.pt")) or sorted(path.glob("[0-9]*.pt")):
        return numbered[-1]
    return path if path.is_file() or path.suffix in (".pt", ".pth") else None


def one_version(path: str | Path, version: str, held: str) -> None:
    """ValueError where another version is asked for of an authors' file that holds one set of weights."""
    if version != held:
        raise ValueError(f"{path} holds one set of weights, not {version!r}: leave --version out")


class Pretrained(nn.Module):
    """Base class of the models. A class states its `kind` and how an authors' file is read."""

    config: Any  # a dataclass

    kind: str  # of its checkpoints
    default_version = "sd"  # the weights that are sampled from
    behind: dict[str, str] | None = None  # flags behind a tensor's shape, see `load_state`
    facts: Mapping[str, Any] = {}  # what else is known of these weights: FACTS

    @staticmethod
    def read_authors(path: Path, version: str) -> tuple[dict | None, dict[str, Tensor], dict]:
        """(configuration, weights, facts) of an authors' file."""
        raise NotImplementedError

    @classmethod
    def read(cls, source: str | Path, version: str | None = None, **hub: Any) -> Stored:
        """What the files named by `source` hold of such a model, on the CPU.

        source: a Hugging Face hub id, a folder that save_pretrained or `python -m training.checkpoint` wrote, a run's
            folder, a folder of checkpoints, a checkpoint, or an authors' file.
        version: of a checkpoint's weights: "sd" the live ones, "ema" or "ema_DECAY" an average. None: those that are
            sampled from.
        hub: revision, cache_dir, token, local_files_only, ... as huggingface_hub.snapshot_download takes them.
        Raises ValueError and OSError, in one line.
        """
        path = locate(source)
        if path is not None and path.is_file() and not is_ours(path):
            return Stored(*cls.read_authors(path, version or cls.default_version), path)
        state: State = load_export(source, **hub) if path is None else load(path)
        expect(state, cls.kind, source)
        exported = path is None or is_export(path)
        if exported and version not in (None, "sd", cls.default_version):
            one_version(source, version, "sd")
        weights = state["model"] if exported else select_weights(state, version or cls.default_version)
        facts = State({name: state[name] for name in FACTS if name in state}, state.path)
        return Stored(state["config"], weights, facts, state.path)

    @classmethod
    def from_stored(cls, stored: Stored, config: dict | None = None) -> Self:
        """The model, on the CPU and in evaluation mode. config: the architecture where the files do not say."""
        weights, where = stored.path, stored.path
        if is_export(where):
            weights, where = where / "model.safetensors", where / "config.json"
        model = cls.construct(config or {}, None) if stored.config is None else cls.construct(stored.config, where)
        model.load_weights(stored.weights, weights)
        model.facts = dict(stored.facts)
        return model.eval()

    @classmethod
    def construct(cls, config: dict, path: Path | None) -> Self:
        """An untrained model. path: the file of the configuration; None: it is given by the user."""
        return build(cls, config, path)

    def load_weights(self, weights: Mapping[str, Tensor], source: str | Path) -> None:
        """Load tensors under their released names; `source` is for the error."""
        load_state(self, weights, source, self.behind)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, version: str | None = None, config: dict | None = None,
        map_location: str | torch.device = "cpu", **hub: Any,
    ) -> Self:
        """A trained model in evaluation mode; source, version, hub and errors as for `read`.

        config: the architecture of an authors' file that does not carry it, where it is not that of the published
        model. Where the files carry it, another value is a ValueError.
        """
        stored = cls.read(pretrained_model_name_or_path, version, **hub)
        if stored.config is not None:
            for name, value in (config or {}).items():
                given, held = (list(v) if isinstance(v, tuple) else v for v in (value, stored.config.get(name)))
                check_carried(name, given, held, str(stored.path))
        return cls.from_stored(stored, config).to(map_location)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and the model card README.md, which from_pretrained and every flag that
        names a model take."""
        write_pretrained(Path(folder), self.kind, plain(self.config), self.state_dict(), self.facts)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None,
        endpoint: str | None = None, commit_message: str = "Add the model",
    ) -> None:
        """Upload what save_pretrained writes to the Hugging Face hub, whose repository is made where there is none."""
        api = HfApi(endpoint=endpoint, token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)


def write_pretrained(
    folder: Path, kind: str | None, config: dict, weights: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> list[Path]:
    """Write a model's folder (see `Pretrained.save_pretrained`) and return the paths of its files. Reports of other
    weights than these are left out. Raises ValueError as `check_folder` does."""
    check_folder(folder, kind)
    facts = {name: facts[name] for name in FACTS if name in facts}
    sha256 = weights_sha256(weights)
    facts["reports"] = [report for report in facts.get("reports") or [] if is_of(report, sha256)]
    content = {"config.json": config, **({FACTS_FILE: facts} if any(facts.values()) else {})}
    if kind in EXPORTED:
        content = {"config.json": {"kind": kind, "config": config, **dict.fromkeys(EXPORTED[kind]), **facts}}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "model.safetensors") as file:
        file.write(serialize({name: tensor.contiguous() for name, tensor in weights.items()}, {"format": "pt"}))
    for name, value in content.items():
        with atomic_write(folder / name, "w") as file:
            file.write(json.dumps(value, indent=2, default=as_plain) + "\n")
    if FACTS_FILE not in content:
        (folder / FACTS_FILE).unlink(missing_ok=True)  # of our earlier export
    names = ["model.safetensors", *content]
    if kind in CARDS:
        with atomic_write(folder / "README.md", "w") as file:
            file.write(model_card(kind, config, weights, facts))
        names.append("README.md")
    return [folder / name for name in names]


def check_folder(folder: Path, kind: str | None) -> None:
    """ValueError where a model of this kind would hide a run's checkpoints in `folder`, or replace a file that is not
    of an earlier export of its kind."""
    if (folder / "checkpoints").is_dir() or list_checkpoints(folder):
        raise ValueError(f"{folder} is a run's folder, whose checkpoints an export would hide: export to another one")
    held = None
    for name in ("config.json", FACTS_FILE, "model.safetensors", "README.md"):
        if not (path := folder / name).exists():
            continue
        text = path.read_text(encoding="utf-8", errors="replace") if path.suffix in (".json", ".md") else ""
        content: Any = None
        if path.suffix == ".json":
            with contextlib.suppress(ValueError):
                content = json.loads(text)
        if name == "config.json":
            held = kind_of_export(content) if isinstance(content, dict) else None
        ours = held is not None
        if name == FACTS_FILE:
            ours = ours and isinstance(content, dict) and content.keys() <= {*FACTS}
        elif name == "README.md":
            ours = CARD_MARK in text
        if not ours or held not in (None, kind):
            what = f"of an exported {held} model" if ours and held else "not of an earlier export"
            raise ValueError(f"{path} is {what}, and would be lost: export to another folder, or move it away")


def as_plain(value) -> list | str:
    """What JSON lacks: tensors as lists of numbers, and paths as text."""
    return value.tolist() if isinstance(value, Tensor) else str(value)


def is_of(report: dict, sha256: str) -> bool:
    """Whether a report's numbers were measured of the weights with this SHA-256, which its record begins."""
    return str(report["record"].get("model")).split(" ")[-1] == sha256[:12]


# --- the model card ---
CARD_MARK = '.from_pretrained("FOLDER_OR_HUB_ID")'  # every card has it
CARDS = {  # kind: (what it is, tags, class, lines that use `model`)
    "coordtok": (
        "A CoordTok video tokenizer ([arXiv 2411.14762](https://arxiv.org/abs/2411.14762))", ["video-tokenizer"],
        "models.coordtok", "CoordTok",
        "planes = model.encode(video)  # (B, 3, T, H, W) in [0, 1] -> three planes\n"
        "video = model.render(planes).clamp(0, 1)",
    ),
    "sit": (
        "A SiT ([arXiv 2401.08740](https://arxiv.org/abs/2401.08740)) that generates the planes of a CoordTok, in its "
        "averaged weights", ["video-generation"], "models.sit", "SiT",
        "# python sample.py --sit_model FOLDER_OR_HUB_ID --first_model_ckpt ITS_TOKENIZER makes videos\n"
        "velocity = model(planes, t, y)  # noisy planes, channels first, (B,) times and labels",
    ),
    "larp_tokenizer": (
        "A LARP video tokenizer ([arXiv 2410.21264](https://arxiv.org/abs/2410.21264))", ["video-tokenizer", "larp"],
        "models.larp_tokenizer", "LARPTokenizer",
        "codes = model.encode(video)  # (B, 3, T, H, W) in [0, 1] -> (B, N) long\n"
        "video = model.decode(codes).clamp(0, 1)",
    ),
    "larp_ar": (
        "A LARP generator of video codes ([arXiv 2410.21264](https://arxiv.org/abs/2410.21264))",
        ["video-generation", "larp"], "models.larp_ar", "LARPGenerator",
        "codes = model.generate(cond, seeds=range(len(cond)))  # (B,) labels, or codes of the frames given -> (B, N)",
    ),
}


def model_card(kind: str, config: dict, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """The model card: what it is, how it is loaded, its numbers with their protocol, training and architecture."""
    what, tags, module, name, use = CARDS[kind]
    number = sum(tensor.numel() for tensor in weights.values())
    text = ["---", "library_name: pytorch", "tags:", *(f"- {tag}" for tag in tags), "---", f"{what}; {number:,} "
            "values in `model.safetensors`.", "", "```python", f"from {module} import {name}", "",
            f"model = {name}{CARD_MARK}", use, "```"]
    if facts.get("tokenizer"):
        text += ["", f"Its tokenizer's weights have SHA-256 `{facts['tokenizer']}`."]
    if facts.get("classes"):
        text += ["", f"Classes, by label: {', '.join(facts['classes'])}."]
    for report in facts["reports"]:
        record = report["record"]
        text += ["", f"## Numbers under {record['title']}", "", f"{record['description']}. "
                 f"{record['num_real']} real and {record['num_generated']} generated clips.", "", "| | |", "|---|---|"]
        numbers = {key: value for key, value in report["results"].items() if isinstance(value, int | float)}
        text += [f"| {key} | {value:.6g} |" for key, value in numbers.items()]
        text += ["", *block("The protocol record", record)]
    if not facts["reports"]:
        text += ["", "No numbers are known of these weights."]
    if facts.get("args"):
        step = f", {facts['step']:,} steps" if "step" in facts else ""
        text += ["", *block(f"Training arguments{step}", facts["args"])]
    return "\n".join([*text, "", *block("Architecture", config), ""])


def block(title: str, content: Mapping[str, Any]) -> list[str]:
    lines = json.dumps(content, indent=1, default=as_plain).split("\n")
    return [f"<details><summary>{title}</summary>", "", "```json", *lines, "```", "</details>"]
