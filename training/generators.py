"""What sample.py samples from: a CoordTok-SiT or a LARP generator, with their flags."""
import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eval.metrics import psnr_frame
from models.interpolant import (
    ADAPTIVE,
    DIFFUSION_FORMS,
    FIXED_GRID,
    LAST_STEPS,
    SDE_METHODS,
    draw_noise,
    sample_generators,
)
from models.layers import compile_blocks
from training import distributed
from training.arguments import Parser, check_carried, word_or_none
from training.codes import hold_last
from training.generation import guided, load_sit, sample_labels, sample_planes
from training.optim import Precision
from training.tokenizers import load_coordtok, load_larp_ar, load_larp_tokenizer, weights_sha256

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Generator(NamedTuple):
    """What sample.py needs to know of a model."""

    # (sample indices, labels and, where needs_real, clips (B, 3, T, H, W) of the real clips beside them) -> videos
    # (B, 3, T, H, W), and values by name, (B, ...) each: label, nll in nats where it is known, ...
    generate: Callable[[list[int], list[int], Tensor | None], tuple[Tensor, dict[str, Tensor]]]
    num_labels: int  # the real clips' labels that `generate` takes are below it; 0: it takes none
    needs_real: bool  # whether it takes those clips
    num_frames: int
    size: int
    protocols: list[str]  # that fit; the first is the default
    settings: dict  # all that the samples depend on, plain JSON values
    model: str  # names the weights, for the record
    row: dict  # of the table of results, beside the settings
    class_names: list[str]  # by label; empty where unknown, or where there are no classes
    num_cond_frames: int = 0  # of the real clip, given to the model


# --- CoordTok-SiT ---

def add_sit_sampling(parser: Parser) -> list[argparse.Action]:
    """Returns the flags, which no other model takes."""
    add = parser.add_argument_group("SiT sampling").add_argument
    return [
        add("--mode", choices=["ODE", "SDE"], default="SDE", help="probability flow, or diffusion"),
        add("--sampling_method", help="ODE: torchdiffeq's (default: dopri5); SDE: Euler (default) or Heun"),
        add("--num_sampling_steps", type=int, default=250, help="time points; adaptive methods choose"),
        add("--guidance_interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"),
            help="times that are guided; 0 is noise"),
        add("--compile", action="store_true", help="torch.compile the network"),
        add("--slices", type=int, default=1, help="equal sequences that a clip's patches are decoded in"),
        add("--atol", type=float, default=1e-6, help="ODE: absolute tolerance"),
        add("--rtol", type=float, default=1e-3, help="ODE: relative tolerance"),
        add("--coupled", action="store_true",
            help="ODE: adaptive steps shared by a batch; quicker, but samples then depend on batches"),
        add("--reverse", action="store_true",
            help="ODE: start from the noise that the reverse flow takes real clips to"),
        add("--likelihood", action="store_true", help="ODE: the density of the samples' latents too"),
        add("--diffusion_form", choices=DIFFUSION_FORMS, default="sigma", help="SDE: D(t)"),
        add("--diffusion_norm", type=float, default=1.0, help="SDE: scale of D(t)"),
        add("--last_step", type=word_or_none, choices=LAST_STEPS, default="Mean", help="SDE"),
        add("--last_step_size", type=float, default=0.04, help="SDE"),
    ]


