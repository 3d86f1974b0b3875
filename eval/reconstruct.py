"""Reconstruction of any tokenizer, and of video codecs beside it, under a named protocol.

    python -m eval.reconstruct --tokenizer FILE.py:NAME --tokenizer_args key=value --protocol larp_rfvd \\
        --data_root DATA --video_name UCF-101_train
    python -m eval.reconstruct --tokenizer codec:h264 codec:av1 --bpp 0.05 0.1 --dataset_csv ucf101_train.csv

NAME is a callable video -> (video, bits), or makes one: see docs/any_tokenizer.md. Several tokenizers or rates get a
report each, in a folder of their own, one table and one plot over bits per pixel. Runs under torchrun too.
"""
import argparse
import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import distributed
from common.cli import Parser, one_line_errors
from common.console import print_main
from data.lists import list_csv, list_folder
from data.video import TIMEOUT
from eval.codecs import FPS, Codec
from eval.evaluate import evaluate
from eval.protocols import PROTOCOLS
from eval.rate_distortion import write_comparison
from eval.tokenizers import DECLARED, clip_of, load_tokenizer, parse_arguments
from models.pretrained import weights_sha256
from training.flags import add_evaluation, check_given

CODEC = "codec:"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m eval.reconstruct")
    parser.add_argument("--tokenizer", nargs="+", required=True, metavar="FILE.py:NAME|codec:NAME",
                        help="what to evaluate; codec:h264, codec:h265 and codec:av1 need --bpp or --bitrates")
    parser.add_argument("--tokenizer_args", nargs="*", default=[], metavar="KEY=VALUE",
                        help="arguments of the function or class that makes the tokenizer")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--bpp", type=float, nargs="+", help="bits per pixel of the codecs")
    rates.add_argument("--bitrates", type=float, nargs="+", help=f"kbit/s of the codecs, at {FPS} frames per second")
    parser.add_argument("--num_frames", type=int, help="frames of a clip (default: the tokenizer's, else PROTOCOL's)")
    parser.add_argument("--size", type=int, help="height and width of a clip, likewise")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_csv", default="ucf101_train.csv",
                      help="lists of videos; --video_name names a folder instead")
    data.add_argument("--data_root", default="/data", help="folder that holds the data set's folder")
    data.add_argument("--video_name", help="the data set's folder: CLASS/VIDEO files")
    data.add_argument("--decode_timeout", type=float, default=TIMEOUT,
                      help="seconds after which a file counts as damaged")
    add_evaluation(parser, protocol="larp_rfvd")
    args = parser.parse_args(argv)
    check_given(parser, args)
    codecs = [name for name in args.tokenizer if name.startswith(CODEC)]
    if bool(codecs) != bool(args.bpp or args.bitrates):
        parser.error(f"{codecs[0]} needs --bpp or --bitrates" if codecs else "--bpp and --bitrates are of codecs: give "
                     "--tokenizer codec:h264, or leave them out")
    if args.tokenizer_args and len(args.tokenizer) - len(codecs) != 1:
        parser.error("--tokenizer_args are for one FILE.py:NAME, but --tokenizer has "
                     f"{len(args.tokenizer) - len(codecs)} of them")
    if repeated := {name for name in args.tokenizer if args.tokenizer.count(name) > 1}:
        parser.error(f"--tokenizer has {', '.join(sorted(repeated))} twice")
    return args


def tokenizers(args: argparse.Namespace) -> Iterator[tuple[str, Callable, str, dict]]:
    """(name, tokenizer, what names it in the record, its settings) of each that is asked for, codecs at each rate."""
    usual = PROTOCOLS[args.protocol]
    for source in args.tokenizer:
        if source.startswith(CODEC):
            pixels = (args.size or usual.size) ** 2
            for rate in args.bpp or [1000 * bitrate / FPS / pixels for bitrate in args.bitrates]:
                codec = Codec(source.removeprefix(CODEC), rate)
                yield f"{codec.name}_{rate:.4g}", codec, f"{source} {rate:.4g}", codec.settings
            continue
        arguments = parse_arguments(args.tokenizer_args)
        tokenizer = load_tokenizer(source, arguments)
        path, name = source.rsplit(":", 1)
        digest = hashlib.sha256(Path(path).read_bytes())
        if isinstance(tokenizer, nn.Module):
            digest.update(weights_sha256(tokenizer).encode())
        settings = {"arguments": {key: str(value) for key, value in arguments.items()},
                    **{key: getattr(tokenizer, key) for key in DECLARED}}
        yield f"{Path(path).stem}_{name}", tokenizer, f"{Path(path).name}:{name} {digest.hexdigest()[:12]}", settings


def without_indices(tokenizer: Callable, video: torch.Tensor, indices: list[int]) -> tuple[torch.Tensor, Any]:
    """What the tokenizer makes of a batch; no tokenizer here needs the clips' indices."""
    return tokenizer(video)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = distributed.setup(args.device)
    if args.video_name:
        dataset, files = args.video_name, list_folder(Path(args.data_root) / args.video_name)
    else:
        dataset, files = args.dataset_csv, list_csv(args.dataset_csv)
    protocol = PROTOCOLS[args.protocol]
    known: dict[tuple[int, int], dict[int, torch.Tensor]] = {}
    chosen = list(tokenizers(args))  # all are loaded before the first is measured
    clips = [clip_of(tokenizer, model, args.num_frames, args.size, (protocol.num_frames, protocol.size))
             for _, tokenizer, model, _ in chosen]
    folder = Path(args.output_dir or Path("results/eval") / protocol.name)
    reports = []
    for (name, tokenizer, model, settings), (num_frames, size) in zip(chosen, clips):
        print_main(f"{model}: {num_frames} frames of {size}x{size}")
        args.output_dir = folder / name if len(chosen) > 1 else folder
        if isinstance(tokenizer, nn.Module):
            tokenizer.to(device)
        evaluate(partial(without_indices, tokenizer), files, args, device, num_frames, size, model, settings,
                 dataset, known=known.setdefault((num_frames, size), {}))
        if isinstance(tokenizer, nn.Module):
            tokenizer.cpu()  # makes room for the next
        reports.append(args.output_dir / "report.json")
    if len(set(clips)) == 1 < len(chosen) and distributed.is_main():
        print(write_comparison(reports, folder))


if __name__ == "__main__":
    with one_line_errors():
        main()
