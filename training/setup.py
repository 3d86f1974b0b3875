"""What every training script begins with: device and run folder, its clips and the loader of its batches."""
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
    """This process's device, in torchrun's process group where there is one, with TF32 as --allow_tf32 says. group: as
    `distributed.setup` takes it."""
    device = distributed.setup(args.device, group=group)
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.allow_tf32
    return device


def start_run(args: Namespace, suffix: str = "", group: bool = False) -> tuple[torch.device, Path]:
    """This process's device and the run's folder SAVE_DIR/EXP_NAME`suffix`, which no other run may use meanwhile.
    Seeds what follows: the initial weights are drawn next. Raises OSError where the folder cannot be written to,
    ValueError where another run has it."""
    device = set_up_device(args, group)
    torch.manual_seed(args.seed)
    folder = Path(args.save_dir) / (args.exp_name + suffix)
    claim_run(folder)
    return device, folder


def training_files(args: Namespace) -> tuple[list[VideoFile], str]:
    """The videos to train on, and where they are listed: the folder DATA_ROOT/VIDEO_NAME, or CSV_FILE."""
    if args.video_name or "csv_file" not in args:
        folder = str(Path(args.data_root) / args.video_name)
        return list_folder(folder), folder
    return list_csv(args.csv_file), args.csv_file


def make_clips(args: Namespace, files: Sequence[VideoFile], num_frames: int, size: int, rule: str,
               device: torch.device, quarantine: Quarantine, **options) -> ClipDataset:
    """Clips of the videos as the flags of `add_data` say. options: further arguments of ClipDataset."""
    resize = args.resize
    if resize == "auto":
        resize = "device" if device.type == "cuda" else "worker"
    return ClipDataset(files, num_frames, size, rule, seed=args.seed, resize=resize, quarantine=quarantine,
                       timeout=args.decode_timeout, **options)


def cached_clips(args: Namespace, files: Sequence[VideoFile], num_frames: int, size: int, rule: str,
                 device: torch.device, quarantine: Quarantine, **options) -> ClipDataset:
    """`make_clips`, with the clip cache where --cache_clips. It is filled first, which may take hours: call it after
    all that a flag may have wrong."""
    cache = None
    if args.cache_clips:
        cache = clip_cache(args.cache_dir, files, size, rule, quarantine, args.num_workers, args.decode_timeout)
    return make_clips(args, files, num_frames, size, rule, device, quarantine, cache=cache, **options)


def train_sampler(args: Namespace, num_files: int, num_iters: int, start: int, order: str) -> GlobalBatchSampler:
    """This process's micro-batches of steps `start` to `num_iters`. order: as GlobalBatchSampler takes it. Raises
    ValueError where the batch does not fit the processes or the videos."""
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
    """Loads the sampler's micro-batches, in page-locked memory where the device is a GPU."""
    return make_loader(clips, sampler, args.num_workers, args.prefetch_factor, pin_memory=device.type == "cuda")
