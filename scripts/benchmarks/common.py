"""What the benchmarks share: the small sizes for CPUs, timing by turns, and records for run_all.py."""
import argparse
import functools
import json
import time
from collections.abc import Callable

import torch

from scripts.benchmarks import flops
from training.optim import DTYPES

SMALL_COORDTOK = {
    "video_shape": (16, 64, 64),
    "enc_embed_dim": 256,
    "enc_num_layers": 2,
    "enc_num_heads": 4,
    "enc_patch_size_xy": 8,
    "enc_patch_size_t": 4,
    "enc_patch_num_layers": 2,
    "latent_resolution_t": 16,
    "latent_patch_size_xy": 4,
    "latent_patch_size_t": 4,
    "dec_embed_dim": 256,
    "dec_num_layers": 2,
    "dec_num_heads": 4,
}
SMALL_LARP = {
    "bottleneck": {"args": {"regularizer": {"args": {"codebook_size": 1024}}}},
    "prior_model": {"name": "gptc-tiny"},
    "bottleneck_token_num": 128,
    "input_size": 64,
    "encoder_hidden_size": 256,
    "decoder_hidden_size": 256,
    "encoder_num_heads": 4,
    "decoder_num_heads": 4,
    "encoder_depth": 4,
    "decoder_depth": 4,
}
SMALL_DISC = {"hidden_size": 256, "n_heads": 4, "n_layers": 4, "input_size": 64}
SMALL_AR = {"n_layer": 4, "dim": 128, "n_head": 4}  # the quickstart's


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def alternate(variants: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, run in turn after one round that does not count."""
    seconds = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: sorted(times[1:])[rounds // 2] for name, times in seconds.items()}


@functools.cache
def product_rate(device: torch.device, dtype: str) -> float:
    """FLOP/s of a product of matrices of 2048x2048, at best."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    a = torch.rand(2048, 2048, device=device).to(DTYPES.get(dtype, torch.float32))
    return 2 * 2048**3 / min(alternate({"": lambda: a @ a}, 1, device)[""] for _ in range(5))


def mfu(work: float, seconds: float, device: torch.device, dtype: str) -> float:
    """The share of the device's peak that `work` FLOPs in `seconds` are. dtype: bf16, fp16, tf32 or fp32. Where its
    peak is not known, as that of CPUs, the rate of a large product in this run stands for it."""
    return work / seconds / (flops.peak(device_name(device), dtype) or product_rate(device, dtype))


def kernels(run: Callable[[], None], rows: int = 20) -> str:
    """A table of the GPU's kernels in one call of `run`, the longest in sum first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in found)
    lines = [f"{sum(event.count for event in found):,} kernels, {total / 1e3:.1f} ms"]
    for event in found[:rows]:
        lines.append(f"{event.self_device_time_total / total:>7.1%}{event.self_device_time_total / 1e3:>10.2f} ms"
                     f"{event.count:>7}  {event.key[:100]}")
    return "\n".join(lines)


def add_record(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--record", metavar="FILE", help="append the ratios to this file, one JSON object a line")


def record(
    path: str | None, benchmark: str, variant: str, ratio: float | None = None, mfu: float | None = None,
    memory: float | None = None, deviation: float | None = None,
) -> None:
    """ratio: to the plain way of the same run, higher is better. mfu: as by `mfu`. memory: the peak, in GiB. deviation:
    from float32, relative. None: not known, or not of this benchmark."""
    if path:
        row = {"benchmark": benchmark, "variant": variant, "ratio": ratio, "mfu": mfu, "memory_gib": memory,
               "deviation": deviation}
        row = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
