"""Generate clips from a trained model and measure their Fréchet video distance under a named protocol.

CoordTok-SiT:  python3 sample.py --sit_model SIT_CKPT --first_model_ckpt CKPT --data_root DATA --output_dir OUT

Runs under torchrun, and in shards by hand (--starting_index, --num_samples, --num_samples_total), in any order: what is
there is not made again, and the shard that finishes last writes the report. Sample i is a function of the seed and i.
"""
import argparse
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from data.clips import ClipDataset, Quarantine, list_folder
from eval import fvd
from eval.i3d import I3D
from eval.pictures import contact_sheet
from eval.protocols import PROTOCOLS, describe, git_revision, manifest_sha256, record
from models.interpolant import (
    ADAPTIVE,
    DIFFUSION_FORMS,
    FIXED_GRID,
    LAST_STEPS,
    SDE_METHODS,
    draw_noise,
    sample_generators,
)
from training import distributed
from training.arguments import Parser, add_coordtok, add_data, one_line_errors, word_or_none
from training.evaluation import is_ucf101
from training.generation import (
    SampleStore,
    add_sit,
    guided,
    load_sit,
    real_batches,
    real_clips,
    sample_labels,
    sample_planes,
)
from training.log import say
from training.optim import Precision
from training.tokenizers import load_coordtok, weights_sha256


def parse_args():
    parser = Parser(__doc__)
    out = parser.add_argument_group("samples")
    out.add_argument("--output_dir", required=True, help="folder of the samples and their report")
    out.add_argument("--num_samples", "--ns", dest="num_samples", type=int, help="of this shard (default: 2048)")
    out.add_argument("--starting_index", type=int, default=0, help="first sample of this shard")
    out.add_argument("--num_samples_total", type=int, help="of all shards (default: up to the end of this one)")
    out.add_argument("--sample_batch_size", type=int, default=32, help="samples at once in each process")
    out.add_argument("--seed", type=int, default=0, help="of noise, classes and real clips")
    out.add_argument("--save", nargs="+", choices=["mp4", "png"], default=["mp4"], help="png: frames, without loss")
    out.add_argument("--stats_only", action="store_true", help="write no videos, only what the report needs")
    out.add_argument("--replace", action="store_true", help="make samples anew that are there")
    out.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    out.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of autocast")
    out.add_argument("--allow_tf32", action="store_true", help="let float32 matrix products use TF32")
    out.add_argument("--compile", action="store_true", help="torch.compile the generator")
    out.add_argument("--num_workers", type=int, default=4, help="loader workers of each process, for real clips")
    measure = parser.add_argument_group("report")
    names = [name for name in PROTOCOLS if name.startswith("styleganv")]
    measure.add_argument("--protocol", choices=names, help="how FVD is measured (default: by the clips' length)")
    measure.add_argument("--no_fvd", action="store_true", help="only sample: no real clips, no I3D")
    measure.add_argument("--report", help="table of results (default: fvd_report.csv beside OUTPUT_DIR)")
    measure.add_argument("--i3d_weights", metavar="PATH", help="I3D weights (default: the cache, or a download)")
    measure.add_argument("--i3d_eps", type=float, default=1e-3, help="eps of I3D's batch norms; 1e-5: the older port's")
    add_data(parser)
    add_sit(parser)
    add_coordtok(parser)
    sampler = parser.add_argument_group("SiT sampling")
    sampler.add_argument("--mode", choices=["ODE", "SDE"], default="SDE", help="probability flow, or diffusion")
    sampler.add_argument("--sampling_method", help="ODE: torchdiffeq's (default: dopri5); SDE: Euler (default) or Heun")
    sampler.add_argument("--num_sampling_steps", type=int, default=250, help="time points; adaptive methods choose")
    sampler.add_argument("--cfg_scale", "--cs", dest="cfg_scale", type=float, default=1.0, help="guidance; 1 is none")
    sampler.add_argument("--guidance_interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"),
                         help="times that are guided; 0 is noise")
    sampler.add_argument("--class_label", type=int, help="this class only (default: classes drawn uniformly)")
    sampler.add_argument("--slices", type=int, default=1, help="equal sequences that a clip's patches are decoded in")
    sampler.add_argument("--atol", type=float, default=1e-6, help="ODE: absolute tolerance")
    sampler.add_argument("--rtol", type=float, default=1e-3, help="ODE: relative tolerance")
    sampler.add_argument("--coupled", action="store_true",
                         help="ODE: adaptive steps shared by a batch; quicker, but samples then depend on batches")
    sampler.add_argument("--reverse", action="store_true",
                         help="ODE: start from the noise that the reverse flow takes real clips to")
    sampler.add_argument("--likelihood", action="store_true", help="ODE: the density of the samples' latents too")
    sampler.add_argument("--diffusion_form", choices=DIFFUSION_FORMS, default="sigma", help="SDE: D(t)")
    sampler.add_argument("--diffusion_norm", type=float, default=1.0, help="SDE: scale of D(t)")
    sampler.add_argument("--last_step", type=word_or_none, choices=LAST_STEPS, default="Mean", help="SDE")
    sampler.add_argument("--last_step_size", type=float, default=0.04, help="SDE")
    return parser.parse_args()


