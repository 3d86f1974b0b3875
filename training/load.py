"""Loads trained models from our checkpoints or the authors' files; turns a loader's batch into CoordTok's input."""
import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.cli import check_carried
from data.video import to_video
from models.configs import SIT_SIZES
from models.coordtok import CoordTok, CoordTokConfig, released_padding
from models.interpolant import Interpolant
from models.larp_ar import LARPGenerator
from models.larp_tokenizer import LARPTokenizer
from models.pretrained import build, load_state, read_sit_statistics, weights_sha256
from models.sit import SiT
from training import checkpoint
from training.flags import SIT_FLAGS, merge
from training.latents import LatentStats


def load_coordtok(path: str, args: argparse.Namespace) -> CoordTok:
    """CoordTok on the CPU. Our checkpoints hold its architecture; for the authors' files the flags give it."""
    if not checkpoint.is_ours(path):
        return CoordTok.from_released(path, **merge(CoordTokConfig, args))
    state = checkpoint.expect(checkpoint.load(path), "coordtok", path)
    tokenizer = build(CoordTok, merge(CoordTokConfig, args, state["config"], path), state.path)
    load_state(tokenizer, state["model"], state.path)
    return tokenizer


def load_larp_tokenizer(source: str, version: str = "sd") -> LARPTokenizer:
    """A LARP tokenizer on the CPU, in evaluation mode.

    source: a folder with config.json and model.safetensors, a Hugging Face hub id, a checkpoint of ours or a folder of
    them, or a file of the authors' trainer. version: the live weights "sd", or "ema_DECAY" of a checkpoint that has it.
    """
    return _load_larp("larp_tokenizer", source, version)[0]


class TrainedLARP(NamedTuple):
    """A LARP generator, and what only our checkpoints record about it."""

    model: LARPGenerator
    tokenizer: str | None  # weights_sha256 of the tokenizer that it was trained on
    class_names: list[str]  # by label; empty where unknown
    num_cond_frames: int | None  # frames given to it; 0: class-conditional


def load_larp_ar(source: str, version: str = "sd") -> TrainedLARP:
    """A LARP generator on the CPU, in evaluation mode, from whatever `load_larp_tokenizer` takes."""
    model, state = _load_larp("larp_ar", source, version)
    return TrainedLARP(model, state.get("tokenizer"), state.get("classes", []), state.get("num_cond_frames"))


def _load_larp(kind: str, source: str, version: str) -> tuple[Any, dict]:
    """The model and its checkpoint, which is an empty dict unless it is one of ours."""
    if version != "sd" and not version.startswith("ema_"):
        raise ValueError(f"--version is sd or ema_DECAY, got {version!r}")
    model_class: Any = {"larp_tokenizer": LARPTokenizer, "larp_ar": LARPGenerator}[kind]
    path = Path(source)
    path = path / "checkpoints" if checkpoint.list_checkpoints(path / "checkpoints") else path  # a run's folder
    ours = checkpoint.is_sharded(path) or checkpoint.list_checkpoints(path)
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


def check_tokenizer(state: dict, sha256: str, folder: Path, args: argparse.Namespace, flag: str) -> None:
    """Raise ValueError if the run in `folder` was trained on another tokenizer than the one that --`flag` names.

    state: the run's checkpoint. sha256: `weights_sha256` of the tokenizer given now.
    """
    if state["tokenizer"] != sha256:
        raise ValueError(f"the run in {folder} was trained on another tokenizer than {getattr(args, flag)}: give "
                         f"{state['args'][flag]}, the one that it names, at its present path")


def coordtok_clips(batch: dict, config: CoordTokConfig, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """CoordTok's input from a loader's batch: video (B, 3, T, H, W) in [0, 1] on `device`, and n_frames (B,).

    n_frames is None if no clip is short, since attention without a mask is faster.
    """
    video = to_video(batch["frames"], config.video_shape[1], "coordtok", device)
    if (batch["n_frames"] >= config.video_shape[0]).all():
        return video, None
    n_frames = batch["n_frames"].to(device, non_blocking=True)
    return released_padding(video, n_frames) if config.padding == "released" else video, n_frames


# --- SiT ---

class TrainedSiT(NamedTuple):
    model: SiT
    interpolant: Interpolant
    stats: LatentStats
    class_names: list[str]  # by label; empty where unknown


def sit_config(args: argparse.Namespace, config: CoordTokConfig) -> dict:
    """The configuration of a SiT on the planes of a CoordTok of this `config`, as the flags of `add_sit` say."""
    return {
        **SIT_SIZES[args.model], "input_size": (config.latent_resolution_t, config.latent_resolution_xy),
        "in_channels": config.latent_n_features, "num_classes": args.num_classes,
        "class_dropout_prob": args.class_dropout_prob,
    }


def load_sit(args: argparse.Namespace, tokenizer: CoordTok) -> TrainedSiT:
    """The EMA weights of args.sit_model on the CPU, in evaluation mode.

    Raises ValueError if it was trained on another tokenizer, or on planes of other sizes.
    """
    path = Path(args.sit_model)
    path = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if path.is_dir() and not checkpoint.is_export(path) and not list(path.glob("step_*.pt")):
        path = path / f"{args.sit_ckpt_iter:07d}.pt"
    given = {name: getattr(args, name) for name in SIT_FLAGS if hasattr(args, name)}
    if path.exists() and checkpoint.is_ours(path):
        state = checkpoint.expect(checkpoint.load(path), "sit", f"--sit_model {path}")
        for name, value in given.items():
            check_carried(name, value, state["args"][name], str(path))
        sit, interpolant = build(SiT, state["config"], state.path), Interpolant(**state["interpolant"])
        load_state(sit, state["ema"], state.path)
        stats, names = LatentStats.from_state_dict(state["statistics"]), state["classes"]
        if state["tokenizer"] != weights_sha256(tokenizer):
            raise ValueError(f"{path} was not trained on the tokenizer {args.first_model_ckpt}: --first_model_ckpt was "
                             f"{state['args']['first_model_ckpt']} then")
    else:
        defaults = {name: options["default"] for name, options in SIT_FLAGS.items()}
        flags = argparse.Namespace(**{**defaults, **given})
        sit = SiT.from_released(path, **sit_config(flags, tokenizer.config))
        interpolant = Interpolant(flags.path_type, flags.prediction, sample_eps=flags.sample_eps)
        beside = [path.with_name("log.txt"), path.parent.with_name("log.txt")]
        logs = [Path(args.sit_log)] if args.sit_log else [log for log in beside if log.is_file()] or beside
        stats, names = LatentStats.from_state_dict(read_sit_statistics(logs[0])), []
    config = tokenizer.config
    made = (config.latent_resolution_t, config.latent_resolution_xy), config.latent_n_features
    if (sit.config.input_size, sit.config.in_channels) != made or len(stats.mean.xy) != made[1]:
        raise ValueError(f"{path} has planes of {sit.config.input_size} with {sit.config.in_channels} channels, and "
                         f"statistics of {len(stats.mean.xy)}; the tokenizer {args.first_model_ckpt} has planes of "
                         f"{made[0]} with {made[1]}: they belong to different runs")
    return TrainedSiT(sit.eval().requires_grad_(False), interpolant, stats, names)

