"""What step 2 of CoordTok's training needs beside step 1: its checkpoint and the perceptual loss."""
from argparse import Namespace
from pathlib import Path

from data.patch_sampling import count_frames
from models.configs import CoordTokConfig
from models.lpips import FrameDistance
from models.stlpips import perceptual_metric
from training import checkpoint
from training.flags import merge
from training.load import load_coordtok


def starting_weights(args: Namespace) -> str | None:
    """The model whose weights a new run starts from; None: fresh ones. ValueError where step 2 has none."""
    source = args.first_step_ckpt or args.init_from
    if args.is_second_step and source is None:
        raise ValueError("--is_second_step needs --first_step_ckpt, the checkpoint that step 1 wrote")
    return source


def perceptual_loss(args: Namespace, config: CoordTokConfig) -> FrameDistance | None:
    """The perceptual loss of step 2; None in step 1, and with --lpips_loss_scale 0. Raises ValueError or OSError where
    the flags do not fit the tokenizer of `config`, or weights are missing."""
    if not args.is_second_step:
        return None
    count_frames(args.point_per_vid, config.grid)
    if args.lpips_loss_scale == 0:
        return None
    return perceptual_metric(args.perceptual, weights=args.lpips_weights, dropout=args.lpips_dropout)


def check(args: Namespace) -> None:
    """--check: raise what step 2 would, before step 1 has made its checkpoint."""
    first = Path(args.first_step_ckpt or "")
    options = merge(CoordTokConfig, args)
    there = first.is_file() or checkpoint.list_checkpoints(first)
    perceptual_loss(args, load_coordtok(str(first), args).config if there else CoordTokConfig(**options))