def sit_generator(args: argparse.Namespace, device: torch.device) -> Generator:
    """A CoordTok-SiT, sampled as the flags say."""
    methods = {"ODE": (*ADAPTIVE, *FIXED_GRID), "SDE": tuple(SDE_METHODS)}[args.mode]
    method = args.sampling_method or methods[0]
    if method not in methods:
        raise ValueError(f"--sampling_method {method} is none of the {args.mode} samplers: {', '.join(methods)}")
    if args.mode == "SDE" and (args.reverse or args.likelihood):
        raise ValueError("--reverse and --likelihood are of the probability flow: give --mode ODE")
    if args.first_model_ckpt is None:
        raise ValueError("--sit_model needs --first_model_ckpt, the CoordTok that it was trained on")
    tokenizer = load_coordtok(args.first_model_ckpt, args).to(device).eval().requires_grad_(False)
    trained = load_sit(args, tokenizer)
    sit, interpolant = trained.model.to(device), trained.interpolant
    trained = trained._replace(stats=trained.stats.to(device))
    num_classes = sit.config.num_classes
    check_class_label(args.class_label, num_classes)
    sha256, tokenizer_sha256 = weights_sha256(sit), weights_sha256(tokenizer)
    if args.compile:
        compile_blocks(sit)
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
            if args.reverse:
                latents = trained.stats.standardise(tokenizer.encode(real))
                start = interpolant.sample_ode(model, latents, reverse=True, y=y, **solver)
            planes = sample_planes(
                trained, indices, args.seed, y, args.mode, **guidance, start=start, progress=progress, **solver
            )
            if args.likelihood:
                latents = trained.stats.standardise(planes)
                # Signs from another stream than the noise: the estimate is unbiased where they are independent.
                probe = draw_noise(sample_generators(args.seed + 1, indices, device), sit.plane_shapes).map(torch.sign)
                values["nll"] = -interpolant.likelihood(model, latents, y=y, probe=probe, **solver)
                values["bits_per_dim"] = values["nll"] / sum(plane[0].numel() for plane in latents) / math.log(2)
            return tokenizer.render(planes, slices=args.slices), values

    settings = {
        "mode": args.mode, **solver, **guidance, "reverse": args.reverse, "likelihood": args.likelihood,
        "class_label": args.class_label, "seed": args.seed, "dtype": dtype, "slices": args.slices,
        "interpolant": vars(interpolant), "sit_sha256": sha256, "tokenizer_sha256": tokenizer_sha256,
    }
    num_frames, size, _ = tokenizer.config.video_shape
    protocols = ["styleganv_fvd2048_16f", "styleganv_fvd2048_128f"]
    return Generator(
        generate, num_labels=0, needs_real=args.reverse, num_frames=num_frames, size=size,
        protocols=protocols if num_frames <= 16 else protocols[::-1], settings=settings,
        model=f"{args.sit_model} {sha256[:12]}", row={"sit_model": args.sit_model, "tokenizer": args.first_model_ckpt},
        class_names=trained.class_names if num_classes > 1 else [],
    )


# --- LARP ---

def add_larp_sampling(parser: Parser) -> list[argparse.Action]:
    """Returns the flags, which no other model takes."""
    add = parser.add_argument_group("LARP sampling").add_argument
    return [
        add("--ar_model", metavar="PATH", help="the generator: folder or hub id of config.json and model.safetensors, "
            "a checkpoint or a folder of them, or a file of the authors' trainer"),
        add("--tokenizer", metavar="PATH", help="the tokenizer whose codes it was trained on, likewise"),
        add("--version", default="sd", metavar="sd|ema_DECAY", help="which weights of the generator's checkpoint"),
        add("--tokenizer_version", default="sd", metavar="sd|ema_DECAY", help="which weights of the tokenizer's"),
        add("--cfg_interval", type=int, default=-1, help="guide only the first CFG_INTERVAL + 2 codes; -1: all"),
        add("--temperature", type=float, default=1.0, help="of the draws"),
        add("--top_k", type=int, default=0, help="draw from the k likeliest codes; 0: all"),
        add("--top_p", type=float, default=1.0, help="draw from the likeliest codes up to this probability"),
        add("--tokenizer_dtype", choices=PRECISIONS, help="weights of the tokenizer (default: as published, float16 "
            "for classes, which is slow on a CPU; float32 for frame prediction)"),
        add("--frame_prediction", "--fp", dest="frame_prediction", action="store_true",
            help="continue the first frames of real clips"),
        add("--num_cond_frames", type=int, help="how many are given; our checkpoints carry it"),
        add("--det", action="store_true", help="the best codes of the frames given; else they are drawn, as published"),
    ]


