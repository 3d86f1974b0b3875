"""Kill, damage, fill and resume runs at random, and see that nothing is lost:

    python -m tests.soak --minutes 10 --seed 1

Each trial takes one of the training scripts or sample.py at a tiny size, ends it a few times by signals, damages what
it left, takes its videos away for a moment, and lets it finish. Metrics, weights and samples must then equal those of
an undisturbed run to the last bit, no good video may be in quarantine, and every error must be one line. Choices follow
from the seed; when a signal arrives also depends on the machine. The exit code is 1 where something was lost.
"""
import argparse
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from helpers import TINY_COORDTOK, logged, tiny_larp  # noqa: E402

import sample  # noqa: E402
import train_ar  # noqa: E402
import train_coordtok  # noqa: E402
import train_larp_tokenizer  # noqa: E402
import train_sit  # noqa: E402
from common.cli import one_line_errors  # noqa: E402
from data.loader import end_workers  # noqa: E402
from data.video import write_video  # noqa: E402
from training import checkpoint  # noqa: E402

SCRIPTS = {"coordtok": train_coordtok, "sit": train_sit, "larp_tokenizer": train_larp_tokenizer, "larp_ar": train_ar,
           "sample": sample}
STEPS = 10
SIGNALS = {"killed": (signal.SIGKILL, {-9}), "SIGTERM": (signal.SIGTERM, {143, -15}), "Ctrl-C": (signal.SIGINT, {130})}


def read(output: Path) -> str:
    return output.read_text(errors="replace") if output.exists() else ""


class Lost(Exception):
    """What a trial found to be lost, or wrong."""


