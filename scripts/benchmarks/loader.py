"""Rate of the loader, from video files to CoordTok's training batches: clips of 128 frames of 128x128, 1,024 patches.

    python -m scripts.benchmarks.loader [--workers 1 2] [--num_videos 4] [--repeats 5]
    python -m scripts.benchmarks.loader --soak 2000      the workers' memory over so many clips, some of damaged files

Every path runs in the worker processes of a DataLoader, as train_coordtok.py makes it, on XviD files like those of
UCF-101 (320x240, 25 fps, 250 frames) made from moving photographs. All read the same windows, pass by pass in turn, so
that they share the noise.
  decode   decord reads the windows as ours does, nothing else is done and nothing shipped: the limit
  plain    decord.get_batch to numpy; Pillow's resize and crop, ToTensor, [-1, 1] frame by frame; 1,024 slices stacked
  worker   ours, ClipDataset(resize="worker"): uint8 frames of 128x128 and patch indices
  device   ours, ClipDataset(resize="device"): native uint8 frames and patch indices
  cache    ours, ClipDataset(cache=...), what --cache_clips trains from: ready frames of 128x128 in files, which the
           system keeps in memory here; "decode" maps them, "copy" reads them
"to limit" is the time a clip takes over that of decoding only. CPU times are the worker's, all its threads together;
"copy" is collating into memory that the training process shares. What ours leaves to the device is not timed: scaling,
gathering the patches, and for "device" the resize.
"""
import argparse
import contextlib
import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import decord
import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image
from skimage import data as photos
from skimage.transform import AffineTransform, warp
from torch.utils.data import DataLoader, get_worker_info
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

import data.clips
import data.loader
import data.video
from data.cache import ClipCache
from data.clips import ClipDataset, Quarantine, num_starts
from data.lists import list_folder
from data.loader import GlobalBatchSampler, make_loader
from data.patch_sampling import random_patches
from scripts.benchmarks.common import add_record, record
from training.clip_cache import clip_cache

FRAMES, SIZE, POINTS, PATCH = 128, 128, 1024, 8
GRID = (FRAMES, SIZE // PATCH, SIZE // PATCH)
CLIPS, BATCH = 16, 4  # of a pass, of a micro-batch
STAGES = {  # the functions of ours that are timed, while they do their work in the workers
    "open": [(data.video, "_open")],
    "decode": [(data.video, "_read"), (ClipCache, "read")],
    "resize": [(data.clips, "resize_crop")],
    "copy": [(data.loader, "collate")],
}


def write_clip(path: Path, photo: np.ndarray, num_frames: int = 250, height: int = 240, width: int = 320) -> None:
    """A camera drifting, turning and zooming over a photograph, as XviD with B-frames, keyframes up to 250 apart."""
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=25, codec="mpeg4", quality=None, bitrate=800_000, macro_block_size=1,
        output_params=["-vtag", "xvid", "-bf", "2", "-g", "250"],
    )
    writer.send(None)
    for t in np.linspace(0, 1, num_frames):
        camera = AffineTransform(scale=1.2 - 0.3 * t, rotation=0.3 * t, translation=(30 + 60 * t, 40 - 30 * t))
        frame = warp(photo, camera, output_shape=(height, width), mode="reflect")
        writer.send((frame * 255).astype(np.uint8))
    writer.close()


def write_clips(folder: Path, num: int, **options) -> None:
    images = [photos.astronaut(), photos.coffee(), photos.chelsea(), photos.rocket()]
    for i in range(num):
        write_clip(folder / f"{i:02d}.avi", images[i % len(images)], **options)


# --- what ours is compared with: the same windows, read and made ready in other ways ---

class DecodeOnly(ClipDataset):
    def _sample(self, index: int, position: int, start: int | None, rng: np.random.Generator) -> dict:
        reader = decord.VideoReader(self.files[index].path, num_threads=1, fault_tol=1)
        start = int(rng.integers(num_starts(len(reader), FRAMES, 1)))
        for _ in range(start):
            reader.next()
        reader.get_batch(range(start, start + FRAMES))
        return {"frames": torch.empty(1), "n_frames": FRAMES, "label": -1, "path": self.files[index].path,
                "start": start, "position": position}


