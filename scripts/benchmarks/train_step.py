"""The five training steps: samples/s, TFLOP/s, its share of the peak (MFU) and memory, and what each device of
speed brings alone.

    python -m scripts.benchmarks.train_step [--steps coordtok_1 sit] [--variants bf16 all] [--size small|published]

A step is forward, losses, backward and the optimisers' update, on random clips, latents or codes that are ready; LPIPS
has random weights. "plain" is float32, eager, attention by the maths kernel, optimisers as torch has them by default;
each variant changes one thing, "eager" is how the scripts train in bf16, "all" how with --compile. On a CPU plain and
one variant take turns; on a GPU each is alone in memory. FLOPs are those of flops.py; on a CPU a large product's rate
stands for the peak. Memory is a GPU's.
"""
import argparse
import contextlib
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.rng import sample_generators
from data.patch_sampling import random_frames, random_patches
from models.configs import SIT_SIZES
from models.coordtok import CoordTok, coordtok_loss
from models.discriminator import Discriminator
from models.gan import discriminator_loss, frozen, generator_loss
from models.interpolant import Interpolant, draw_noise
from models.larp_ar import SIZES, LARPGenerator, code_loss
from models.larp_tokenizer import LARPTokenizer
from models.layers import compile_blocks, set_checkpointing
from models.lpips import Perceptual
from models.patches import gather_patches
from models.sit import SiT
from scripts.benchmarks import flops
from scripts.benchmarks.common import (
    SMALL_AR,
    SMALL_COORDTOK,
    SMALL_DISC,
    SMALL_LARP,
    add_record,
    alternate,
    device_name,
    kernels,
    mfu,
    record,
    wait,
)
from training.optim import EMA, Precision, adam, adamw, decay_groups, update


@dataclass(frozen=True)
class Variant:
    precision: str = "fp32"
    tf32: bool = False
    fused_attention: bool = False
    fused_optimizer: bool = False
    compiled: bool = False
    checkpointing: bool = False


VARIANTS = {
    "plain": Variant(),
    "eager": Variant("bf16", fused_attention=True, fused_optimizer=True),
    "tf32": Variant(tf32=True),
    "bf16": Variant(precision="bf16"),
    "fused attention": Variant(fused_attention=True),
    "fused optimiser": Variant(fused_optimizer=True),
    "compile": Variant(compiled=True),
    "checkpointing": Variant(checkpointing=True),
    "all": Variant("bf16", fused_attention=True, fused_optimizer=True, compiled=True),
}


class Setting(NamedTuple):
    """What a training step is built for."""

    small: bool
    batch: int
    device: torch.device
    variant: Variant


class Step(NamedTuple):
    run: Callable[[], None]
    flops: int  # of one sample
    models: list[nn.Module]  # what the training script compiles
    optimizers: list[torch.optim.Optimizer]


def coordtok(setting: Setting, points: int, second: bool) -> Step:
    """train_coordtok.py: step 1 decodes random patches, the second whole frames, which LPIPS judges."""
    _, batch, device, variant = setting
    with device:
        tokenizer = CoordTok(**(SMALL_COORDTOK if setting.small else {}))
    config, patch_t, patch = tokenizer.config, tokenizer.config.dec_patch_size_t, tokenizer.config.dec_patch_size_xy
    perceptual = Perceptual(weights="random").to(device) if second else None
    draw, rng = random_frames if second else random_patches, np.random.default_rng(0)
    chosen = [draw(rng, points, config.grid, config.video_shape[0], patch_t) for _ in range(batch)]
    index = torch.from_numpy(np.stack(chosen)).to(device)
    video = torch.rand(batch, 3, *config.video_shape, device=device)
    target = gather_patches(video, index, patch_t, patch) * 2 - 1
    optimizer = adamw(tokenizer.parameters(), lr=1e-4, weight_decay=1e-3)
    precision = Precision(variant.precision, device)

    def step() -> None:
        with precision.autocast():
            patches = tokenizer(video, index)
            losses, _ = coordtok_loss(patches, target, index, config, perceptual, 1.0)
        losses.sum().backward()
        update(optimizer, precision.scaler)

    models = [tokenizer, *filter(None, [perceptual])]
    return Step(step, flops.coordtok_training(config, points, second), models, [optimizer])


def coordtok_1(setting: Setting) -> Step:
    return coordtok(setting, points=256 if setting.small else 1024, second=False)