def larp_generator(args: argparse.Namespace, device: torch.device) -> Generator:
    """A LARP generator, sampled as the flags say."""
    if args.tokenizer is None:
        raise ValueError("--ar_model needs --tokenizer, the LARP tokenizer whose codes it was trained on")
    tokenizer = load_larp_tokenizer(args.tokenizer, args.tokenizer_version)
    trained = load_larp_ar(args.ar_model, args.version)
    model, config = trained.model, trained.model.config
    fp, num_frames = config.frame_prediction, tokenizer.config.frame_num
    if not fp:
        check_class_label(args.class_label, config.num_classes)
    num_cond = larp_condition(args, trained.num_cond_frames, fp, num_frames)
    codes = tokenizer.config.bottleneck_token_num, tokenizer.config.bottleneck.args.regularizer.args.codebook_size
    if codes != (config.max_seq_len, config.vocab_size):
        raise ValueError(f"{args.ar_model} makes {config.max_seq_len} codes of {config.vocab_size}, but clips of the "
                         f"tokenizer {args.tokenizer} have {codes[0]} of {codes[1]}: they belong to different runs")
    sha256, tokenizer_sha256 = weights_sha256(model), weights_sha256(tokenizer)
    if trained.tokenizer not in (None, tokenizer_sha256):
        raise ValueError(f"{args.ar_model} was trained on a tokenizer of SHA-256 {trained.tokenizer[:12]}, and "
                         f"--tokenizer {args.tokenizer} has {tokenizer_sha256[:12]}: give the one it was trained on")
    # As published, weights are cast as a whole, without autocast: the generator's, and for classes the tokenizer's.
    dtype, tokenizer_dtype = args.dtype or "bfloat16", args.tokenizer_dtype or ("float32" if fp else "float16")
    model.to(device, getattr(torch, dtype))
    tokenizer.to(device, getattr(torch, tokenizer_dtype))
    draw = {name: getattr(args, name) for name in ("cfg_scale", "cfg_interval", "temperature", "top_k", "top_p")}

    def generate(indices: list[int], labels: list[int], real: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        num = len(indices)
        # A product may round by the number of rows, and a draw hangs on the last bit: on a GPU every batch is filled up
        # to the same size, on a CPU the tokenizer takes clip after clip (and the generator sees to it itself).
        place = list(range(num)) if device.type == "cpu" else [min(i, num - 1) for i in range(args.sample_batch_size)]
        parts = [slice(i, i + 1) for i in place] if device.type == "cpu" else [slice(None)]
        indices = [indices[i] for i in place]
        if fp:
            given = hold_last(real[place], num_cond)
            draws = None if args.det else sample_generators(args.seed, indices, device)
            known = [tokenizer.encode(given[part], args.det, draws and draws[part]) for part in parts]
            cond = model.frame_condition(torch.cat(known))
        else:
            labels = labels if args.class_label is None else [args.class_label] * num
            cond = torch.tensor(labels, device=device)[place]
        codes, nll = model.generate(cond, **draw, seeds=[(args.seed, i) for i in indices], return_nll=True)
        videos = torch.cat([tokenizer.decode(codes[part]) for part in parts])[:num].float()
        values = {"label": torch.full_like(nll, -1, dtype=torch.long) if fp else cond, "nll": nll}
        if fp:
            values["psnr_given"] = psnr_frame(real[:, :, :num_cond], videos[:, :, :num_cond].clamp(0, 1))
        return videos, {name: value[:num] for name, value in values.items()}

    settings = {
        **draw, "dtype": dtype, "tokenizer_dtype": tokenizer_dtype, "class_label": args.class_label, "seed": args.seed,
        "num_cond_frames": num_cond, "condition_codes": "best" if args.det else "drawn", "ar_model_sha256": sha256,
        "tokenizer_sha256": tokenizer_sha256,
    }
    if not fp:
        del settings["condition_codes"]
    if device.type == "cuda":  # products round by the size of the batch
        settings["sample_batch_size"] = args.sample_batch_size
    return Generator(
        generate, num_labels=0 if fp or args.class_label is not None else config.num_classes, needs_real=fp,
        num_frames=num_frames, size=tokenizer.config.input_size,
        protocols=["larp_k600fp50k" if fp else "larp_gfvd10k"], settings=settings,
        model=f"{args.ar_model} {args.version} {sha256[:12]}",
        row={"ar_model": args.ar_model, "tokenizer": args.tokenizer},
        class_names=trained.class_names, num_cond_frames=num_cond,
    )


def larp_condition(args: argparse.Namespace, carried: int | None, fp: bool, num_frames: int) -> int:
    """How many frames are given to the model, 0 for a class-conditional one. ValueError where the flags do not fit it.

    carried: the number that its checkpoint holds. fp: whether it predicts frames."""
    if not fp:
        if args.frame_prediction or args.num_cond_frames or args.det:
            raise ValueError(f"{args.ar_model} is class-conditional: leave --frame_prediction, --num_cond_frames and "
                             "--det out, or give a model for frame prediction")
        return 0
    if args.class_label is not None or args.cfg_scale != 1:
        raise ValueError(f"{args.ar_model} predicts frames, without classes: leave --class_label and --cfg_scale out")
    if carried is None and not (args.frame_prediction and args.num_cond_frames):
        raise ValueError(f"{args.ar_model} predicts frames: give --frame_prediction and --num_cond_frames (the "
                         "published model's is 5)")
    if carried is not None and args.num_cond_frames is not None:
        check_carried("num_cond_frames", args.num_cond_frames, carried, args.ar_model)
    num_cond = args.num_cond_frames or carried
    if not 0 < num_cond < num_frames:
        raise ValueError(f"--num_cond_frames is {num_cond}, expected 1 to {num_frames - 1}")
    return num_cond


def check_class_label(label: int | None, num_classes: int) -> None:
    if label is not None and not 0 <= label < num_classes:
        raise ValueError(f"--class_label is {label}, expected 0 to {num_classes - 1}")
