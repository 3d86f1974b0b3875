"""Generate clips from a trained model and measure their Fréchet video distance under a named protocol.

CoordTok-SiT:      python3 sample.py --sit_model SIT_CKPT --first_model_ckpt CKPT --data_root DATA --output_dir OUT
LARP, by class:    python3 sample.py --ar_model hywang66/LARP-L-long-AR --tokenizer hywang66/LARP-L-long-tokenizer \\
                       --output_dir OUT --num_samples 10000 --cfg_scale 1.25 --dataset_csv ucf101_train.csv
LARP, frames:      python3 sample.py --fp --num_cond_frames 5 --ar_model hywang66/LARP-L-long-AR-FP \\
                       --tokenizer hywang66/LARP-L-long-tokenizer --output_dir OUT --dataset_csv k600_val.csv

Runs under torchrun, and in shards by hand (--starting_index, --num_samples, --num_samples_total), in any order: what is
there is not made again, and the shard that finishes last writes the report. Sample i is a function of the seed and i.
"""
import itertools
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from common import distributed
from common.cli import Parser, one_line_errors
from common.console import print_main
from common.files import manifest_sha256
from data.clips import open_quarantine
from data.lists import check_class_names, check_labels, class_names, find_lists, list_csv, list_folder
from data.video import to_bytes
from eval import fvd
from eval.i3d import I3D
from eval.motion import evenly_spaced_clips, motion_rows, motion_summary
from eval.pictures import contact_sheet
from eval.protocols import LARP_RESIZE, PROTOCOLS
from eval.report import describe, run_record
from sampling.generator import PRECISIONS
from sampling.larp import add_larp_sampling, larp_generator
from sampling.real_clips import drawn_clips, real_batches, segments
from sampling.sit import add_sit_sampling, sit_generator
from sampling.store import BackgroundWriter, SampleStore
from training.flags import add_coordtok, add_data
from training.load import add_sit
from training.log import StageClock
from training.setup import make_clips, set_up_device


def parse_args():
    parser = Parser(__doc__)
    out = parser.add_argument_group("samples")
    out.add_argument("--output_dir", required=True, help="folder of the samples and their report")
    out.add_argument("--num_samples", "--ns", dest="num_samples", type=int,
                     help="of this shard (default: 2048 of a SiT, 1024 of a LARP generator)")
    out.add_argument("--starting_index", type=int, default=0, help="first sample of this shard")
    out.add_argument("--num_samples_total", type=int, help="of all shards (default: up to the end of this one)")
    out.add_argument("--sample_batch_size", type=int, default=32, help="samples at once in each process")
    out.add_argument("--cfg_scale", "--cs", dest="cfg_scale", type=float, default=1.0,
                     help="guidance; 1 is none, 0 no condition")
    out.add_argument("--class_label", type=int, help="this class only (default: drawn uniformly, or by LARP those of "
                     "the real clips)")
    out.add_argument("--seed", type=int, default=0, help="of all that is drawn for samples, and of a SiT's real clips")
    out.add_argument("--save", nargs="+", choices=["mp4", "png"], default=["mp4"], help="png: frames, without loss")
    out.add_argument("--stats_only", action="store_true", help="write no videos, only what the report needs")
    out.add_argument("--replace", action="store_true", help="make samples anew that are there")
    out.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    out.add_argument("--dtype", choices=PRECISIONS,
                     help="autocast of a SiT (default: float32), weights of a LARP generator (default: bfloat16)")
    out.add_argument("--allow_tf32", action="store_true", help="let float32 matrix products use TF32")
    out.add_argument("--num_workers", type=int, default=4, help="loader workers of each process, for real clips")
    measure = parser.add_argument_group("report")
    names = [name for name, protocol in PROTOCOLS.items() if protocol.metrics == ("fvd",)]
    measure.add_argument("--protocol", choices=names, help="how FVD is measured (default: by the model)")
    measure.add_argument("--no_fvd", action="store_true", help="only sample: no I3D")
    measure.add_argument("--motion", type=int, default=256, help="samples, and real clips, whose warping error, "
                         "flicker, frozen frames and seams are measured, evenly spaced; optical flow takes a CPU "
                         "0.2 s for 16 frames; 0: none")
    measure.add_argument("--report", help="table of results (default: fvd_report.csv beside OUTPUT_DIR)")
    measure.add_argument("--i3d_weights", metavar="PATH", help="I3D weights (default: the cache, or a download)")
    measure.add_argument("--i3d_eps", type=float, default=1e-3, help="eps of I3D's batch norms; 1e-5: the older port's")
    measure.add_argument("--dataset_csv", help="lists of the real videos (default of LARP: ucf101_train.csv); else the "
                         "folder DATA_ROOT/VIDEO_NAME (default of a SiT: UCF-101_train)")
    measure.add_argument("--dataset_split_seed", type=int, default=42, help="draws LARP's real segments")
    add_data(parser)
    parser.set_defaults(video_name=None)
    add_sit(parser)
    add_coordtok(parser)
    flags = {"sit_model": add_sit_sampling(parser), "ar_model": add_larp_sampling(parser)}
    args = parser.parse_args()
    if (args.sit_model is None) == (args.ar_model is None):
        parser.error("which model to sample from? Give either --sit_model or --ar_model")
    for model, actions in flags.items():
        given = [action.option_strings[0] for action in actions if getattr(args, action.dest) != action.default]
        if getattr(args, model) is None and given:
            parser.error(f"{', '.join(given)} is of --{model} alone: leave it out")
    if args.dataset_csv and args.video_name:
        parser.error("--dataset_csv is a list, --video_name a folder of real videos: give one of them")
    if args.ar_model and not args.video_name:
        args.dataset_csv = args.dataset_csv or "ucf101_train.csv"
    elif not args.dataset_csv:
        args.video_name = args.video_name or "UCF-101_train"
    return args


