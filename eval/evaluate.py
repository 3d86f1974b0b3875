"""Evaluation of a tokenizer, as both evaluation scripts run it: clips shared among processes, metrics, report.json and
contact sheet."""
import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import distributed
from common.console import print_main
from common.files import manifest_sha256
from data.clips import ClipDataset, open_quarantine
from data.lists import VideoFile
from data.loader import make_loader
from eval.i3d import I3D, MIN_FRAMES
from eval.metrics import psnr_frame
from eval.motion import check_vmaf, evenly_spaced_clips
from eval.pictures import contact_sheet, write_clips
from eval.protocols import LARP_RESIZE, PROTOCOLS
from eval.reconstruction import merge, protocol_clips, reconstruct_rows, summary
from eval.report import describe, run_record, write_record
from eval.tokenizers import Checked
from models.pretrained import WeightsError
from models.stlpips import perceptual_metric


def evaluate(
    reconstruct: Callable[[Tensor, list[int]], tuple[Tensor, Any]], files: Sequence[VideoFile],
    args: argparse.Namespace, device: torch.device, num_frames: int, size: int, model: str, settings: dict,
    dataset: str, more: Callable[[], dict[str, float]] = dict, patch: Sequence[int] | None = None,
    known: dict[int, Tensor] | None = None,
) -> dict[str, float]:
    """Measure a tokenizer under args.protocol. Rank 0 prints and writes report.json, sheet.png and, in
    reconstructions/, the first clips beside theirs.

    reconstruct: (B, 3, T, H, W) float [0, 1] and the clips' global indices -> (reconstructions of that shape, bits of a
        clip: one number or (B,)); see `eval.tokenizers.Checked`. Random numbers for a clip should depend on its index
        alone.
    model: names the weights. dataset: the folder or list of `files`. more: called at the end, on every process, for
    further numbers to report. patch: (t, h, w) of the blocks that the tokenizer's clips are made of. known: see
    `reconstruct_rows`.
    """
    if args.vmaf:
        check_vmaf()
    if num_frames < MIN_FRAMES and not args.no_fvd:
        raise ValueError(f"the clips have {num_frames} frames, but rFVD is measured by I3D, which needs {MIN_FRAMES} "
                         "or more: leave rFVD out by --no_fvd")
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
    mine = distributed.of_rank(keys)
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
    tokenizer = Checked(reconstruct, model)
    rows, examples = reconstruct_rows(
        tokenizer, loader, device, i3d, protocol.i3d_resize, perceptual, progress,
        evenly_spaced_clips(len(keys), args.motion), patch, args.vmaf, known,
    )
    if rows:
        bits = torch.tensor([tokenizer.bits[index] for index in rows["index"].tolist()], dtype=torch.float64)
        rows["bits_per_pixel"] = bits / (num_frames * size**2)
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
    write_clips(folder / "reconstructions", examples)
    print_main(describe(facts))
    print_main("\n".join(f"{name:>20}  {value:.6g}" for name, value in numbers.items()))
    print_main(f"report: {folder / 'report.json'}   pictures: {folder / 'sheet.png'}   "
               f"videos: {folder / 'reconstructions'}")
    return numbers
