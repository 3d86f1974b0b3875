"""Evaluation of a tokenizer, as both evaluation scripts run it: clips shared among processes, metrics, report.json and
contact sheet."""
import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from common import distributed
from common.console import print_main
from common.files import manifest_sha256
from data.clips import ClipDataset, open_quarantine
from data.lists import VideoFile
from data.loader import make_loader
from eval.i3d import I3D
from eval.metrics import psnr_frame
from eval.motion import check_vmaf, evenly_spaced_clips
from eval.pictures import contact_sheet
from eval.protocols import LARP_RESIZE, PROTOCOLS
from eval.reconstruction import merge, protocol_clips, reconstruct_rows, summary
from eval.report import describe, run_record, write_record
from models.pretrained import WeightsError
from models.stlpips import perceptual_metric


def evaluate(
    reconstruct: Callable[[Tensor, list[int]], Tensor], files: Sequence[VideoFile], args: argparse.Namespace,
    device: torch.device, num_frames: int, size: int, model: str, settings: dict, dataset: str,
    more: Callable[[], dict[str, float]] = dict, patch: Sequence[int] | None = None,
) -> dict[str, float]:
    """Measure a tokenizer under args.protocol. Rank 0 prints and writes report.json and sheet.png.

    reconstruct: as `reconstruct_rows` takes it. model: names the weights. dataset: the folder or list of `files`.
    more: called at the end, on every process, for further numbers to report. patch: (t, h, w) of the blocks that the
    tokenizer's clips are made of.
    """
    if args.vmaf:
        check_vmaf()
    protocol = PROTOCOLS[args.protocol]
    folder = Path(args.output_dir or Path("results/eval") / protocol.name)
    quarantine = open_quarantine(folder, args.decode_timeout)
    paths = [file.path for file in files]
    manifest = manifest_sha256(paths, os.path.commonpath(paths))
    num_videos = len(files)
    files, keys = distributed.broadcast(
        protocol_clips(protocol, files, num_frames, args.num_clips, quarantine, args.decode_timeout)
        if distributed.is_main() else None
    )
    rule = "larp" if protocol.resize == LARP_RESIZE else "coordtok"
    clips = ClipDataset(
        files, num_frames, size, rule, seed=args.seed, short="repeat", damaged="skip", quarantine=quarantine,
        resize="device" if device.type == "cuda" else "worker", timeout=args.decode_timeout,
    )
    mine = keys[distributed.rank() :: distributed.world_size()]
    batches = [mine[i : i + args.batch_size] for i in range(0, len(mine), args.batch_size)]
    loader = make_loader(clips, batches, args.num_workers, pin_memory=device.type == "cuda")

    learned, perceptual = {"lpips": protocol.lpips if args.perceptual == "lpips" else "none"}, None
    try:
        perceptual = perceptual_metric(args.perceptual, weights=args.lpips_weights).to(device)
        if args.perceptual != "lpips" or args.lpips_weights != "auto":
            learned[args.perceptual] = perceptual.description
    except WeightsError as error:
        learned[args.perceptual] = "unavailable"
        print_main(f"{args.perceptual} is left out: {error}")
    i3d = None if args.no_fvd else I3D.from_weights(args.i3d_weights, eps=args.i3d_eps).to(device)

    progress = "clips" if distributed.is_main() else None
    rows, examples = reconstruct_rows(
        reconstruct, loader, device, i3d, protocol.i3d_resize, perceptual, progress,
        evenly_spaced_clips(len(keys), args.motion), patch, args.vmaf,
    )
    rows = merge(distributed.gather(rows))
    numbers = summary(rows, protocol.divisor) | more()
    if not distributed.is_main():
        return numbers
    if len(rows["index"]) < len(keys):
        print_main(f"{len(keys) - len(rows['index'])} clips could not be decoded and are left out: "
                   f"see {quarantine.path}")
    facts = run_record(
        protocol, dataset, num_videos, i3d, num_real=len(rows["index"]), num_generated=len(rows["index"]),
        num_frames=num_frames, size=size, i3d_eps=args.i3d_eps, seed=args.seed, manifest_sha256=manifest,
        sampler=settings, model=model, **learned,
    )
    write_record(folder / "report.json", facts, numbers)
    captions = [f"PSNR {psnr_frame(a[None], b[None]).item():.2f} dB" for a, b in examples]
    contact_sheet(folder / "sheet.png", examples, captions)
    print_main(describe(facts))
    print_main("\n".join(f"{name:>20}  {value:.6g}" for name, value in numbers.items()))
    print_main(f"report: {folder / 'report.json'}   pictures: {folder / 'sheet.png'}")
    return numbers
