"""sample.py from end to end, with videos written in line and behind, taking turns:

    python -m scripts.benchmarks.sample [--rounds 3]

LARP's frame prediction by random weights: real clips are decoded, continued, measured (I3D: on a GPU, or --fvd), and
written as mp4 with the samples. The plain way writes one video after the other and then makes the next batch. The small
size on a CPU (clips of 16 frames of 64x64, 128 codes), the published one on a GPU; the videos are the demo's. Prints
what sample.py says of its time, which leaves out the loading of the models.
"""
import argparse
import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch

import sample
from data.demo import DemoConfig, make_demo
from eval.i3d import I3D
from models.larp_ar import SIZES, LARPGenerator
from models.larp_tokenizer import LARPTokenizer
from sampling import store
from scripts.benchmarks.common import SMALL_AR, SMALL_LARP, add_record, device_name, record


class InLine(store.BackgroundWriter):
    def run(self, function, *args, **kwargs) -> None:
        super().run(function, *args, **kwargs)
        self.last.result()


WAYS = {  # how batches are written, and how many videos of one at once
    "one by one": (InLine, 1),
    "several at once": (InLine, store.NUM_WRITERS),
    "behind as well": (store.BackgroundWriter, store.NUM_WRITERS),
}


def run(flags: list[str], folder: Path, way: str) -> str:
    """What sample.py says of its time."""
    behind, num_writers = WAYS[way]
    with (
        patch.object(sample, "Behind", behind),
        patch.object(store, "NUM_WRITERS", num_writers),
        patch.object(sys, "argv", ["sample.py", *flags, "--output_dir", str(folder)]),
        contextlib.redirect_stdout(io.StringIO()) as said,
        contextlib.redirect_stderr(io.StringIO()),
    ):
        sample.main()
    shutil.rmtree(folder)
    return next(line for line in said.getvalue().splitlines() if line.startswith("time: "))


def save_models(folder: Path, on_gpu: bool) -> None:
    """A generator, its tokenizer and I3D, whose times do not depend on their weights."""
    tokenizer = LARPTokenizer(**{} if on_gpu else SMALL_LARP)
    torch.nn.init.xavier_uniform_(tokenizer.final_layer.linear.weight)  # zeros would give clips of one colour
    tokenizer.save_pretrained(folder / "tokenizer")
    codes = tokenizer.config.bottleneck_token_num
    LARPGenerator(
        **SIZES["llama-abs-LP"] if on_gpu else SMALL_AR, frame_prediction=True, max_seq_len=codes,
        cls_token_num=codes + 1, vocab_size=tokenizer.config.bottleneck.args.regularizer.args.codebook_size,
    ).save_pretrained(folder / "generator")
    torch.save(I3D().state_dict(), folder / "i3d.pt")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way, taken in turn; the median counts")
    parser.add_argument("--batch", type=int, help="samples at once (default: 8 on a CPU, 64 on a GPU)")
    parser.add_argument("--num_batches", type=int, default=4)
    parser.add_argument("--fvd", action=argparse.BooleanOptionalAction, help="I3D too (default: on a GPU)")
    add_record(parser)
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    batch = args.batch or (64 if on_gpu else 8)
    print(f"{device_name(device)}, {len(os.sched_getaffinity(0))} cores; torch {torch.__version__}; "
          f"{args.num_batches} batches of {batch}")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_models(folder, on_gpu)
        num_samples = batch * args.num_batches
        groups = tuple(range(1, 1 + -(-num_samples // 48)))  # of 8 videos, each 6 windows of 16 frames
        make_demo(folder, DemoConfig(groups=groups, clips=1, min_frames=96, max_frames=96))
        flags = [
            "--device", args.device, "--data_root", name, "--video_name", "UCF-101", "--num_samples", str(num_samples),
            "--ar_model", f"{name}/generator", "--tokenizer", f"{name}/tokenizer", "--fp", "--num_cond_frames", "5",
            "--sample_batch_size", str(batch), "--dtype", "bfloat16" if on_gpu else "float32",
            "--num_workers", "8" if on_gpu else "1",
        ]
        measured = on_gpu if args.fvd is None else args.fvd
        flags += ["--i3d_weights", f"{name}/i3d.pt"] if measured else ["--no_fvd"]
        said = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way, lines in said.items():
                lines.append(run(flags, folder / "out", way))
    seconds = {}
    for way, lines in said.items():
        line = sorted(lines, key=lambda line: float(line.split()[1]))[args.rounds // 2]
        seconds[way] = float(line.split()[1])
        ratio = seconds["one by one"] / seconds[way]
        print(f"  {way:<16}{num_samples / seconds[way]:>8.2f} clips/s{ratio:>8.2f}x   {line}")
        if way != "one by one":
            record(args.record, "sample.py", f"videos written {way}", ratio)


if __name__ == "__main__":
    main()