def coordtok_2(setting: Setting) -> Step:
    return coordtok(setting, points=256 if setting.small else 4096, second=True)  # 4 frames, 16 frames


def sit(setting: Setting) -> Step:
    """train_sit.py from cached latents."""
    _, batch, device, variant = setting
    size = {"input_size": (16, 16), **SIT_SIZES["SiT-XS/2"]} if setting.small else SIT_SIZES["SiT-L/2"]
    with device:
        model = SiT(**size)
    latents = draw_noise(sample_generators(0, range(batch), device), model.plane_shapes)
    y = torch.zeros(batch, dtype=torch.long, device=device)
    interpolant, ema = Interpolant(), EMA(model, 0.9999)
    optimizer, precision = adamw(model.parameters(), lr=1e-4), Precision(variant.precision, device)

    def step() -> None:
        with precision.autocast():
            losses, _ = interpolant.loss(model, latents, y=y)
        losses.mean().backward()
        update(optimizer, precision.scaler)
        ema.update(model)

    return Step(step, flops.sit_training(model.config), [model], [optimizer])


def larp_tokenizer(setting: Setting) -> Step:
    """train_larp_tokenizer.py with all its losses. The discriminator takes a step in five; here a fifth of the batch
    goes through it at every step, so that all steps are alike (the batch is a multiple of five)."""
    small, batch, device, variant = setting
    short = {"frame_num": 4, "input_size": 32}  # LPIPS would be most of a small step
    tokenizer = LARPTokenizer(**({**SMALL_LARP, **short} if small else {})).to(device)
    discriminator = Discriminator(**({**SMALL_DISC, **short} if small else {})).to(device)
    perceptual = Perceptual(weights="random").to(device)
    config = tokenizer.config
    video = torch.rand(batch, 3, config.frame_num, config.input_size, config.input_size, device=device)
    if batch % 5:
        raise ValueError(f"larp_tokenizer takes a multiple of 5 clips a step, got {batch}: change --batch")
    few = batch // 5
    optimizer = adam(tokenizer.parameters(), 1e-4, betas=(0.5, 0.9))
    disc_optimizer = adam(discriminator.parameters(), 3e-5, betas=(0.5, 0.9))
    precision = Precision(variant.precision, device)

    def step() -> None:
        with precision.autocast():
            output = tokenizer(video, 0.25)
            fake = output.video.float()
            real_logits, fake_logits = discriminator(torch.cat([video[:few], fake[:few].detach()])).chunk(2)
        discriminator_loss(real_logits, fake_logits, "ns_smooth")[0].backward()
        update(disc_optimizer, precision.scaler)
        with frozen(discriminator):
            with precision.autocast():
                loss = generator_loss(discriminator(fake), "ns_smooth")
                loss = (fake - video).abs().mean() + perceptual(fake, video).mean() + 0.3 * loss
                loss = loss + 0.1 * output.loss_q + 0.06 * output.loss_prior
            loss.backward()
        update(optimizer, precision.scaler)

    work = flops.larp_tokenizer_training(config, discriminator.config, d_update_freq=5)
    return Step(step, work, [tokenizer, discriminator, perceptual], [optimizer, disc_optimizer])


def larp_ar(setting: Setting) -> Step:
    """train_ar.py from cached codes."""
    small, batch, device, variant = setting
    size = {**SMALL_AR, "max_seq_len": 128, "vocab_size": 1024} if small else SIZES["llama-abs-LP"]
    model = LARPGenerator(**size).to(device).train()
    config = model.config
    codes = torch.randint(config.vocab_size, (batch, config.max_seq_len), device=device)
    cond = torch.zeros(batch, dtype=torch.long, device=device)
    drop = torch.zeros(batch, dtype=torch.bool, device=device)
    optimizer = adamw(decay_groups(model, 0.05), 6e-4, betas=(0.9, 0.95))
    precision = Precision(variant.precision, device)

    def step() -> None:
        with precision.autocast():
            loss, _ = code_loss(model(codes, cond, drop), codes)
        loss.backward()
        update(optimizer, precision.scaler)

    return Step(step, flops.larp_ar_training(config), [model], [optimizer])


STEPS = {  # with the clips a step: on a CPU at the small size, on a GPU at the published one
    "coordtok_1": (coordtok_1, 4, 32),
    "coordtok_2": (coordtok_2, 1, 4),
    "sit": (sit, 4, 64),
    "larp_tokenizer": (larp_tokenizer, 5, 20),
    "larp_ar": (larp_ar, 4, 16),
}


