"""What the evaluation scripts of all tokenizers share: flags, clips split over processes, report, record, pictures."""
import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.clips import ClipDataset, VideoFile, make_loader
from eval.i3d import I3D
from eval.metrics import psnr_frame
from eval.pictures import contact_sheet
from eval.protocols import LARP_RESIZE, PROTOCOLS, describe, git_revision, manifest_sha256, record, write_record
from eval.reconstruction import merge, protocol_clips, reconstruct_rows, summary
from models.losses import Perceptual
from models.released import WeightsError
from training import distributed
from training.arguments import Parser
from training.log import open_quarantine, say


def add_evaluation(parser: Parser, protocol: str, batch_size: int = 8) -> None:
    group = parser.add_argument_group("evaluation")
    names = [name for name, known in PROTOCOLS.items() if "reconstruction" in known.description]
    group.add_argument("--protocol", choices=names, default=protocol, help="how the numbers are made")
    group.add_argument("--num_clips", type=int, help="clips, where it is not the protocol's number")
    group.add_argument("--batch_size", type=int, default=batch_size, help="clips at once in each process")
    group.add_argument("--seed", type=int, default=0, help="seeds the first frames of clips")
    group.add_argument("--i3d_weights", metavar="PATH", help="I3D weights (default: the cache, or a download into it)")
    group.add_argument("--i3d_eps", type=float, default=1e-3, help="eps of I3D's batch norms; 1e-5 is the older port's")
    group.add_argument("--lpips_weights", default="auto", metavar="auto|random|PATH", help="LPIPS's VGG16 backbone")
    group.add_argument("--no_fvd", action="store_true", help="leave rFVD out")
    group.add_argument("--output_dir", help="folder of the report (default: results/eval/PROTOCOL)")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    group.add_argument("--num_workers", type=int, default=4, help="loader workers of each process")


def evaluate(
    reconstruct: Callable[[Tensor, list[int]], Tensor], files: Sequence[VideoFile], args: argparse.Namespace,
    device: torch.device, num_frames: int, size: int, model: str, settings: dict, dataset: str,
    more: Callable[[], dict[str, float]] = dict,
) -> dict[str, float]:
    """Measure a tokenizer under args.protocol. Rank 0 prints and writes report.json and sheet.png.

    reconstruct: as `reconstruct_rows` takes it. model: names the weights. dataset: the folder or list of `files`.
    more: called at the end, on every process, for numbers to report beside the rest.
    """
    protocol = PROTOCOLS[args.protocol]
    folder = Path(args.output_dir or Path("results/eval") / protocol.name)
    quarantine = open_quarantine(folder, args.decode_timeout)
    paths = [file.path for file in files]
    manifest = manifest_sha256(paths, os.path.commonpath(paths))
    split = next((name for name in ("train", "test", "val") if name in dataset), "all")
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

    lpips, perceptual = protocol.lpips, None
    try:
        perceptual = Perceptual(weights=args.lpips_weights).to(device)
        if args.lpips_weights != "auto":
            lpips = perceptual.description
    except WeightsError as error:
        lpips = "unavailable"
        say(f"LPIPS is left out: {error}")
    i3d = None if args.no_fvd else I3D.from_weights(args.i3d_weights, eps=args.i3d_eps).to(device)

    progress = "clips" if distributed.is_main() else None
    rows, examples = reconstruct_rows(
        reconstruct, loader, device, size, rule, i3d, protocol.i3d_resize, perceptual, progress
    )
    rows = merge(distributed.gather(rows))
    numbers = summary(rows, protocol.divisor) | more()
    if not distributed.is_main():
        return numbers
    if len(rows["index"]) < len(keys):
        say(f"{len(keys) - len(rows['index'])} clips could not be decoded and are left out: see {quarantine.path}")
    facts = record(
        protocol, num_real=len(rows["index"]), num_generated=len(rows["index"]), num_frames=num_frames, size=size,
        dataset="UCF-101" if is_ucf101(dataset, num_videos) else dataset, split=split,
        extractor_sha256=i3d.weights_sha256 if i3d else "none: --no_fvd", i3d_eps=args.i3d_eps, seed=args.seed,
        manifest_sha256=manifest, num_videos=num_videos, sampler=settings, model=model,
        git_revision=git_revision(), world_size=distributed.world_size(), lpips=lpips,
    )
    write_record(folder / "report.json", facts, numbers)
    captions = [f"PSNR {psnr_frame(a[None], b[None]).item():.2f} dB" for a, b in examples]
    contact_sheet(folder / "sheet.png", examples, captions)
    say(describe(facts))
    say("\n".join(f"{name:>20}  {value:.6g}" for name, value in numbers.items()))
    say(f"report: {folder / 'report.json'}   pictures: {folder / 'sheet.png'}")
    return numbers


def is_ucf101(dataset: str, num_videos: int) -> bool:
    """Whether a folder or list that calls itself UCF-101 has as many videos as a split of it."""
    name = Path(dataset).name.upper().replace("-", "")
    return name.startswith("UCF101") and num_videos in (9537, 3783, 13320)