class Generator(NamedTuple):
    """What the loop below needs to know of a model."""

    # (sample indices, real clips (B, 3, T, H, W) of those samples or None) -> videos (B, 3, T, H, W), and values by
    # name, (B, ...) each: label, and nll in nats where it is known.
    generate: Callable[[list[int], Tensor | None], tuple[Tensor, dict[str, Tensor]]]
    needs_real: bool  # whether `generate` takes real clips
    num_frames: int
    size: int
    settings: dict  # all that the samples depend on, plain JSON values
    model: str  # names the weights, for the record
    row: dict  # of the table of results
    captions: list[str]  # by label; empty where there are no classes


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
    if args.class_label is not None and not 0 <= args.class_label < num_classes:
        raise ValueError(f"--class_label is {args.class_label}, expected 0 to {num_classes - 1}")
    hashes = {"sit": weights_sha256(sit), "tokenizer": weights_sha256(tokenizer)}
    if args.compile:
        sit.compile()
    precision = Precision({"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[args.dtype], device)

    solver = {"method": method, "num_steps": args.num_sampling_steps}
    if args.mode == "ODE":
        solver |= {"atol": args.atol, "rtol": args.rtol, "coupled": args.coupled}
    else:
        solver |= {"diffusion_form": args.diffusion_form, "diffusion_norm": args.diffusion_norm,
                   "last_step": args.last_step, "last_step_size": args.last_step_size}
    guidance = {"cfg_scale": args.cfg_scale, "guidance_interval": tuple(args.guidance_interval)}
    model, progress = guided(sit, **guidance), distributed.is_main()

    def generate(indices: list[int], real: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        classes = sample_labels(indices, num_classes, args.seed) if args.class_label is None else None
        y = torch.tensor(classes or [args.class_label] * len(indices), device=device)
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
        "class_label": args.class_label, "seed": args.seed, "dtype": args.dtype, "slices": args.slices,
        "interpolant": vars(interpolant), "sit": hashes["sit"], "tokenizer": hashes["tokenizer"],
    }
    row = {"sit_model": args.sit_model, "tokenizer": args.first_model_ckpt, "cfg_scale": args.cfg_scale,
           "dtype": args.dtype, "mode": args.mode, "sampling_method": method, "num_steps": args.num_sampling_steps}
    num_frames, size, _ = tokenizer.config.video_shape
    return Generator(generate, args.reverse, num_frames, size, settings, f"{args.sit_model} {hashes['sit'][:12]}", row,
                     captions=trained.class_names if num_classes > 1 else [])


def main():
    args = parse_args()
    device = distributed.setup(args.device)
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.allow_tf32
    if args.sit_model is None:
        raise ValueError("no model to sample from: give --sit_model")
    generator = sit_generator(args, device)
    num_frames, size = generator.num_frames, generator.size

    count = 2048 if args.num_samples is None else args.num_samples
    total = args.num_samples_total or args.starting_index + count
    if not (0 <= args.starting_index < total and count > 0):
        raise ValueError(f"--starting_index {args.starting_index} --num_samples {count} are none of the samples 0 to "
                         f"{total - 1} (--num_samples_total)")
    indices = range(args.starting_index, min(args.starting_index + count, total))

    # Real clips: clip i is measured by the shard that makes sample i.
    protocol = PROTOCOLS[args.protocol or f"styleganv_fvd2048_{16 if num_frames <= 16 else 128}f"]
    settings, i3d, files, clips = dict(generator.settings), None, [], None
    if not args.no_fvd:
        if num_frames < 10:
            raise ValueError(f"this model's clips have {num_frames} frames, FVD needs 10 or more: give --no_fvd")
        i3d = I3D.from_weights(args.i3d_weights, eps=args.i3d_eps).to(device)
        settings |= {"protocol": protocol.name, "i3d": i3d.weights_sha256, "i3d_eps": args.i3d_eps}
    if i3d or generator.needs_real:
        files = list_folder(Path(args.data_root) / args.video_name)
        clips = ClipDataset(
            files, num_frames, size, "coordtok", seed=args.seed, damaged="skip", timeout=args.decode_timeout,
            quarantine=Quarantine(Path(args.output_dir) / "quarantine.txt"),
            resize=args.resize if args.resize != "auto" else "device" if device.type == "cuda" else "worker",
        )
    manifest = manifest_sha256([file.path for file in files], args.data_root)
    store = SampleStore(args.output_dir, {**settings, "manifest": manifest}, total)
    missing = distributed.broadcast(store.open(indices, args.replace) if distributed.is_main() else None)
    batches = [missing[i : i + args.sample_batch_size] for i in range(0, len(missing), args.sample_batch_size)]
    batches = batches[distributed.rank() :: distributed.world_size()]
    say(f"samples {indices[0]} to {indices[-1]} of {total} in {store.folder}: {len(missing)} to be made")

    reals = itertools.repeat(([], None))
    if clips and missing:
        chosen = distributed.broadcast(real_clips(clips, total) if distributed.is_main() else None)
        reals = real_batches(clips, chosen, batches, args.num_workers, device)
    for batch, (places, real) in zip(tqdm(batches, "batches", disable=not distributed.is_main()), reals):
        if generator.needs_real and len(places) < len(batch):
            raise ValueError(f"samples {batch[0]} to {batch[-1]} need a real clip each, and there are {len(places)}: "
                             "lower --num_samples")
        with torch.no_grad():
            videos, values = generator.generate(batch, real)
            videos = videos.float().clamp(0, 1)
            if i3d:
                values["fake"] = i3d(videos, resize=protocol.i3d_resize)
                values["real"] = torch.full_like(values["fake"], math.nan)  # where there is no real clip
                if places:
                    values["real"][places] = i3d(real, resize=protocol.i3d_resize)
        store.add(batch, videos, [] if args.stats_only else args.save, **values)

    def make_report(rows: dict) -> tuple[dict, dict, dict | None]:
        """The record and the results of all samples, and their row of the table."""
        results = {name: float(rows[name].mean()) for name in ("nll", "bits_per_dim") if name in rows}
        num_real = 0
        if i3d:
            real, fake = torch.from_numpy(rows["real"]), torch.from_numpy(rows["fake"])
            real = real[real.isfinite().all(1)]
            num_real = len(real)
            results |= fvd.report(real, fake, protocol.divisor)
        facts = record(
            protocol, num_real=num_real, num_generated=total, num_frames=num_frames, size=size, i3d_eps=args.i3d_eps,
            dataset="UCF-101" if is_ucf101(args.video_name, len(files)) else args.video_name,
            split=next((name for name in ("train", "test", "val") if name in args.video_name), "all"), seed=args.seed,
            extractor_sha256=i3d.weights_sha256 if i3d else "none: --no_fvd", manifest_sha256=manifest,
            num_videos=len(files), sampler=generator.settings, model=generator.model, git_revision=git_revision(),
            world_size=distributed.world_size(),
        )
        labels = rows["label"].tolist()
        captions = [f"sample {i}" + (f": {generator.captions[label]}" if generator.captions else "")
                    for i, label in enumerate(labels)]
        contact_sheet(store.folder / "sheet.png", [(video,) for video in store.previews()], captions, num_clips=16)
        row = {**generator.row, "num_samples": total, "NLL_sampled": results.get("nll"), "fvd": results.get("fvd"),
               "protocol": facts["title"]}
        return facts, results, row if i3d else None

    distributed.barrier()
    if distributed.is_main():
        table = Path(args.report) if args.report else Path(args.output_dir).resolve().parent / "fvd_report.csv"
        reported = store.finish(make_report, table)
        if reported:
            facts, results = reported
            say(describe(facts))
            for name, value in results.items():
                say(f"{name:>20}  {value:.6g}")
            say(f"report: {store.report}, {table}   pictures: {store.folder / 'sheet.png'}   videos: {store.videos}")


if __name__ == "__main__":
    with one_line_errors():
        main()