def build(make: Callable[[Setting], Step], setting: Setting) -> Step:
    """The training step with what its variant asks for; `run` is ready to be timed."""
    torch.manual_seed(0)
    step, variant = make(setting), setting.variant
    for optimizer in step.optimizers if not variant.fused_optimizer else []:
        for group in optimizer.param_groups:
            group["fused"] = None  # torch's default: several tensors a kernel on a GPU, one after the other on a CPU
    for model in step.models:
        set_checkpointing(model, variant.checkpointing)
        if variant.compiled:
            compile_blocks(setting.device, model)

    def run() -> None:
        torch.set_float32_matmul_precision("high" if variant.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = variant.tf32
        with contextlib.nullcontext() if variant.fused_attention else sdpa_kernel(SDPBackend.MATH):
            step.run()

    return step._replace(run=run)


def peak_gib(step: Callable[[], None], device: torch.device) -> tuple[float | None, float]:
    """(a GPU's peak of memory in two calls, seconds of the first, which compiles)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    wait(device)
    first = time.perf_counter() - start
    step()
    wait(device)
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None, first


def benchmark(
    name: str, variants: list[str], small: bool, batch: int, device: torch.device, rounds: int, path: str | None,
    profile: bool,
) -> None:
    make = STEPS[name][0]
    plain, plain_seconds = build(make, Setting(small, batch, device, VARIANTS["plain"])), None
    parameters = sum(p.numel() for model in plain.models for p in model.parameters() if p.requires_grad)
    print(f"{name}: {parameters:,} parameters, batch {batch}, {plain.flops / 1e9:.1f} GFLOP a sample", flush=True)
    print(f"  {'variant':<16}{'samples/s':>10}{'x plain':>9}{'TFLOP/s':>9}{'MFU':>7}{'GiB':>7}{'first step, s':>15}")
    if device.type == "cuda":  # alone in memory, which it may not even fit; a GPU's times do not need turns
        try:
            peak_gib(plain.run, device)
            plain_seconds = alternate({"plain": plain.run}, rounds, device)["plain"]
        except torch.cuda.OutOfMemoryError:
            print("  plain does not fit this GPU's memory", flush=True)
        del plain
        gc.collect()
        torch.cuda.empty_cache()
    for label in variants:
        variant = VARIANTS[label]
        step = build(make, Setting(small, batch, device, variant))
        memory, first = peak_gib(step.run, device)
        ways = {label: step.run} if device.type == "cuda" else {"plain": plain.run, label: step.run}
        seconds = {"plain": plain_seconds} | alternate(ways, rounds, device)
        ratio, work = seconds["plain"] and seconds["plain"] / seconds[label], batch * step.flops
        dtype = "tf32" if variant.tf32 else variant.precision
        share = mfu(work, seconds[label], device, dtype)
        print(f"  {label:<16}{batch / seconds[label]:>10.2f}{ratio or math.nan:>9.2f}"
              f"{work / seconds[label] / 1e12:>9.3f}{share:>7.1%}{'-' if memory is None else f'{memory:.2f}':>7}"
              f"{first:>15.1f}", flush=True)
        record(path, f"train_step {name}", label, ratio, share, memory)
        if profile:
            print(kernels(step.run, 45), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=["small", "published"], help="default: published on a GPU, small on a CPU")
    parser.add_argument("--steps", choices=STEPS, nargs="+", default=list(STEPS))
    parser.add_argument("--variants", choices=VARIANTS, nargs="+",
                        help="default: all of them; on a CPU without tf32 and compiling, which takes minutes there")
    parser.add_argument("--batch", type=int, help="samples a step (default: by the step and size)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each variant, in turn with plain")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step of each variant; GPU only")
    add_record(parser)
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    small = (args.size or ("published" if on_gpu else "small")) == "small"
    on_cpu = [name for name, variant in VARIANTS.items() if not variant.tf32 and not variant.compiled]
    print(f"{device_name(device)}; torch {torch.__version__}; {'small' if small else 'published'} sizes")
    for name in args.steps:
        batch = args.batch or STEPS[name][1 if small else 2]
        benchmark(name, args.variants or (list(VARIANTS) if on_gpu else on_cpu), small, batch, device, args.rounds,
                  args.record, args.profile)


if __name__ == "__main__":
    main()
