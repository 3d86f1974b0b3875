"""Time from a video file to a training sample of CoordTok: 128 frames of 128x128 and 1,024 patches.

    python -m scripts.benchmarks.loader [--num_videos 4] [--repeats 5]

Everything runs in this process on one thread, as in one loader worker, on XviD files like those of UCF-101 (320x240,
25 fps, 250 frames) made from moving photographs. The paths take turns clip by clip, so that they share the noise.
  plain    decord.get_batch to numpy; Pillow's resize and crop, ToTensor, [-1, 1] frame by frame; 1,024 slices stacked
  worker   ours, ClipDataset(resize="worker"): uint8 frames of 128x128 and patch indices
  device   ours, ClipDataset(resize="device"): native uint8 frames and patch indices
  cache    ours, ClipDataset(cache=...), what --cache_clips trains from: ready frames of 128x128, under "decode" the
           time to read them from memory maps, whose file the system keeps in memory here
"Rest" is what follows the resize in the worker. What ours leaves to the device (scaling, for "device" the resize, and
gathering the patches) is timed too, on this CPU, in the column "device".
"""
import argparse
import functools
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import decord
import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image
from skimage import data as photos
from skimage.transform import AffineTransform, warp
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

from data.cache import ClipCache
from data.clips import Quarantine, VideoFile, num_starts, window_frames
from data.points import random_patches
from data.video import read_chosen, resize_crop, to_video
from models.planes import gather_patches
from scripts.benchmarks.common import add_record, record
from training.clip_cache import clip_cache

FRAMES, SIZE, POINTS, PATCH = 128, 128, 1024, 8
GRID = (FRAMES, SIZE // PATCH, SIZE // PATCH)


def write_clip(path: Path, photo: np.ndarray, num_frames: int = 250) -> None:
    """A camera drifting, turning and zooming over a photograph, as XviD with B-frames, keyframes up to 250 apart."""
    options = {"codec": "mpeg4", "bitrate": 800_000, "output_params": ["-vtag", "xvid", "-bf", "2", "-g", "250"]}
    with imageio.get_writer(path, fps=25, quality=None, **options) as writer:
        for t in np.linspace(0, 1, num_frames):
            camera = AffineTransform(scale=1.2 - 0.3 * t, rotation=0.3 * t, translation=(30 + 60 * t, 40 - 30 * t))
            writer.append_data((warp(photo, camera, output_shape=(240, 320), mode="reflect") * 255).astype(np.uint8))


class Clock:
    """Adds up the seconds between calls."""

    def __init__(self):
        self.seconds, self.last = defaultdict(float), time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now


def plain(path: str, rng: np.random.Generator, clock: Clock) -> int:
    """Returns the bytes shipped. (In AVI with B-frames, get_batch from the middle gives frames not asked for.)"""
    reader = decord.VideoReader(path, num_threads=1)
    start = int(rng.integers(len(reader) - FRAMES + 1))
    frames = reader.get_batch(range(start, start + FRAMES)).asnumpy()
    clock("decode")
    resize = Compose([Resize(SIZE, InterpolationMode.BICUBIC), CenterCrop(SIZE), ToTensor()])
    video = torch.stack([resize(Image.fromarray(frame)) for frame in frames]) * 2 - 1  # (T, 3, H, W)
    clock("resize")
    index = random_patches(rng, POINTS, GRID, FRAMES, 1)
    patches = [video[t, :, PATCH * h:PATCH * (h + 1), PATCH * w:PATCH * (w + 1)] for t, h, w in index]
    patches = torch.stack([patch.permute(1, 2, 0).flatten() for patch in patches])
    clock("rest")
    return 4 * (video.numel() + patches.numel()) + index.nbytes


def ours(path: str, rng: np.random.Generator, clock: Clock, resize: str, cache: ClipCache | None = None) -> int:
    """What ClipDataset does for a sample, then what `to_video` and `gather_patches` do on the device."""

    def choose(available: int) -> np.ndarray:
        return window_frames(available, int(rng.integers(num_starts(available, FRAMES, 1))), FRAMES, 1)

    if cache:
        video = int(Path(path).stem)
        frames = torch.from_numpy(cache.read(video, choose(cache.length(video))))
    else:
        frames, _ = read_chosen(path, choose)
    clock("decode")
    if resize == "worker":
        frames = resize_crop(frames, SIZE, "coordtok")
        clock("resize")
    index = torch.from_numpy(random_patches(rng, POINTS, GRID, FRAMES, 1))
    clock("rest")
    video = to_video(frames[None], SIZE, "coordtok", "cpu") * 2 - 1
    gather_patches(video, index[None], 1, PATCH)
    clock("device")
    return frames.nbytes + index.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_videos", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    add_record(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    paths = {"plain": plain, "worker": functools.partial(ours, resize="worker"),
             "device": functools.partial(ours, resize="device")}
    images = [photos.astronaut(), photos.coffee(), photos.chelsea(), photos.rocket()]
    samples, shipped = defaultdict(list), {}
    with tempfile.TemporaryDirectory() as folder:
        videos = [Path(folder) / f"{i}.avi" for i in range(args.num_videos)]
        for i, video in enumerate(videos):
            write_clip(video, images[i % len(images)])
        files = [VideoFile(str(video)) for video in videos]
        cache = clip_cache(Path(folder) / "cache", files, SIZE, "coordtok", Quarantine(), 1, 60)
        paths["cache"] = functools.partial(ours, resize="none", cache=cache)
        for repeat in range(-1, args.repeats):  # the first round, a warm-up, is not counted
            for i, video in enumerate(videos):
                for name, load in paths.items():
                    clock = Clock()
                    shipped[name] = load(str(video), np.random.default_rng((repeat + 1, i)), clock)
                    if repeat >= 0:
                        samples[name].append(clock.seconds)
    report(samples, shipped, args.record)


def report(samples: dict[str, list[dict[str, float]]], shipped: dict[str, int], path: str | None) -> None:
    """The median of each stage: other work on the machine only ever adds time."""
    stages = ("decode", "resize", "rest", "device")
    ms = {name: {stage: 1000 * float(np.median([sample.get(stage, 0.0) for sample in clips])) for stage in stages}
          for name, clips in samples.items()}
    loading = {name: stage["decode"] + stage["resize"] + stage["rest"] for name, stage in ms.items()}
    print(f"{len(samples['plain'])} clips a path, median ms a clip; ratios to plain, without the device's share")
    print("path    " + "".join(f"{title:>10}" for title in ("clips/s", *stages, "ratio", "no decode", "MiB")))
    for name in ms:
        undecoded = {path: loading[path] - ms[path]["decode"] for path in ("plain", name)}
        row = (1000 / loading[name], *ms[name].values(), loading["plain"] / loading[name],
               undecoded["plain"] / undecoded[name], shipped[name] / 2**20)
        print(f"{name:8}" + "".join(f"{value:10.2f}" for value in row))
        record(path, "loader", name, loading["plain"] / loading[name])
    streaming = {name: loading[name] / loading["cache"] for name in ("worker", "device")}
    print("from the cache: " + ", ".join(f"{ratio:.0f} times {name}" for name, ratio in streaming.items()))


if __name__ == "__main__":
    main()
