"""CoordTok-SiT against plain ways of doing the same, alternating in one run:

    python -m scripts.benchmarks.sit [--rounds 5]

SDE sampling (Euler-Maruyama): velocity and score from one network call a step against two calls, and a batch against
one sample after another. A training step: latents from the cache against clips decoded and encoded at every step.
The small size on a CPU (clips of 16 frames of 64x64), the published size on a GPU; the videos are the demo's, 320x240
in XviD, with UCF-101's mean length of 186 frames.
"""
import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from common.rng import sample_generators
from data.clips import ClipDataset
from data.demo import DemoConfig, make_demo
from data.lists import list_folder
from data.loader import GlobalBatchSampler, make_loader
from models.configs import SIT_SIZES
from models.coordtok import CoordTok
from models.interpolant import Interpolant, draw_noise, noise_stream
from models.sit import SiT
from models.triplane import Planes
from scripts.benchmarks.common import SMALL_COORDTOK, add_record, alternate, device_name, record, wait
from training.latents import LatentCache, LatentStats, batches_from_cache, batches_from_video, measure
from training.load import coordtok_clips
from training.optim import EMA, Precision, adamw, update


def train_step(sit: SiT, stats: LatentStats, batches, precision: Precision, seconds: dict[str, float]):
    """One step of train_sit.py on the next batch."""
    interpolant, optimizer, ema = Interpolant(), adamw(sit.parameters(), lr=1e-4), EMA(sit, 0.9999)

    def step() -> None:
        start = time.perf_counter()
        planes, y, _ = next(batches)
        wait(y.device)
        seconds["data"] = time.perf_counter() - start
        with precision.autocast():
            losses, _ = interpolant.loss(sit, stats.standardise(planes), y=torch.zeros_like(y))
        losses.mean().backward()
        update(optimizer, precision.scaler)
        ema.update(sit)

    return step


def benchmark_training(tokenizer: CoordTok, sit: SiT, batch: int, rounds: int, device: torch.device, folder: Path,
                       path: str | None):
    config, precision = tokenizer.config, Precision("auto", device)
    length = max(config.video_shape[0], 186)  # UCF-101's mean: a window is decoded from its video's first frame on
    demo = DemoConfig(groups=(1, 8), clips=-(-batch // 16), min_frames=length, max_frames=length)
    files = list_folder(make_demo(folder, demo))
    resize, workers = ("device", 8) if device.type == "cuda" else ("worker", 0)
    clips = ClipDataset(files, *config.video_shape[:2], "coordtok", resize=resize, damaged="skip")

    @torch.inference_mode()
    def encode(clips: dict) -> Planes:
        with precision.autocast():
            return tokenizer.encode(*coordtok_clips(clips, config, device)).map(torch.Tensor.float)

    cache = LatentCache(folder / "cache", clips, config, 1, {})
    cache.fill(encode, batch, workers)
    stats = measure(iter([cache.read(torch.arange(len(files)).numpy())]), config.latent_n_features, torch.device("cpu"))
    keys = GlobalBatchSampler(len(files), batch, 10_000, order="epoch")
    sources = {
        "video": batches_from_video(iter(make_loader(clips, keys, workers, 4)), encode, device),
        "cache": batches_from_cache(cache, keys, cache.good_files(), device),
    }
    data = {name: {} for name in sources}
    steps = {name: train_step(copy.deepcopy(sit).train(), stats.to(device), batches, precision, data[name])
             for name, batches in sources.items()}
    seconds = alternate(steps, rounds, device)
    print(f"training step, batch {batch}, {precision.name}")
    for name in sources:
        print(f"  from {name:<8}{batch / seconds[name]:>10.1f} samples/s{1000 * seconds[name]:>10.1f} ms a step")
    print(f"  cache against video: {seconds['video'] / seconds['cache']:.1f}x")
    record(path, "sit training", "cached latents", seconds["video"] / seconds["cache"])


def benchmark_sampling(sit: SiT, batch: int, steps: int, rounds: int, device: torch.device, path: str | None):
    interpolant, precision = Interpolant(), Precision("auto", device)

    def twice(*args, **kwargs) -> Planes:
        """As released: called for the velocity, and again at the same point for the score."""
        sit(*args, **kwargs)
        return sit(*args, **kwargs)

    def sample(indices: list[int], model: Callable[..., Planes] = sit) -> None:
        generators = sample_generators(0, indices, device)
        y = torch.zeros(len(indices), dtype=torch.long, device=device)
        with precision.autocast():
            interpolant.sample_sde(model, draw_noise(generators, sit.plane_shapes), num_steps=steps, y=y,
                                   step_noise=noise_stream(generators))

    everyone = list(range(batch))
    seconds = alternate({
        "one call": partial(sample, everyone),
        "two calls": partial(sample, everyone, twice),
        "one by one": lambda: [sample([index]) for index in everyone],
    }, rounds, device)
    print(f"SDE sampling, {batch} samples, {steps} points, {precision.name}")
    for name, time_taken in seconds.items():
        print(f"  {name:<12}{batch / time_taken:>10.3f} samples/s")
    print(f"  one call a step against two: {seconds['two calls'] / seconds['one call']:.2f}x")
    print(f"  batch against one by one: {seconds['one by one'] / seconds['one call']:.2f}x")
    record(path, "sit sampling", "one call a step", seconds["two calls"] / seconds["one call"])
    record(path, "sit sampling", "batched", seconds["one by one"] / seconds["one call"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each variant, taken in turn")
    parser.add_argument("--batch", type=int, help="clips a step, samples at once (default: 8 on a CPU, 32 on a GPU)")
    parser.add_argument("--steps", type=int, help="SDE time points (default: 10 on a CPU, 50 on a GPU)")
    add_record(parser)
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    size = {} if on_gpu else SMALL_COORDTOK
    batch, steps = args.batch or (32 if on_gpu else 8), args.steps or (50 if on_gpu else 10)
    torch.manual_seed(0)
    with device:
        tokenizer = CoordTok(**size).eval().requires_grad_(False)
        sit = SiT(**SIT_SIZES["SiT-L/2" if on_gpu else "SiT-XS/4"], in_channels=tokenizer.config.latent_n_features,
                  input_size=(tokenizer.config.latent_resolution_t, tokenizer.config.latent_resolution_xy))
    print(f"{device_name(device)}; torch {torch.__version__}; "
          f"SiT {sum(p.numel() for p in sit.parameters()):,} parameters")
    with tempfile.TemporaryDirectory() as folder:
        benchmark_training(tokenizer, sit, batch, args.rounds, device, Path(folder), args.record)
    benchmark_sampling(sit.eval().requires_grad_(False), batch, steps, args.rounds, device, args.record)


if __name__ == "__main__":
    main()
