"""Trained models by the path of their checkpoint, ours or the authors', and batches of clips as CoordTok takes them."""
import argparse
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.video import to_video
from models.coordtok import CoordTok, CoordTokConfig, released_padding
from models.larp_ar import LARPGenerator
from models.larp_tokenizer import LARPTokenizer
from models.released import build, load_state
from training import checkpoint
from training.arguments import coordtok_config


def load_coordtok(path: str, args: argparse.Namespace) -> CoordTok:
    """CoordTok on the CPU. Ours carry their architecture; the authors' take it from the flags."""
    if not checkpoint.is_ours(path):
        return CoordTok.from_released(path, **coordtok_config(args))
    state = checkpoint.expect(checkpoint.load(path), "coordtok", path)
    tokenizer = build(CoordTok, coordtok_config(args, state["config"], path), state.path)
    load_state(tokenizer, state["model"], state.path)
    return tokenizer


def load_larp_tokenizer(source: str, version: str = "sd") -> LARPTokenizer:
    """A LARP tokenizer on the CPU, in evaluation mode.

    source: a folder with config.json and model.safetensors, a Hugging Face hub id, a checkpoint of ours or a folder of
    them, or a file of the authors' trainer. version: the live weights "sd", or "ema_DECAY" of a checkpoint that has it.
    """
    return _load_larp("larp_tokenizer", source, version)[0]


class TrainedLARP(NamedTuple):
    """A LARP generator with what only our checkpoints say of it."""

    model: LARPGenerator
    tokenizer: str | None  # weights_sha256 of the tokenizer that it was trained on
    class_names: list[str]  # by label; empty where unknown
    num_cond_frames: int | None  # frames given to it; 0: class-conditional


def load_larp_ar(source: str, version: str = "sd") -> TrainedLARP:
    """A LARP generator on the CPU, in evaluation mode, from whatever `load_larp_tokenizer` takes."""
    model, state = _load_larp("larp_ar", source, version)
    return TrainedLARP(model, state.get("tokenizer"), state.get("classes", []), state.get("num_cond_frames"))


def _load_larp(kind: str, source: str, version: str) -> tuple[LARPTokenizer | LARPGenerator, dict]:
    """The model, and the checkpoint it comes from: empty unless it is one of ours."""
    if version != "sd" and not version.startswith("ema_"):
        raise ValueError(f"--version is sd or ema_DECAY, got {version!r}")
    model_class = {"larp_tokenizer": LARPTokenizer, "larp_ar": LARPGenerator}[kind]
    path = Path(source)
    path = path / "checkpoints" if checkpoint.written(path / "checkpoints") else path  # a run's folder
    ours = checkpoint.is_sharded(path) or checkpoint.written(path)
    if not (ours or path.is_file() or path.suffix in (".pt", ".pth")):
        if version != "sd":
            raise ValueError(f"{source} holds one set of weights, not {version!r}: leave --version out")
        return model_class.from_pretrained(source), {}
    if path.is_file() and not checkpoint.is_ours(path):
        if kind == "larp_ar":
            return LARPGenerator.from_released(path, version), {}
        ema = None if version == "sd" else version.removeprefix("ema_")
        return LARPTokenizer.from_released_checkpoint(path, ema), {}
    state = checkpoint.expect(checkpoint.load(path), kind, source)
    model = build(model_class, state["config"], state.path)
    load_state(model, checkpoint.select_weights(state, version), state.path)
    return model.eval(), state


def coordtok_clips(batch: dict, config: CoordTokConfig, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """A loader's batch as CoordTok takes it: video (B, 3, T, H, W) in [0, 1] on `device`, and n_frames (B,).

    n_frames is None where no clip is short, so that attention needs no mask.
    """
    video = to_video(batch["frames"], config.video_shape[1], "coordtok", device)
    if (batch["n_frames"] >= config.video_shape[0]).all():
        return video, None
    n_frames = batch["n_frames"].to(device, non_blocking=True)
    return released_padding(video, n_frames) if config.padding == "released" else video, n_frames


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, `model` is on `device`; afterwards it is back where it was. A frozen tokenizer that waits on the CPU
    takes no memory of the GPU while it is not used."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of a model's tensors with their names: the same for equal weights in whatever file.

    A LARP tokenizer's prior does not count: neither codes nor clips depend on it, and released files lack it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith("prior_model."):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
