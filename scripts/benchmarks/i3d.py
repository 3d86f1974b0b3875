"""Clips a second of the I3D feature extractor, against a plain use of the same network in the same run.

    python scripts/benchmarks/i3d.py [--num_clips 4] [--batch_size 4] [--num_frames 16] [--size 128] [--repeats 3]

Plain: one clip at a time with autograd recording. Ours: inference mode, batched. They take turns, so that they share
the noise. The limit is what a large float32 matrix product reaches on the same device, without TF32, as the extractor.
"""
import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.utils.flop_counter import FlopCounterMode

from eval.i3d import I3D


def best_seconds(functions: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Best time of `repeats` turns of each function, after one to warm up."""
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: min(turns[1:]) for name, turns in times.items()}


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_clips", type=int, default=64 if cuda else 4)
    parser.add_argument("--batch_size", type=int, default=32 if cuda else 4)
    parser.add_argument("--num_frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    model = I3D().to(device)  # time does not depend on the weights
    clips = torch.rand(args.num_clips, 3, args.num_frames, args.size, args.size, device=device)

    def plain() -> torch.Tensor:
        return torch.cat([model(clip[None]) for clip in clips]).detach()

    @torch.inference_mode()
    def ours() -> torch.Tensor:
        return torch.cat([model(batch) for batch in clips.split(args.batch_size)])

    difference = (plain() - ours()).abs().max().item()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(clips[:1])
    work = counter.get_total_flops() * args.num_clips

    size = 8192 if cuda else 2048
    matrix = torch.rand(size, size, device=device)
    times = best_seconds({"plain": plain, "ours": ours, "product": lambda: matrix @ matrix}, device, args.repeats)
    limit = 2 * size**3 / times["product"]

    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"I3D on {name}: {args.num_clips} clips of {args.num_frames} frames of {args.size}x{args.size}")
    for label, batch in (("plain", 1), ("ours", args.batch_size)):
        speed = work / times[label]
        print(
            f"{label:6} batch {batch:3d} {args.num_clips / times[label]:8.2f} clips/s {speed / 1e12:8.3f} TFLOP/s, "
            f"{speed / limit:.1%} of a float32 matrix product's"
        )
    print(f"largest difference between their logits: {difference:.1e}")


if __name__ == "__main__":
    main()
