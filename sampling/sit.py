"""SiT on CoordTok's planes as sample.py samples from it: the Generator that the flags make. Validation during training
samples by `sample_planes` too."""
import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common import distributed
from common.rng import Stream, generator, sample_generators
from eval.motion import rollout_seams
from models.interpolant import (
    ADAPTIVE,
    FIXED_GRID,
    SDE_METHODS,
    draw_noise,
    noise_stream,
)
from models.layers import compile_blocks
from models.pretrained import weights_sha256
from models.sit import SiT
from models.triplane import Planes
from sampling.arguments import PRECISIONS
from sampling.generator import Generator, check_class_label
from training.load import TrainedSiT, load_coordtok, load_sit
from training.optim import Precision


def sit_generator(args: argparse.Namespace, device: torch.device) -> Generator:
    """A CoordTok-SiT, sampled as the flags say."""
    methods = {"ODE": (*ADAPTIVE, *FIXED_GRID), "SDE": tuple(SDE_METHODS)}[args.mode]
    method = args.sampling_method or methods[0]
    if method not in methods:
        raise ValueError(f"--sampling_method {method} is none of the {args.mode} samplers: {', '.join(methods)}")
    if args.mode == "SDE" and (args.reverse or args.likelihood):
        raise ValueError("--reverse and --likelihood are of the probability flow: give --mode ODE")
    if args.guidance_interval[0] >= args.guidance_interval[1]:
        raise ValueError(f"--guidance_interval is {args.guidance_interval}, expected LOW below HIGH")
    if args.first_model_ckpt is None:
        raise ValueError("--sit_model needs --first_model_ckpt, the CoordTok that it was trained on")
    tokenizer = load_coordtok(args.first_model_ckpt, args).to(device).eval().requires_grad_(False)
    trained = load_sit(args, tokenizer)
    sit, interpolant = trained.model.to(device), trained.interpolant
    trained = trained._replace(stats=trained.stats.to(device))
    num_classes = sit.config.num_classes
    check_class_label(args.class_label, num_classes)
    if args.rollout > 1 and not sit.config.condition_on_previous:
        raise ValueError(f"--rollout is {args.rollout}, but {args.sit_model} was trained without "
                         "--condition_on_previous, so its clips cannot continue one another: leave --rollout out")
    if args.rollout > 1 and (args.reverse or args.likelihood):
        raise ValueError("--reverse and --likelihood are of single clips: leave --rollout out")
    num_frames, size, _ = tokenizer.config.video_shape  # of a clip
    sha256, tokenizer_sha256 = weights_sha256(sit), weights_sha256(tokenizer)
    if args.compile:
        compile_blocks(device, sit)
    dtype = args.dtype or "float32"
    precision = Precision(PRECISIONS[dtype], device)

    solver = {"method": method, "num_steps": args.num_sampling_steps}
    if args.mode == "ODE":
        solver |= {"atol": args.atol, "rtol": args.rtol, "coupled": args.coupled}
    else:
        solver |= {"diffusion_form": args.diffusion_form, "diffusion_norm": args.diffusion_norm,
                   "last_step": args.last_step, "last_step_size": args.last_step_size}
    guidance = {"cfg_scale": args.cfg_scale, "guidance_interval": tuple(args.guidance_interval)}
    model, progress = guided(sit, **guidance), distributed.is_main()

    def generate(indices: list[int], labels: list[int], real: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        labels = [args.class_label] * len(indices)
        if args.class_label is None:
            labels = sample_labels(indices, num_classes, args.seed)
        y = torch.tensor(labels, device=device)
        values = {"label": y}
        with precision.autocast():
            start = None
            if real is not None:
                latents = trained.stats.standardise(tokenizer.encode(real))
                start = interpolant.sample_ode(model, latents, reverse=True, y=y, **solver)
            sampled = sample_rollout(trained, indices, args.seed, y, args.rollout, mode=args.mode, **guidance,
                                     start=start, progress=progress, **solver)
            if args.likelihood:
                latents = trained.stats.standardise(sampled[0])
                # Another seed than the noise's: the estimate is unbiased only if signs and noise are independent.
                probe = draw_noise(sample_generators(args.seed + 1, indices, device), sit.plane_shapes).map(torch.sign)
                values["nll"] = -interpolant.likelihood(model, latents, y=y, probe=probe, **solver)
                values["bits_per_dim"] = values["nll"] / sum(plane[0].numel() for plane in latents) / math.log(2)
            videos = torch.cat([tokenizer.render(planes, slices=args.slices) for planes in sampled], dim=2)
        if args.rollout > 1:
            values["seams_rollout"] = rollout_seams(videos, range(num_frames, videos.shape[2], num_frames))
        return videos, values

    settings = {
        "mode": args.mode, **solver, **guidance, "reverse": args.reverse, "likelihood": args.likelihood,
        "class_label": args.class_label, "seed": args.seed, "dtype": dtype, "slices": args.slices,
        "interpolant": vars(interpolant), "sit_sha256": sha256, "tokenizer_sha256": tokenizer_sha256,
    }
    if args.rollout > 1:
        settings["rollout"] = args.rollout
    protocols = ["styleganv_fvd2048_16f", "styleganv_fvd2048_128f"]
    return Generator(
        generate, num_labels=0, needs_real=args.reverse, num_frames=args.rollout * num_frames, size=size,
        protocols=protocols if num_frames <= 16 else protocols[::-1], settings=settings,
        model=f"CoordTok-SiT: {args.sit_model} {sha256[:12]}",
        row={"sit_model": args.sit_model, "tokenizer": args.first_model_ckpt},
        class_names=trained.class_names if num_classes > 1 else [], patch=tokenizer.config.patch,
        rollout=args.rollout,
    )


def sample_labels(indices: Sequence[int], num_classes: int, seed: int) -> list[int]:
    """A uniformly drawn class for each sample, from (seed, index) alone."""
    return [int(generator(seed, index, Stream.LABEL).integers(num_classes)) for index in indices]


def guided(sit: SiT, cfg_scale: float, guidance_interval: tuple[float, float]) -> Callable[..., Planes]:
    """The model that samplers call: guided, unless the scale is 1."""
    return sit if cfg_scale == 1 else partial(sit.forward_with_cfg, cfg_scale=cfg_scale, interval=guidance_interval)


def sample_planes(trained: TrainedSiT, indices: Sequence[int], seed: int, labels: Tensor, **sampler) -> Planes:
    """The tokenizer's planes of samples `indices`, one clip each: see `sample_rollout`."""
    return sample_rollout(trained, indices, seed, labels, **sampler)[0]


def sample_rollout(
    trained: TrainedSiT, indices: Sequence[int], seed: int, labels: Tensor, num_clips: int = 1, mode: str = "SDE",
    cfg_scale: float = 1.0, guidance_interval: tuple[float, float] = (0.0, 1.0), start: Planes | None = None, **sampler,
) -> list[Planes]:
    """The tokenizer's planes of samples `indices`, `num_clips` clips each; every clip but the first is conditioned on
    the planes of the one before. A sample depends on (seed, index, label) alone, not on its batch, and its first clips
    do not depend on `num_clips`.

    labels: (B,) long, on the model's device. mode: "ODE" or "SDE". start: noise that the first clip starts from; None
    draws it from (seed, index). sampler: further arguments of Interpolant.sample_ode or sample_sde. More than one clip
    needs a SiT with condition_on_previous.
    """
    sit, interpolant, stats = trained[:3]
    generators = sample_generators(seed, indices, labels.device)  # a sample's clips draw from one, in turn
    if mode == "ODE":
        sample = interpolant.sample_ode
    else:
        sample = partial(interpolant.sample_sde, step_noise=noise_stream(generators))
    model = guided(sit, cfg_scale, guidance_interval)
    clips: list[Planes] = []
    for _ in range(num_clips):
        noise = draw_noise(generators, sit.plane_shapes)
        before: dict[str, Any] = {"previous": stats.standardise(clips[-1])} if clips else {}
        clips.append(stats.restore(sample(model, noise if start is None else start, y=labels, **before, **sampler)))
        start = None
    return clips
