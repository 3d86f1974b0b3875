"""The real clips that samples are paired with: how they are chosen, and their batches.

Real clip i gives sample i its label or first frames, and its features enter the FVD with those of sample i.
"""
import json
import os
import random
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from common.console import Progress
from common.errors import REMAKE, DamagedFile, read_json
from common.files import atomic_write, manifest_sha256
from data.clips import ClipDataset, ClipKey, open_quarantine
from data.lists import VideoFile, check_class_names, check_labels, list_csv, list_folder
from data.loader import make_loader
from eval.protocols import LARP_RESIZE, Protocol
from eval.reconstruction import length
from sampling.generator import Generator
from training.setup import make_clips


class RealVideos(NamedTuple):
    """The videos that samples are compared with, or whose clips they continue."""

    name: str  # the folder in DATA_ROOT, or the lists
    files: list[VideoFile]
    clips: ClipDataset
    manifest: str  # SHA-256 of the files' paths
    split_seed: int | None  # draws LARP's segments; None: clips are drawn from the seed of the samples


def open_real(args: Namespace, generator: Generator, protocol: Protocol, device: torch.device) -> RealVideos:
    """The real videos that the flags name. Raises ValueError where their labels are not those of the model."""
    name = args.dataset_csv or args.video_name
    if args.dataset_csv:
        files = list_csv(name, want_labels=generator.num_labels > 0)
        root = os.path.commonpath([file.path for file in files])
    else:
        files, root = list_folder(Path(args.data_root) / name), args.data_root
    manifest = manifest_sha256([file.path for file in files], root)
    by_segments = protocol.name.startswith("larp")
    rule = "larp" if protocol.resize == LARP_RESIZE else "coordtok"
    quarantine = open_quarantine(Path(args.output_dir), args.decode_timeout)
    clips = make_clips(args, files, generator.num_frames, generator.size, rule, device, quarantine, damaged="skip",
                       short="repeat" if by_segments else "pad")
    if generator.num_labels:
        check_labels(files, generator.num_labels, name, trained=True)
        check_class_names(files, generator.class_names, name)
    return RealVideos(name, files, clips, manifest, args.dataset_split_seed if by_segments else None)


def find_clips(videos: RealVideos, total: int, folder: Path) -> list[ClipKey]:
    """The real clips of samples 0, 1, ..., up to `total` of them. folder: of the samples, see `segments`."""
    if videos.split_seed is None:
        return drawn_clips(videos.clips, total)
    return segments(videos.clips, total, videos.split_seed, folder)


def drawn_clips(clips: ClipDataset, total: int) -> list[ClipKey]:
    """The real clips of samples 0, 1, ..., chosen as `python -m eval.fvd` does: videos drawn without replacement from
    the seed, short ones left out, first frames uniform. There are fewer than `total` if the videos do not suffice.

    clips: with damaged="skip", so that no clip replaces a damaged one.
    """
    order = np.random.default_rng(clips.seed).permutation(len(clips.files)).tolist()
    chosen = []
    with ThreadPoolExecutor(8) as pool:  # decoding runs outside the interpreter lock
        for start in range(0, len(order), 256):
            part = order[start : start + 256]
            lengths = pool.map(lambda video: length(clips.files[video], clips.quarantine, clips.timeout), part)
            chosen += [video for video, frames in zip(part, lengths) if frames >= clips.num_frames]
            if len(chosen) >= total:
                break
    if not chosen:
        raise ValueError(f"none of {len(clips.files)} videos has {clips.num_frames} frames: choose another --data_root "
                         "or --video_name, or leave FVD out with --no_fvd")
    return [ClipKey(video, video) for video in chosen[:total]]


def segments(clips: ClipDataset, total: int, split_seed: int, folder: Path) -> list[ClipKey]:
    """The real segments of samples 0 .. total - 1, chosen as LARP does: random.Random(split_seed).sample draws them
    from the list of all non-overlapping windows of the videos.

    A video shorter than a window is one segment, with its last frame repeated. If there are fewer segments than
    `total`, they are used again in the same order. folder: keeps the lengths of the videos, so that shards agree.
    """
    window = clips.num_frames
    starts = [(video, start) for video, frames in enumerate(video_lengths(clips, folder)) if frames
              for start in range(0, max(frames - window, 0) + 1, window)]
    if not starts:
        raise ValueError(f"none of {len(clips.files)} videos can be read: see {clips.quarantine.path}")
    drawn = random.Random(split_seed).sample(range(len(starts)), min(total, len(starts)))
    return [ClipKey(i, *starts[drawn[i % len(drawn)]]) for i in range(total)]


def video_lengths(clips: ClipDataset, folder: Path) -> list[int]:
    """The number of frames of each video, 0 if it cannot be decoded. Kept in `folder`/lengths.json."""
    path = folder / "lengths.json"
    with FileLock(folder / ".lengths.lock"):
        known = read_json(path, "lengths of videos", REMAKE) if path.exists() else {}
        if not all(type(frames) is int and frames >= 0 for frames in known.values()):
            raise DamagedFile(f"{path} holds lengths that are not numbers of frames: {REMAKE}")
        if unknown := [file for file in clips.files if file.path not in known]:
            with ThreadPoolExecutor(8) as pool:
                found = pool.map(lambda file: length(file, clips.quarantine, clips.timeout), unknown)
                known.update(zip((file.path for file in unknown), Progress(found, "lengths", len(unknown))))
            with atomic_write(path, "w") as file:
                file.write(json.dumps(known, indent=0) + "\n")
    return [known[file.path] for file in clips.files]


def real_batches(
    clips: ClipDataset, keys: list[ClipKey], batches: list[list[int]], num_workers: int, device: torch.device
) -> Iterator[tuple[list[int], Tensor | None]]:
    """For each batch of sample indices: the places in the batch that have a real clip, and those clips (n, 3, T, H, W),
    None if there are none.

    keys: of real clips 0, 1, ..., with distinct positions. Samples beyond them have no real clip.
    """
    chosen = [[keys[i] for i in batch if i < len(keys)] for batch in batches]
    loader = make_loader(clips, chosen, min(num_workers, len(chosen)), pin_memory=device.type == "cuda")
    for part, batch in zip(chosen, loader):
        positions = [key.position for key in part]
        places = [positions.index(position) for position in batch["position"].tolist()]
        yield places, clips.to_video(batch, device) if places else None