class Soak:
    """Runs in `folder`, which holds the data, the references and one folder a trial."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng, self.tried, self.seconds = folder, random.Random(seed), Counter(), {}
        torch.set_num_threads(1)
        torch.manual_seed(0)
        for split, number in (("train", 6), ("test", 2)):
            for i in range(number):
                path = folder / "data" / f"UCF-101_{split}" / "AB"[i % 2] / f"{i}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_video(path, torch.rand(3, 8 + i, 48, 64))
        tiny_larp(32, 8, 12).save_pretrained(folder / "larp")
        self.reference = folder / "reference"
        for name in SCRIPTS:
            for cached in (False, True)[: 1 + (name != "sample")]:
                start = time.monotonic()
                code, output = self.run(name, cached, self.reference)
                if code:
                    raise SystemExit(f"{name} does not run undisturbed:\n{output}")
                self.seconds[name, cached] = time.monotonic() - start

    def flags(self, name: str, cached: bool, out: Path) -> list:
        """Of a run in `out`, which has its own cache."""
        files = ["--data_root", self.folder / "data", "--video_name", "UCF-101_train", "--num_workers", 1]
        run = [*files, "--save_dir", out, "--exp_name", name + "_cached" * cached, "--num_iters", STEPS,
               "--log_every", 1, "--keep_checkpoints", 3, "--resume", "auto"]
        cache = ["--cache_dir", out / "cache"] if cached else []
        small = "--input_size 32 --frame_num 8 --bottleneck_token_num 16 --codebook_size 64 --encoder_hidden_size 32 " \
            "--decoder_hidden_size 32 --encoder_num_heads 2 --decoder_num_heads 2 --encoder_depth 1 --decoder_depth 1" \
            " --prior_model gptc-XXS --disc_hidden_size 32 --disc_n_heads 2 --disc_n_layers 1 --disc_start 0".split()
        return {
            "coordtok": lambda: [*TINY_COORDTOK, *run, "--point_per_vid", 16, "--lpips_loss_scale", 0, "--num_val", 2,
                                 "--lpips_weights", "random", "--steps_til_save", 2, "--steps_til_summary", 5,
                                 *(["--cache_clips", *cache] if cached else [])],
            "sit": lambda: [*run, "--first_model_ckpt", self.reference / "coordtok" / "checkpoints", "--model",
                            "SiT-XS/4", "--global_batch_size", 2, "--num_val", 2, "--val_sampling_steps", 3,
                            "--ckpt_every", 2, "--sample_every", 5,
                            *(["--cache_latents", 2, *cache] if cached else [])],
            "larp_tokenizer": lambda: [*run, *small, "--lpips_weights", "random", "--batch_size", 2, "--num_val", 2,
                                       "--ema_decays", 0.9, "--flip", "--save_every", 0.67, "--eval_every", 2,
                                       *(["--cache_clips", *cache] if cached else [])],
            "larp_ar": lambda: [*run, "--tokenizer", self.folder / "larp", "--dim", 32, "--n_layer", 2, "--n_head", 2,
                                "--multiple_of", 8, "--batch_size", 2, "--num_val", 2, "--num_samples", 2, "--flip",
                                "--ema_decays", 0.9, "--save_every", 0.67, "--eval_every", 2, "--sample_every", 2,
                                *(["--cache_codes", 2, *cache] if cached else [])],
            "sample": lambda: [*files, "--sit_model", self.reference / "sit" / "checkpoints", "--first_model_ckpt",
                               self.reference / "coordtok" / "checkpoints", "--no_fvd", "--num_sampling_steps", 4,
                               "--num_samples", 6, "--sample_batch_size", 2, "--save", "png", "mp4",
                               "--output_dir", out / "sample"],
        }[name]()

    def start(self, name: str, cached: bool, out: Path) -> tuple[multiprocessing.Process, Path]:
        """The script in a process forked from this one, which has imported it; and what it prints."""
        out.mkdir(parents=True, exist_ok=True)
        output, flags = out / "output.txt", list(map(str, self.flags(name, cached, out)))

        def work() -> None:
            os.setsid()
            to = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(to, 1)
            os.dup2(to, 2)
            sys.argv = [name, *flags]
            try:
                with one_line_errors():
                    SCRIPTS[name].main()
            except Exception:
                traceback.print_exc()
                raise SystemExit(99) from None
            finally:
                end_workers()

        output.unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        return process, output

    def run(self, name: str, cached: bool, out: Path) -> tuple[int, str]:
        process, output = self.start(name, cached, out)
        process.join(120)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            raise Lost(f"{name} hangs: {read(output)[-300:]}")
        return process.exitcode, read(output)

    def trial(self, number: int) -> str:
        """What was done, in words. Raises Lost."""
        name, cached = self.rng.choice(sorted(self.seconds))
        out, did = self.folder / "trial", [name + " cached" * cached]
        shutil.rmtree(out, ignore_errors=True)
        run = out / (name + "_cached" * cached if name != "sample" else "sample")
        try:
            for _ in range(self.rng.randint(1, 3)):
                did.append(self.interrupt(name, cached, out))
                if self.rng.random() < 0.6:
                    did.append(self.damage(name, cached, out, run))
            code, output = self.run(name, cached, out)
            if code or "Traceback" in output:
                raise Lost(f"the last run ended with {code}: {output[-300:]}")
            self.compare(name, run, self.reference / run.name)
        except Lost as lost:
            raise Lost(f"trial {number}, {', '.join(filter(None, did))}: {lost}") from None
        return f"trial {number}, {', '.join(filter(None, did))}: all there"

    def interrupt(self, name: str, cached: bool, out: Path) -> str:
        """Run the script for a while, end it by a signal, and see how it went."""
        how = self.rng.choice(list(SIGNALS))
        after = self.rng.uniform(0.1, self.seconds[name, cached])
        away = self.rng.random() < 0.3
        number, codes = SIGNALS[how]
        process, output = self.start(name, cached, out)
        videos, gone = self.folder / "data" / "UCF-101_train" / "A", self.folder / "away"
        if away:
            # Not before they are listed: a folder that lacks a class is another data set.
            while process.is_alive() and not re.search("caching|videos|samples 0", read(output)):
                process.join(0.05)
            videos.rename(gone)
            process.join(1)
            gone.rename(videos)
        process.join(after)
        if process.is_alive():
            everyone = self.rng.random() < 0.5  # as schedulers and terminals do
            (os.killpg if everyone else os.kill)(process.pid, number)
        process.join(60)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            raise Lost(f"{how} did not end it: {read(output)[-300:]}")
        text = read(output)
        if process.exitcode not in codes | {0} or "Traceback" in text.replace("Exception ignored", ""):
            raise Lost(f"{how} after {after:.1f} s ended it with {process.exitcode}: {text[-300:]}")
        self.tried[how if process.exitcode else "finished"] += 1
        self.tried["videos away"] += away
        return f"{how} after {after:.1f} s{', videos away for 1 s' * away}{', had finished' * (not process.exitcode)}"

    def damage(self, name: str, cached: bool, out: Path, run: Path) -> str | None:
        """Damage what a run left. Damage to everything must be refused; then it is undone."""
        kinds = ["metrics", "partial", *(["checkpoint", "all checkpoints"] if name != "sample" else []),
                 *(["cache"] if cached else [])]
        kind = self.rng.choice(kinds)
        paths = checkpoint.list_checkpoints(run / "checkpoints")
        if kind == "metrics" and (run / "metrics.jsonl").exists():
            with open(run / "metrics.jsonl", "a") as file:
                file.write('{"step": 3, "ki')
        elif kind == "partial":
            for path in (run / ".x.host.1.partial", out / "cache" / "x.1.partial"):
                if path.parent.is_dir():
                    path.write_bytes(b"half")
        elif kind == "cache" and (shards := sorted(out.glob("cache/*/shard_*"))):
            self.rng.choice(shards).unlink()
        elif kind == "checkpoint" and len(paths) > 1:
            self.spoil(paths[-1])
        elif kind == "all checkpoints" and paths:
            shutil.copytree(run, out / "kept")
            for path in paths:
                self.spoil(path, whole=True)
            before = (run / "metrics.jsonl").read_bytes()
            code, output = self.run(name, cached, out)
            if code != 1 or f"none of the {len(paths)} checkpoints" not in output or "Traceback" in output:
                raise Lost(f"all checkpoints damaged, and it ended with {code}: {output[-300:]}")
            there = checkpoint.list_checkpoints(run / "checkpoints")
            if (run / "metrics.jsonl").read_bytes() != before or there != paths:
                raise Lost("all checkpoints damaged, and the run changed what was there")
            shutil.rmtree(run)
            (out / "kept").rename(run)
        else:
            return None
        self.tried[f"{kind} damaged"] += 1
        return f"{kind} damaged"

    def spoil(self, path: Path, whole: bool = False) -> None:
        """Cut a checkpoint short, or flip a byte of it."""
        content = bytearray(path.read_bytes())
        if whole or self.rng.random() < 0.5:
            content = content[: self.rng.randrange(len(content) // 2)]
        else:
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        path.write_bytes(content)

    def compare(self, name: str, run: Path, reference: Path) -> None:
        """Raises Lost where a finished run is not what the undisturbed one is."""
        if (run / "quarantine.txt").exists() and (run / "quarantine.txt").read_text():
            raise Lost(f"good videos are in quarantine: {(run / 'quarantine.txt').read_text()}")
        if name == "sample":
            pictures = sorted(path.relative_to(reference) for path in reference.rglob("sampled_videos/*/*.png"))
            found = sorted(path.relative_to(run) for path in run.rglob("sampled_videos/*/*.png"))
            if pictures != found or any((run / p).read_bytes() != (reference / p).read_bytes() for p in pictures):
                raise Lost("samples are missing or differ")
            return
        speed = ("samples_per_s", "data_wait", "memory_gib")
        for kind in ("train", "val", "samples"):
            ours, theirs = ({step: {key: value for key, value in line.items() if key not in speed}
                             for step, line in logged(folder, kind).items()} for folder in (run, reference))
            if ours != theirs:
                steps = [step for step in {**ours, **theirs} if ours.get(step) != theirs.get(step)]
                raise Lost(f"metrics ({kind}) differ at steps {sorted(steps)}")
        ours, theirs = (checkpoint.load(folder / "checkpoints") for folder in (run, reference))
        if ours["step"] != theirs["step"] or any(not torch.equal(ours["model"][key], value)
                                                 for key, value in theirs["model"].items()):
            raise Lost("the weights differ")
        if left := [path.name for path in run.parent.rglob("cache/*/*.partial")]:
            raise Lost(f"partial files are left in the cache: {left}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long; the references take about one more")
    parser.add_argument("--seed", type=int, default=0, help="seeds what is tried")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak, lost, trials = Soak(Path(folder), args.seed), [], 0
        end = time.monotonic() + 60 * args.minutes
        while time.monotonic() < end:
            trials += 1
            try:
                print(soak.trial(trials), flush=True)
            except Lost as error:
                lost.append(error)
                print(f"LOST: {error}", flush=True)
    tried = ", ".join(f"{kind} {count}" for kind, count in sorted(soak.tried.items()) if count)
    print(f"{trials} trials from seed {args.seed} ({tried}); lost: {len(lost) or 'nothing'}")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
