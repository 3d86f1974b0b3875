"""How every training script begins: device, run folder, clips and the loader of batches."""
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from common import distributed
from data.clips import ClipDataset, Quarantine
from data.lists import VideoFile, list_csv, list_folder
from data.loader import GlobalBatchSampler, Loader, make_loader
from training.clip_cache import clip_cache
from training.log import claim_run


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
    return device, folder


def training_files(args: Namespace) -> tuple[list[VideoFile], str]:
    """The videos to train on, and their source: the folder DATA_ROOT/VIDEO_NAME, or the list CSV_FILE."""
    if args.video_name or "csv_file" not in args:
        folder = str(Path(args.data_root) / args.video_name)
        return list_folder(folder), folder
    return list_csv(args.csv_file), args.csv_file


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


def train_loader(args: Namespace, clips: ClipDataset, sampler: GlobalBatchSampler, device: torch.device) -> Loader:
    """A loader of the sampler's micro-batches, into page-locked memory if the device is a GPU."""
    return make_loader(clips, sampler, args.num_workers, args.prefetch_factor, pin_memory=device.type == "cuda")
