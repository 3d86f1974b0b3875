"""What is measured of the samples that sample.py makes, and the report of all of them."""
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common.console import print_main
from data.lists import class_names, find_lists
from eval import fvd
from eval.i3d import I3D
from eval.motion import motion_rows, motion_summary
from eval.pictures import contact_sheet, outline, strip_indices
from eval.protocols import Protocol
from eval.report import run_record
from sampling.generator import Generator
from sampling.real_clips import RealVideos
from sampling.store import SampleStore


def clip_features(i3d: I3D, protocol: Protocol, videos: Tensor) -> Tensor:
    """I3D's features (B, 400) of clips (B, 3, T, H, W) in [0, 1], as the protocol asks for them."""
    if protocol.num_cond_frames:  # frame prediction is compared at 64x64
        frames = rearrange(videos, "b c t h w -> (b t) c h w")
        frames = F.interpolate(frames, (protocol.size, protocol.size), mode="bilinear", antialias=True)
        videos = rearrange(frames, "(b t) c h w -> b c t h w", b=len(videos))
    return i3d(videos, resize=protocol.i3d_resize)


def feature_rows(i3d: I3D, protocol: Protocol, videos: Tensor, real: Tensor | None,
                 rows: list[int]) -> dict[str, Tensor]:
    """Features of a batch of samples ("fake") and of their real clips ("real"), (B, 400) each.

    rows: the samples that have a real clip. Their clips are the first of `real`; the features of the others are NaN.
    """
    fake = clip_features(i3d, protocol, videos)
    found = torch.full_like(fake, math.nan)
    if real is not None and rows:
        found[rows] = clip_features(i3d, protocol, real[: len(rows)])
    return {"fake": fake, "real": found}


def motion_of_both(videos: Tensor, real: Tensor | None, rows: list[int], chosen: list[bool],
                   patch: tuple[int, int, int] | None) -> dict[str, Tensor]:
    """The motion metrics of a batch of samples, and under NAME_real those of their real clips, (B,) each.

    real, rows: as `feature_rows` takes them. chosen: which samples are measured. patch: the blocks they consist of.
    """
    beside = torch.zeros_like(videos)
    if real is not None and rows:
        beside[rows] = real[: len(rows)]
    chosen_real = [is_chosen and row in rows for row, is_chosen in enumerate(chosen)]
    found = motion_rows(beside, chosen_real, patch=patch)
    return motion_rows(videos, chosen, patch=patch) | {f"{name}_real": value for name, value in found.items()}


def make_report(
    store: SampleStore, generator: Generator, protocol: Protocol, real_videos: RealVideos | None, i3d: I3D | None,
    settings: dict, args: Namespace, rows: dict[str, np.ndarray],
) -> tuple[dict, dict, dict | None]:
    """The record and the results of all samples, and their row in the table of results (None without FVD). Draws the
    contact sheet too.

    rows: the values of all samples, as `SampleStore.collect` returns them.
    """
    num_made, num_real = len(rows["index"]), 0
    means = ("nll", "bits_per_dim", "psnr_given")
    results: dict[str, Any] = {name: float(rows[name].mean()) for name in means if name in rows}
    if i3d:
        real, fake = torch.from_numpy(rows["real"]), torch.from_numpy(rows["fake"])
        real = real[real.isfinite().all(1)]
        num_real = len(real)
        results |= fvd.fvd_scores(real, fake, protocol.divisor)
        results |= motion_summary({name: torch.from_numpy(value) for name, value in rows.items()})
    if num_made < store.total:
        print_main(f"{store.total - num_made} samples are left out: their clips cannot be decoded (quarantine.txt)")
    name, split_seed = "none", None
    if real_videos:
        name, split_seed = real_videos.name, real_videos.split_seed
        is_list = args.dataset_csv and not name.startswith("null")
        name = "+".join(part.name for part in (find_lists(name) if is_list else [Path(name)]))
    facts = run_record(
        protocol, name, len(real_videos.files) if real_videos else 0, i3d, num_real=num_real, num_generated=num_made,
        num_frames=generator.num_frames, size=protocol.size if protocol.num_cond_frames else generator.size,
        num_cond_frames=generator.num_cond_frames, i3d_eps=args.i3d_eps,
        seed=args.seed if split_seed is None else split_seed,
        manifest_sha256=real_videos.manifest if real_videos else "none", sampler=generator.settings,
        model=generator.model,
    )
    draw_sheet(store, generator, real_videos, rows)
    row = {**generator.row, "num_samples": num_made, "NLL_sampled": results.get("nll"), "fvd": results.get("fvd"),
           "protocol": facts["title"]}
    return facts, results, {**settings, **row} if i3d else None


def draw_sheet(store: SampleStore, generator: Generator, real_videos: RealVideos | None,
               rows: dict[str, np.ndarray]) -> None:
    """Write sheet.png of the first samples, if any is kept: each below its real clip, with its number and class."""
    previews = store.previews()
    if not previews:
        return
    names = generator.class_names or (class_names(real_videos.files) if real_videos and generator.num_labels else [])
    label_of = dict(zip(rows["index"].tolist(), rows["label"].tolist()))
    named = {label: f": {name}" for label, name in enumerate(names)}  # the model may have more classes
    captions = [f"sample {i}{named.get(label_of[i], '')}" for i in previews]
    given = int((strip_indices(generator.num_frames, 8) < generator.num_cond_frames).sum())
    clips = [[outline(video, given) for video in clip] for clip in previews.values()]
    contact_sheet(store.folder / "sheet.png", clips, captions, ("real", "generated"), 16)