class Plain(ClipDataset):
    def _sample(self, index: int, position: int, start: int | None, rng: np.random.Generator) -> dict:
        reader = decord.VideoReader(self.files[index].path, num_threads=1)
        start = int(rng.integers(num_starts(len(reader), FRAMES, 1)))
        # In AVI with B-frames, get_batch from the middle gives frames not asked for.
        frames = reader.get_batch(range(start, start + FRAMES)).asnumpy()
        resize = Compose([Resize(SIZE, InterpolationMode.BICUBIC), CenterCrop(SIZE), ToTensor()])
        video = torch.stack([resize(Image.fromarray(frame)) for frame in frames]) * 2 - 1  # (T, 3, H, W)
        points = random_patches(rng, POINTS, GRID, FRAMES, 1)
        patches = [video[t, :, PATCH * h:PATCH * (h + 1), PATCH * w:PATCH * (w + 1)] for t, h, w in points]
        patches = torch.stack([patch.permute(1, 2, 0).flatten() for patch in patches])
        return {"frames": torch.cat([video.flatten(), patches.flatten()]), "n_frames": FRAMES, "label": -1,
                "path": self.files[index].path, "start": start, "position": position, "index": torch.from_numpy(points)}


def make_paths(folder: Path) -> dict[str, ClipDataset]:
    files = list_folder(folder)
    cache = clip_cache(folder / "cache", files, SIZE, "coordtok", Quarantine(), 1, 60)
    clip, points = (files, FRAMES, SIZE, "coordtok"), ("patches", POINTS, GRID, 1)
    return {
        "decode": DecodeOnly(*clip),
        "plain": Plain(*clip),
        "worker": ClipDataset(*clip, points=points),
        "device": ClipDataset(*clip, points=points, resize="device"),
        "cache": ClipDataset(*clip, points=points, cache=cache),
    }


# --- rates ---

