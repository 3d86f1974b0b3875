"""Generate clips from a trained model, and measure their Fréchet video distance (FVD).

CoordTok-SiT:    python3 sample.py --sit_model SIT_CKPT --first_model_ckpt CKPT --data_root DATA \\
                     --output_dir OUT
LARP, classes:   python3 sample.py --ar_model hywang66/LARP-L-long-AR \\
                     --tokenizer hywang66/LARP-L-long-tokenizer --output_dir OUT \\
                     --num_samples 10000 --cfg_scale 1.25 --dataset_csv ucf101_train.csv
LARP, frames:    python3 sample.py --fp --num_cond_frames 5 --ar_model hywang66/LARP-L-long-AR-FP \\
                     --tokenizer hywang66/LARP-L-long-tokenizer --output_dir OUT \\
                     --dataset_csv k600_val.csv

It runs under torchrun too, and in shards (--starting_index, --num_samples, --num_samples_total)
in any order. Samples that exist are not made again. The shard that finishes last writes the report.
Sample i is a function of the seed and i.
"""
from common.cli import one_line_errors
from sampling import arguments


def parse_args():
    return arguments.parse(__doc__)


if __name__ == "__main__":
    parse_args()  # before the slow imports: --help and a mistake in a flag are answered at once

import itertools
from functools import partial
from pathlib import Path

import torch

from common import distributed
from common.console import Progress, print_main
from data.video import to_bytes
from eval.i3d import I3D
from eval.motion import evenly_spaced_clips
from eval.protocols import PROTOCOLS
from eval.report import describe
from sampling.larp import larp_generator
from sampling.real_clips import find_clips, open_real, real_batches
from sampling.results import feature_rows, make_report, motion_of_both
from sampling.sit import sit_generator
from sampling.store import BackgroundWriter, SampleStore
from training.log import StageClock
from training.setup import set_up_device


def main():
    args = parse_args()
    device = set_up_device(args)
    generator = sit_generator(args, device) if args.sit_model else larp_generator(args, device)

    # The samples of this shard, of all shards together, and the settings on which all must agree.
    total = args.num_samples_total or args.starting_index + args.num_samples
    if args.num_samples < 1:
        raise ValueError(f"--num_samples is {args.num_samples}, expected 1 or more")
    if not 0 <= args.starting_index < total:
        raise ValueError(f"--starting_index {args.starting_index} --num_samples {args.num_samples} are none of the "
                         f"samples 0 to {total - 1} (--num_samples_total)")
    indices = range(args.starting_index, min(args.starting_index + args.num_samples, total))
    settings = {**generator.settings, "device": device.type, "allow_tf32": args.allow_tf32}
    protocol, i3d = PROTOCOLS[args.protocol or generator.protocols[0]], None
    if protocol.name not in generator.protocols:
        raise ValueError(f"--protocol {protocol.name} is not for this model: choose {' or '.join(generator.protocols)}")
    if not args.no_fvd:
        if generator.num_frames < 10:
            raise ValueError(f"this model's clips have {generator.num_frames} frames, but FVD needs 10 or more: give "
                             "--no_fvd")
        i3d = I3D.from_weights(args.i3d_weights, eps=args.i3d_eps).to(device)
        settings |= {"protocol": protocol.name, "i3d": i3d.weights_sha256, "i3d_eps": args.i3d_eps,
                     "motion": args.motion}

    # Real clip i is paired with sample i: the sample takes its label or first frames, and is measured beside it.
    videos_needed = i3d or generator.num_labels or generator.needs_real
    real_videos = open_real(args, generator, protocol, device) if videos_needed else None
    if real_videos and real_videos.split_seed is not None:
        settings |= {"dataset_split_seed": real_videos.split_seed}
    manifest = real_videos.manifest if real_videos else "none"
    store = SampleStore(args.output_dir, {**settings, "manifest": manifest}, total)
    missing = distributed.broadcast(store.open(indices, args.replace) if distributed.is_main() else None)
    batches = [missing[i : i + args.sample_batch_size] for i in range(0, len(missing), args.sample_batch_size)]
    batches = distributed.of_rank(batches)
    print_main(f"samples {indices[0]} to {indices[-1]} of {total} in {store.folder}: {len(missing)} to make")

    keys, num_distinct, reals, clock = [], 0, itertools.repeat(([], None)), StageClock(device)
    if real_videos and missing:
        keys = distributed.broadcast(find_clips(real_videos, total, store.folder) if distributed.is_main() else None)
        num_distinct = len({(key.index, key.start) for key in keys})
        if num_distinct < total:
            print_main(f"{real_videos.name} has {num_distinct} clips for {total} samples: FVD compares the samples "
                       "with these")
        if generator.needs_real and len(keys) < total:
            raise ValueError(f"samples 0 to {total - 1} need a real clip each, and there are {len(keys)}: lower "
                             "--num_samples")
        clock.mark("finding real clips")
        if i3d or generator.needs_real:
            reals = real_batches(real_videos.clips, keys, batches, args.num_workers, device)

    # The next batch is made while a batch is written.
    moving = evenly_spaced_clips(total, args.motion)
    with BackgroundWriter(device) as writer, torch.no_grad():
        for batch, (places, real) in zip(Progress(batches, "batches", disable=not distributed.is_main()), reals):
            clock.mark("waiting for real clips")
            # Where its clip is damaged, a model that continues real clips has nothing to start from.
            made = [batch[place] for place in places] if generator.needs_real else batch
            given, videos, values = real if generator.needs_real else None, torch.empty(0), {}
            if made:
                labels = [real_videos.files[keys[i].index].label if i < len(keys) else -1 for i in made]
                videos, values = generator.generate(made, labels, given)
                values["finite"] = videos.isfinite().flatten(1).all(1)  # the writer looks at it, so this does not wait
                videos = videos.float().clamp(0, 1)
            clock.mark("sampling")
            if made and i3d:
                rows = [made.index(batch[place]) for place in places if batch[place] < num_distinct]
                values |= feature_rows(i3d, protocol, videos, real, rows)
                clock.mark("I3D")
                if moving:
                    values |= motion_of_both(videos, real, rows, [i in moving for i in made], generator.patch)
                    clock.mark("motion")
            writer.run(
                store.add, made, to_bytes(videos), [] if args.stats_only else args.save,
                given if given is None else to_bytes(given), [i for i in batch if i not in made], **values,
            )
            clock.mark("waiting for writing")
    clock.mark("waiting for writing")
    if batches:
        print_main(f"time: {clock} (writing, in the background: {writer.seconds:.1f} s)")

    distributed.barrier()
    if distributed.is_main():
        table = Path(args.report) if args.report else Path(args.output_dir).resolve().parent / "fvd_report.csv"
        report = partial(make_report, store, generator, protocol, real_videos, i3d, settings, args)
        if reported := store.finish(report, table):
            facts, results = reported
            print_main(describe(facts))
            for name, value in results.items():
                print_main(f"{name:>20}  {value:.6g}")
            reports = f"{store.report}, {table}" if i3d else store.report
            print_main(f"report: {reports}   pictures: {store.folder / 'sheet.png'}   videos: {store.videos}")


if __name__ == "__main__":
    with one_line_errors():
        main()
