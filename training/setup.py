"""How every training script begins: device, run folder, clips and the loader of batches."""
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from common import distributed
from common.console import print_main
from common.files import manifest_sha256
from data.clips import ClipDataset, Quarantine
from data.lists import VideoFile, class_names, list_csv, list_folder
from data.loader import GlobalBatchSampler, Loader, make_loader
from training.clip_cache import clip_cache
from training.log import claim_run
from training.micro_batch import fit_micro_batch


def set_up_device(args: Namespace, group: bool = False) -> torch.device:
    """Join torchrun's process group, if any, set TF32 by --allow_tf32, and return this process's device. group: as in
    `distributed.setup`."""
    device = distributed.setup(args.device, group=group)
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.allow_tf32
    return device


def start_run(args: Namespace, suffix: str = "", group: bool = False) -> tuple[torch.device, Path]:
    """This process's device, and the run's folder SAVE_DIR/EXP_NAME`suffix`, reserved for this run.

    Seeds torch with --seed, the same on all processes, since the initial weights are drawn next. Raises OSError if the
    folder cannot be written to, ValueError if another run uses it.
    """
    device = set_up_device(args, group)
    torch.manual_seed(args.seed)
    folder = Path(args.save_dir) / (args.exp_name + suffix)
    claim_run(folder)
    if getattr(args, "num_classes", None) == "auto":
        files, source = list_training(args)
        if not (names := class_names(files)):
            raise ValueError(f"--num_classes auto: {source} has videos outside of class folders, or without labels: "
                             "put each into the folder of its class")
        args.num_classes = len(names)
    if args.micro_batch == "auto":
        fit_micro_batch(args, folder)
    return device, folder


def list_training(args: Namespace) -> tuple[list[VideoFile], str]:
    """The videos to train on, and their source: the folder DATA_ROOT/VIDEO_NAME, or the list CSV_FILE."""
    if args.video_name or "csv_file" not in args:
        source = str(Path(args.data_root) / args.video_name)
        return list_folder(source), source
    return list_csv(args.csv_file), args.csv_file


def training_files(args: Namespace, before: dict | None) -> tuple[list[VideoFile], str, dict]:
    """The videos to train on, their source (the folder DATA_ROOT/VIDEO_NAME, or the list CSV_FILE), and what identifies
    the list in checkpoints: {"files": how many, "sha256": of their paths}.

    before: what the checkpoint that the run resumes from holds of the list; None for a new run. If the list has
    changed, the checkpoint's positions count other videos: --resume auto raises ValueError, a --resume that names a
    checkpoint continues with a warning. Raises ValueError too if the processes do not see the same list.
    """
    files, source = list_training(args)
    paths = [file.path for file in files]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    listed = {"files": len(files), "sha256": manifest_sha256(paths, root)}
    everywhere = distributed.gather(listed)
    if any(other != listed for other in everywhere):
        counts = ", ".join(f"{other['files']:,}" for other in everywhere)
        raise ValueError(f"{source} does not hold the same videos for all processes, but {counts}: is a disk away on a "
                         "node, or a copy not complete?")
    was = before or listed
    if "sha256" in was and was["sha256"] != listed["sha256"]:
        change = f"{source} has {len(files):,} videos, but not those that the run has trained on ({was['files']:,})"
        if args.resume == "auto":
            raise ValueError(f"{change}: bring these back (is a disk or a class folder away?), or go on with the "
                             "changed data by --resume CHECKPOINT")
        print_main(f"{change}: going on with the changed data")
    return files, source, listed


def make_clips(args: Namespace, files: Sequence[VideoFile], num_frames: int, size: int, rule: str,
               device: torch.device, quarantine: Quarantine, **options) -> ClipDataset:
    """Clips of the videos by the flags of `flags.add_data`. options: further arguments of ClipDataset."""
    resize = args.resize
    if resize == "auto":
        resize = "device" if device.type == "cuda" else "worker"
    return ClipDataset(files, num_frames, size, rule, seed=args.seed, resize=resize, quarantine=quarantine,
                       timeout=args.decode_timeout, **options)


def cached_clips(args: Namespace, files: Sequence[VideoFile], num_frames: int, size: int, rule: str,
                 device: torch.device, quarantine: Quarantine, **options) -> ClipDataset:
    """`make_clips`, with the clip cache if --cache_clips. The cache is filled here, which may take hours, so check all
    flags before calling this."""
    cache = None
    if args.cache_clips:
        cache = clip_cache(args.cache_dir, files, size, rule, quarantine, args.num_workers, args.decode_timeout)
    return make_clips(args, files, num_frames, size, rule, device, quarantine, cache=cache, **options)


def train_sampler(args: Namespace, num_files: int, num_iters: int, start: int, order: str) -> GlobalBatchSampler:
    """This process's micro-batches of the steps after `start`, up to `num_iters`. order: as in GlobalBatchSampler.
    Raises ValueError if the batch cannot be shared equally, or is larger than an epoch."""
    return GlobalBatchSampler(
        num_files, args.batch_size, num_iters, distributed.rank(), distributed.world_size(), accum=args.accum_iter,
        seed=args.seed, start_step=start, order=order,
    )


def micro_rows(args: Namespace, micro: int) -> slice:
    """The rows of the global batch that are micro-batch number `micro` of this process."""
    size = args.batch_size // (distributed.world_size() * args.accum_iter)
    first = (distributed.rank() * args.accum_iter + micro) * size
    return slice(first, first + size)


def train_loader(args: Namespace, clips: ClipDataset, sampler: GlobalBatchSampler, device: torch.device) -> Loader:
    """A loader of the sampler's micro-batches, into page-locked memory if the device is a GPU."""
    return make_loader(clips, sampler, args.num_workers, args.prefetch_factor, pin_memory=device.type == "cuda")
