"""Loads trained models from our checkpoints or the authors' files; turns a loader's batch into CoordTok's input."""
import argparse
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from common.cli import check_carried
from data.video import to_video
from models.configs import SIT_SIZES
from models.coordtok import CoordTok, CoordTokConfig, released_padding
from models.hub import locate
from models.interpolant import Interpolant
from models.larp_ar import LARPGenerator
from models.larp_tokenizer import LARPTokenizer
from models.pretrained import read_sit_statistics, weights_sha256
from models.sit import SiT, sit_logs
from training.flags import SIT_FLAGS, merge
from training.latents import LatentStats

LARP = TypeVar("LARP", LARPTokenizer, LARPGenerator)


def load_coordtok(path: str, args: argparse.Namespace) -> CoordTok:
    """CoordTok on the CPU, in evaluation mode, from whatever `Pretrained.read` takes. Ours carry their architecture; an
    authors' file takes it from the flags."""
    stored = CoordTok.read(path)
    return CoordTok.from_stored(stored, merge(CoordTokConfig, args, stored.config, path))


def load_larp_tokenizer(source: str, version: str = "sd") -> LARPTokenizer:
    """A LARP tokenizer on the CPU, in evaluation mode.

    source: what `Pretrained.read` takes. version: the live weights "sd", or "ema_DECAY" of a checkpoint that has it.
    """
    return _load_larp(LARPTokenizer, source, version)


class TrainedLARP(NamedTuple):
    """A LARP generator, and what only our checkpoints record about it."""

    model: LARPGenerator
    tokenizer: str | None  # weights_sha256 of the tokenizer that it was trained on
    class_names: list[str]  # by label; empty where unknown
    num_cond_frames: int | None  # frames given to it; 0: class-conditional


def load_larp_ar(source: str, version: str = "sd") -> TrainedLARP:
    """A LARP generator on the CPU, in evaluation mode, from whatever `load_larp_tokenizer` takes."""
    model = _load_larp(LARPGenerator, source, version)
    facts = model.facts
    return TrainedLARP(model, facts.get("tokenizer"), facts.get("classes") or [], facts.get("num_cond_frames"))


def _load_larp(kind: type[LARP], source: str, version: str) -> LARP:
    if version != "sd" and not version.startswith("ema_"):
        raise ValueError(f"--version is sd or ema_DECAY, got {version!r}")
    return kind.from_pretrained(source, version=version)


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
    source = args.sit_model
    if Path(source).is_dir() and (path := locate(source)) and path.is_file():  # the authors' run folder
        source = path.with_name(f"{args.sit_ckpt_iter:07d}.pt")
    stored = SiT.read(source)
    given = {name: getattr(args, name) for name in SIT_FLAGS if hasattr(args, name)}
    facts, path = stored.facts, stored.path
    if stored.config is not None:
        held = facts["args"] or {}  # the authors', exported, name some
        for name, value in given.items():
            if name in held:
                check_carried(name, value, held[name], str(path))
        sit, interpolant = SiT.from_stored(stored), Interpolant(**facts["interpolant"] or {})
        if facts["tokenizer"] not in (None, weights_sha256(tokenizer)):
            raise ValueError(f"{path} was not trained on the tokenizer {args.first_model_ckpt}: --first_model_ckpt was "
                             f"{held['first_model_ckpt']} then")
    else:
        defaults = {name: options["default"] for name, options in SIT_FLAGS.items()}
        flags = argparse.Namespace(**{**defaults, **given})
        sit = SiT.from_stored(stored, sit_config(flags, tokenizer.config))
        interpolant = Interpolant(flags.path_type, flags.prediction, sample_eps=flags.sample_eps)
    statistics = facts.get("statistics")
    if args.sit_log or (stored.config is None and statistics is None):
        statistics = read_sit_statistics(Path(args.sit_log) if args.sit_log else sit_logs(path)[-1])
    if statistics is None:
        raise ValueError(f"{path} has no statistics of its latents: give --sit_log, the log.txt of its run")
    stats, names = LatentStats.from_state_dict(statistics), facts.get("classes") or []
    config = tokenizer.config
    made = (config.latent_resolution_t, config.latent_resolution_xy), config.latent_n_features
    if (sit.config.input_size, sit.config.in_channels) != made or len(stats.mean.xy) != made[1]:
        raise ValueError(f"{path} has planes of {sit.config.input_size} with {sit.config.in_channels} channels, and "
                         f"statistics of {len(stats.mean.xy)}; the tokenizer {args.first_model_ckpt} has planes of "
                         f"{made[0]} with {made[1]}: they belong to different runs")
    return TrainedSiT(sit.eval().requires_grad_(False), interpolant, stats, names)

