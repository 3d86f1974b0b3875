"""Frozen tokenizers by the path of their checkpoint, ours or the authors', and batches of clips as they take them."""
import argparse
import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from data.video import to_video
from models.coordtok import CoordTok, CoordTokConfig, released_padding
from models.larp_tokenizer import LARPTokenizer
from training import checkpoint
from training.arguments import coordtok_config


def load_coordtok(path: str, args: argparse.Namespace) -> CoordTok:
    """CoordTok on the CPU. Ours carry their architecture; the authors' take it from the flags."""
    if not checkpoint.is_ours(path):
        return CoordTok.from_released(path, **coordtok_config(args))
    state = checkpoint.load(path)
    if state.get("kind") != "coordtok":
        raise ValueError(f"{path} holds a {state.get('kind')} model, expected a coordtok checkpoint")
    tokenizer = CoordTok(**coordtok_config(args, state["config"], path))
    tokenizer.load_state_dict(state["model"])
    return tokenizer


def load_larp_tokenizer(source: str, version: str = "sd") -> LARPTokenizer:
    """A LARP tokenizer on the CPU, in evaluation mode.

    source: a folder with config.json and model.safetensors, a Hugging Face hub id, a checkpoint of ours or a folder of
    them, or a file of the authors' trainer. version: the live weights "sd", or "ema_DECAY" of a checkpoint that has it.
    """
    if version != "sd" and not version.startswith("ema_"):
        raise ValueError(f"--version is sd or ema_DECAY, got {version!r}")
    path = Path(source)
    if not (path.is_file() or path.suffix in (".pt", ".pth") or any(path.glob("step_*.pt"))):
        if version != "sd":
            raise ValueError(f"{source} holds one set of weights, not {version!r}: leave --version out")
        return LARPTokenizer.from_pretrained(source)
    if path.is_file() and not checkpoint.is_ours(path):
        return LARPTokenizer.from_released_checkpoint(path, None if version == "sd" else version.removeprefix("ema_"))
    state = checkpoint.load(path)
    if state.get("kind") != "larp_tokenizer":
        raise ValueError(f"{source} holds a {state.get('kind')} model, expected a larp_tokenizer checkpoint")
    tokenizer = LARPTokenizer(**state["config"])
    tokenizer.load_state_dict(checkpoint.select_weights(state, version))
    return tokenizer.eval()


def coordtok_clips(batch: dict, config: CoordTokConfig, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """A loader's batch as CoordTok takes it: video (B, 3, T, H, W) in [0, 1] on `device`, and n_frames (B,).

    n_frames is None where no clip is short, so that attention needs no mask.
    """
    video = to_video(batch["frames"], config.video_shape[1], "coordtok", device)
    if (batch["n_frames"] >= config.video_shape[0]).all():
        return video, None
    n_frames = batch["n_frames"].to(device, non_blocking=True)
    return released_padding(video, n_frames) if config.padding == "released" else video, n_frames


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of a model's tensors with their names: the same for equal weights in whatever file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
