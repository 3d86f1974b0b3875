"""Frozen tokenizers by the path of their checkpoint, ours or the authors', and batches of clips as they take them."""
import argparse
import hashlib

import torch
from torch import Tensor, nn

from data.video import to_video
from models.coordtok import CoordTok, CoordTokConfig, released_padding
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