class Clock:
    """CPU seconds of a loader's workers, of all their threads: by stage, and of all there was."""

    def __init__(self, num_workers: int):
        # The workers, which are forked, share it.
        self.seconds = torch.zeros(num_workers, len(STAGES) + 1, dtype=torch.float64).share_memory_()

    def timed(self, stage: int, function: Callable) -> Callable:
        def run(*args):
            start = time.process_time()
            try:
                return function(*args)
            finally:
                now = time.process_time()
                row = self.seconds[get_worker_info().id]
                row[stage] += now - start
                row[-1] = now

        return run

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Times the stages in workers that are forked meanwhile."""
        with contextlib.ExitStack() as stack:
            for stage, functions in enumerate(STAGES.values()):
                for owner, name in functions:
                    stack.enter_context(mock.patch.object(owner, name, self.timed(stage, getattr(owner, name))))
            yield


def one_pass(loader: DataLoader) -> tuple[float, int]:
    """Seconds, and bytes shipped."""
    start, shipped = time.perf_counter(), 0
    for batch in loader:
        shipped += sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
    return time.perf_counter() - start, shipped


def measure(paths: dict[str, ClipDataset], num_workers: int, repeats: int) -> dict[str, tuple]:
    """{path: (seconds a clip, bytes shipped a clip, CPU seconds a clip by stage and in all)}"""
    loaders, clocks, seconds, shipped = {}, {}, defaultdict(list), {}
    for name, clips in paths.items():
        batches = GlobalBatchSampler(len(clips), BATCH, CLIPS // BATCH)
        clocks[name] = Clock(num_workers)
        with clocks[name].in_place():
            loaders[name] = make_loader(clips, batches, num_workers)
            one_pass(loaders[name])  # starts the workers, which stay
    before = {name: clock.seconds.sum(dim=0) for name, clock in clocks.items()}
    for _ in range(repeats):
        for name, loader in loaders.items():
            taken, shipped[name] = one_pass(loader)
            seconds[name].append(taken)
    cpu = {name: (clock.seconds.sum(dim=0) - before[name]) / (repeats * CLIPS) for name, clock in clocks.items()}
    return {name: (float(np.median(seconds[name])) / CLIPS, shipped[name] / CLIPS, cpu[name].tolist())
            for name in paths}


def report(results: dict[str, tuple], num_workers: int, path: str | None) -> None:
    seconds = {name: result[0] for name, result in results.items()}
    print(f"\nworkers: {num_workers}; MiB shipped and CPU ms are for one clip")
    print("path    " + "".join(f"{title:>10}" for title in (
        "clips/s", "x plain", "to limit", "MiB", "CPU ms", *STAGES, "rest")))
    for name, (taken, shipped, cpu) in results.items():
        *stages, total = (1000 * value for value in cpu)
        row = (1 / taken, seconds["plain"] / taken, taken / seconds["decode"], shipped / 2**20, total, *stages,
               total - sum(stages))
        print(f"{name:8}" + "".join(f"{value:10.2f}" for value in row))
        benchmark = "loader" if num_workers == 1 else f"loader, {num_workers} workers"
        record(path, benchmark, name, seconds["plain"] / taken)
    print("from the cache: " + ", ".join(
        f"{seconds[name] / seconds['cache']:.0f} times as fast as {name}" for name in ("worker", "device")))


# --- memory ---

def anonymous_mib(process: int) -> float:
    """Resident memory of its own: neither files' pages that are mapped, nor what it shares with other processes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def damage(folder: Path) -> None:
    """Of the videos there, one ends early, two have frames that cannot be decoded, and one cannot be opened."""
    short, *scratched, closed = sorted(folder.glob("*.avi"))[:4]
    os.truncate(short, short.stat().st_size * 9 // 10)
    for video in scratched:
        content = bytearray(video.read_bytes())
        third = len(content) // 3
        content[third:2 * third] = bytes(third)
        video.write_bytes(content)
    closed.write_bytes(b"not a video")


def soak(num_clips: int, num_workers: int) -> dict[str, float]:
    """Prints the workers' memory. Returns the growth of the worst worker from the first tenth to the end, in MiB."""
    growth = {}
    with tempfile.TemporaryDirectory() as folder:
        write_clips(Path(folder), 16, num_frames=48, height=48, width=64)
        damage(Path(folder))
        files = list_folder(folder)
        cache = clip_cache(Path(folder) / "cache", files, 32, "coordtok", Quarantine(), 1, 60)
        for name, options in {"worker": {}, "device": {"resize": "device"}, "cache": {"cache": cache}}.items():
            clips = ClipDataset(files, 32, 32, "coordtok", **options)
            loader = make_loader(clips, GlobalBatchSampler(len(files), BATCH, num_clips // BATCH), num_workers)
            tenth, sizes, others = len(loader) // 10, [], set(multiprocessing.active_children())
            print(f"{name}: MiB of each worker, after clips")
            for i, _ in enumerate(loader, 1):
                if i % tenth == 0:
                    workers = set(multiprocessing.active_children()) - others
                    sizes.append([anonymous_mib(process) for process in sorted(worker.pid for worker in workers)])
                    print(f"{BATCH * i:8} " + " ".join(f"{size:8.2f}" for size in sizes[-1]))
            growth[name] = max(last - first for first, last in zip(sizes[0], sizes[-1]))
            kib = 1024 * growth[name] * num_workers / (BATCH * (len(loader) - tenth))
            print(f"{name}: {growth[name]:+.2f} MiB since the first tenth, {kib:+.2f} KiB a clip of the worker")
            del loader
    return growth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="worker processes, one table each")
    parser.add_argument("--num_videos", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help=f"passes over {CLIPS} clips")
    parser.add_argument("--soak", type=int, metavar="CLIPS", help="memory instead of rates, with the most workers")
    add_record(parser)
    args = parser.parse_args()
    if args.soak:
        soak(args.soak, max(args.workers))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_clips(Path(folder), args.num_videos)
        paths = make_paths(Path(folder))
        print(f"median of {args.repeats} passes over {CLIPS} clips, {BATCH} a batch")
        for num_workers in args.workers:
            report(measure(paths, num_workers, args.repeats), num_workers, args.record)


if __name__ == "__main__":
    main()