def main():
    args = parse_args()
    device = set_up_device(args)
    generator = sit_generator(args, device) if args.sit_model else larp_generator(args, device)
    num_frames, size = generator.num_frames, generator.size

    count = (2048 if args.sit_model else 1024) if args.num_samples is None else args.num_samples
    total = args.num_samples_total or args.starting_index + count
    if not (0 <= args.starting_index < total and count > 0):
        raise ValueError(f"--starting_index {args.starting_index} --num_samples {count} are none of the samples 0 to "
                         f"{total - 1} (--num_samples_total)")
    indices = range(args.starting_index, min(args.starting_index + count, total))

    protocol = PROTOCOLS[args.protocol or generator.protocols[0]]
    settings, i3d = {**generator.settings, "device": device.type, "allow_tf32": args.allow_tf32}, None
    if protocol.name not in generator.protocols:
        raise ValueError(f"--protocol {protocol.name} is not for this model: choose {' or '.join(generator.protocols)}")
    if not args.no_fvd:
        if num_frames < 10:
            raise ValueError(f"this model's clips have {num_frames} frames, FVD needs 10 or more: give --no_fvd")
        i3d = I3D.from_weights(args.i3d_weights, eps=args.i3d_eps).to(device)
        settings |= {"protocol": protocol.name, "i3d": i3d.weights_sha256, "i3d_eps": args.i3d_eps,
                     "motion": args.motion}

    # Real clip i stands beside sample i: it gives the condition, and is measured by the shard that makes sample i.
    files, clips, manifest, by_segments = [], None, "none", protocol.name.startswith("larp")
    dataset = args.dataset_csv or args.video_name
    if i3d or generator.num_labels or generator.needs_real:
        if args.dataset_csv:
            files = list_csv(dataset, want_labels=generator.num_labels > 0)
            root = os.path.commonpath([file.path for file in files])
        else:
            files, root = list_folder(Path(args.data_root) / dataset), args.data_root
        manifest = manifest_sha256([file.path for file in files], root)
        rule = "larp" if protocol.resize == LARP_RESIZE else "coordtok"
        quarantine = open_quarantine(Path(args.output_dir), args.decode_timeout)
        clips = make_clips(args, files, num_frames, size, rule, device, quarantine, damaged="skip",
                           short="repeat" if by_segments else "pad")
        if generator.num_labels:
            check_labels(files, generator.num_labels, dataset, trained=True)
            check_class_names(files, generator.class_names, dataset)
        if by_segments:
            settings |= {"dataset_split_seed": args.dataset_split_seed}
    store = SampleStore(args.output_dir, {**settings, "manifest": manifest}, total)
    missing = distributed.broadcast(store.open(indices, args.replace) if distributed.is_main() else None)
    batches = [missing[i : i + args.sample_batch_size] for i in range(0, len(missing), args.sample_batch_size)]
    batches = batches[distributed.rank() :: distributed.world_size()]
    print_main(f"samples {indices[0]} to {indices[-1]} of {total} in {store.folder}: {len(missing)} to be made")

    keys, num_distinct, reals, clock = [], 0, itertools.repeat(([], None)), StageClock(device)
    if clips and missing:
        if distributed.is_main():
            split_seed = args.dataset_split_seed
            keys = segments(clips, total, split_seed, store.folder) if by_segments else drawn_clips(clips, total)
        keys = distributed.broadcast(keys)
        num_distinct = len({(key.index, key.start) for key in keys})
        if num_distinct < total:
            print_main(f"{dataset} has {num_distinct} clips for {total} samples: FVD compares those with these")
        if generator.needs_real and len(keys) < total:
            raise ValueError(f"samples 0 to {total - 1} need a real clip each, and there are {len(keys)}: lower "
                             "--num_samples")
        clock.mark("finding real clips")
        if i3d or generator.needs_real:
            reals = real_batches(clips, keys, batches, args.num_workers, device)

    moving = evenly_spaced_clips(total, args.motion)

    def features(videos: Tensor) -> Tensor:
        if protocol.num_cond_frames:  # frame prediction is compared at 64x64
            frames = rearrange(videos, "b c t h w -> (b t) c h w")
            frames = F.interpolate(frames, (protocol.size, protocol.size), mode="bilinear", antialias=True)
            videos = rearrange(frames, "(b t) c h w -> b c t h w", b=len(videos))
        return i3d(videos, resize=protocol.i3d_resize)

    # While one batch is written, the next is made.
    with BackgroundWriter(device) as behind, torch.no_grad():
        for batch, (places, real) in zip(tqdm(batches, "batches", disable=not distributed.is_main()), reals):
            clock.mark("waiting for real clips")
            # A model that continues real clips has nothing to start from where one is damaged.
            made = [batch[place] for place in places] if generator.needs_real else batch
            given, videos, values = real if generator.needs_real else None, torch.empty(0), {}
            if made:
                labels = [files[keys[i].index].label if i < len(keys) else -1 for i in made]
                videos, values = generator.generate(made, labels, given)
                values["finite"] = videos.isfinite().flatten(1).all(1)  # looked at by the writer, without waiting here
                videos = videos.float().clamp(0, 1)
            clock.mark("sampling")
            if made and i3d:
                values["fake"] = features(videos)
                values["real"] = torch.full_like(values["fake"], math.nan)  # where there is no real clip
                rows = [made.index(batch[place]) for place in places if batch[place] < num_distinct]
                if rows:
                    values["real"][rows] = features(real[: len(rows)])
                clock.mark("I3D")
                if moving:
                    chosen = [i in moving for i in made]
                    values |= motion_rows(videos, chosen, patch=generator.patch)
                    beside = torch.zeros_like(videos)
                    if rows:
                        beside[rows] = real[: len(rows)]
                    chosen = [picked and row in rows for row, picked in enumerate(chosen)]
                    found = motion_rows(beside, chosen, patch=generator.patch)
                    values |= {f"{name}_real": value for name, value in found.items()}
                    clock.mark("motion")
            behind.run(
                store.add, made, to_bytes(videos), [] if args.stats_only else args.save,
                given if given is None else to_bytes(given), [i for i in batch if i not in made], **values,
            )
            clock.mark("waiting for writing")
    clock.mark("waiting for writing")
    if batches:
        print_main(f"time: {clock} (writing itself {behind.seconds:.1f} s, behind)")

    def make_report(rows: dict) -> tuple[dict, dict, dict | None]:
        """The record and the results of all samples, and their row of the table."""
        num_made, num_real = len(rows["index"]), 0
        results = {name: float(rows[name].mean()) for name in ("nll", "bits_per_dim", "psnr_given") if name in rows}
        if i3d:
            real, fake = torch.from_numpy(rows["real"]), torch.from_numpy(rows["fake"])
            real = real[real.isfinite().all(1)]
            num_real = len(real)
            results |= fvd.report(real, fake, protocol.divisor)
            results |= motion_summary({name: torch.from_numpy(value) for name, value in rows.items()})
        if num_made < total:
            print_main(f"{total - num_made} samples are left out: their clips cannot be decoded (quarantine.txt)")
        name = "none"
        if files:
            parts = find_lists(dataset) if args.dataset_csv and not dataset.startswith("null") else [Path(dataset)]
            name = "+".join(part.name for part in parts)
        facts = run_record(
            protocol, name, len(files), i3d, num_real=num_real, num_generated=num_made, num_frames=num_frames,
            size=protocol.size if protocol.num_cond_frames else size, num_cond_frames=generator.num_cond_frames,
            i3d_eps=args.i3d_eps, seed=args.dataset_split_seed if by_segments else args.seed, manifest_sha256=manifest,
            sampler=generator.settings, model=generator.model,
        )
        if previews := store.previews():
            names = generator.class_names or (class_names(files) if generator.num_labels else [])
            shown = dict(zip(rows["index"].tolist(), rows["label"].tolist()))
            named = {label: f": {name}" for label, name in enumerate(names)}  # the model may have more classes
            captions = [f"sample {i}{named.get(shown[i], '')}" for i in previews]
            contact_sheet(store.folder / "sheet.png", list(previews.values()), captions, ("real", "generated"), 16)
        row = {**generator.row, "num_samples": num_made, "NLL_sampled": results.get("nll"), "fvd": results.get("fvd"),
               "protocol": facts["title"]}
        return facts, results, {**settings, **row} if i3d else None

    distributed.barrier()
    if distributed.is_main():
        table = Path(args.report) if args.report else Path(args.output_dir).resolve().parent / "fvd_report.csv"
        reported = store.finish(make_report, table)
        if reported:
            facts, results = reported
            print_main(describe(facts))
            for name, value in results.items():
                print_main(f"{name:>20}  {value:.6g}")
            reports = f"{store.report}, {table}" if i3d else store.report
            print_main(f"report: {reports}   pictures: {store.folder / 'sheet.png'}   videos: {store.videos}")


if __name__ == "__main__":
    with one_line_errors():
        main()
