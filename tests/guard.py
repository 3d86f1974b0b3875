"""Record what the published commands compute, and compare it bit for bit after a change that should change no number:

    python -m tests.guard record tests/guard        # before the change
    python -m tests.guard compare tests/guard       # after it: a line a row, exit code 1 on any difference
    python -m tests.guard record tests/guard --only eval  # these rows anew, where a number has changed on purpose

Every entry script runs at a tiny size on the CPU, with one thread a process and its default seed. Recorded are all
numbers of metrics.jsonl and report.json as hexadecimal floats, and SHA-256 of the weights, of the samples' pixels and
of the arrays in the chunk files. FOLDER gets record.json and a checkpoint of each kind. `compare` resumes, samples and
evaluates those old checkpoints. To keep them small, a large tensor is kept as its shape, mean and deviation, and filled
with numbers that follow from its name; all else is as the trainer wrote it. Values that the code of today adds to a row
(a new metric in a report) have nothing recorded to be compared with: `compare` takes the recorded ones alone.

This file imports nothing of the project and knows it by its command lines and its files alone, so that it works
unchanged when all modules have moved. It needs no network. Bits depend on the versions of torch and of the decoders and
on the CPU: `compare` says where they differ from those of the recording. Then record the old revision on this machine.
"""
import argparse
import csv
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
HALF, STEPS = 6, 12  # a resumed run starts after HALF of the STEPS; an epoch of LARP's trainers has 3 steps
PACKAGES = (
    "torch", "torchvision", "torchdiffeq", "timm", "numpy", "decord", "opencv-python-headless", "imageio-ffmpeg",
)
SPEED = {"samples_per_s", "data_wait", "memory_gib"}  # what metrics.jsonl says of the machine
OFFLINE = {"VIDEO_TOKENIZERS_OFFLINE": "1", "VIDEO_TOKENIZERS_CACHE": "no_cache", "HF_HUB_OFFLINE": "1"}

# --- tiny sizes, by published flags ---

DEMO = "--classes PanLeft ZoomIn --groups 1 2 8 9 10 --clips 1 --size 64x48 --min_frames 10 --max_frames 16"
VIDEOS = "--data_root data --video_name UCF-101_train"
COORDTOK = (
    "--num_frames 12 --img_size 32 --enc_embed_dim 32 --enc_num_layers 1 --enc_num_heads 2 --enc_patch_size_xy 8 "
    "--enc_patch_size_t 4 --enc_patch_num_layers 1 --latent_resolution_xy 8 --latent_resolution_t 8 "
    "--latent_n_features 4 --latent_patch_size_xy 4 --latent_patch_size_t 4 --dec_embed_dim 32 --dec_num_layers 1 "
    "--dec_num_heads 2"
)
LARP = (
    "--input_size 32 --frame_num 12 --bottleneck_token_num 16 --codebook_size 64 --bottleneck_dim 8 "
    "--encoder_hidden_size 32 --decoder_hidden_size 32 --encoder_num_heads 2 --decoder_num_heads 2 --encoder_depth 1 "
    "--decoder_depth 1 --prior_model gptc-tiny --disc_hidden_size 32 --disc_n_heads 2 --disc_n_layers 1"
)
AR = "--model llama-abs-S --dim 32 --n_layer 2 --n_head 2"
BATCH = "--batch_size 2 --warmup_epoch 1 --lr 1e-2 --flip --ema_decays 0.9"

# {name: (script, flags, the flag of the folder of runs, flags of so many steps, flags of its cache)}
TRAINERS = {
    "coordtok": (
        "train_coordtok.py", f"{COORDTOK} {VIDEOS} --num_views 4 --point_per_vid 16 --lpips_loss_scale 0.0 --lr 1e-3 "
        f"--steps_til_save {HALF} --steps_til_summary {HALF} --lpips_weights random",
        "--save_dir", "--num_iters {steps}", "--cache_clips",
    ),
    "coordtok_second": (
        "train_coordtok.py", f"{VIDEOS} --num_views 4 --point_per_vid 16 --is_second_step --first_step_ckpt "
        f"old/coordtok.pt --lpips_loss_scale 1.0 --lpips_weights random --steps_til_save {HALF}",
        "--save_dir", "--num_iters {steps}", "--cache_clips",
    ),
    "sit": (
        "train_sit.py", f"{VIDEOS} --first_model_ckpt old/coordtok.pt --model SiT-XS/4 --global_batch_size 4 "
        f"--num_classes 2 --class_dropout_prob 0.2 --ckpt_every {HALF} --sample_every {HALF}",
        "--results_dir", "--num_iters {steps}", "--cache_latents 2",
    ),
    "larp_tokenizer": (
        "train_larp_tokenizer.py", f"{LARP} {BATCH} {VIDEOS} --d_update_freq 2 --lpips_weights random --save_every 2 "
        "--eval_every 4",
        "--save_dir", "--max_epoch {epochs}", "--cache_clips",
    ),
    "larp_ar": (
        "train_ar.py", f"{AR} {BATCH} --tokenizer old/larp_tokenizer.pt --csv_file lists/ucf101_train.csv "
        "--num_classes 2 --class_dropout_prob 0.2 --save_every 2 --eval_every 2 --sample_every 4",
        "--save_dir", "--max_epoch {epochs}", "--cache_codes 2",
    ),
    "larp_ar_fp": (
        "train_ar.py", f"{AR} {BATCH} --tokenizer old/larp_tokenizer.pt --csv_file lists/k600_train.csv "
        "--frame_prediction --num_cond_frames 5 --save_every 2 --eval_every 2 --sample_every 4",
        "--save_dir", "--max_epoch {epochs}", "--cache_codes 2",
    ),
}
CHECKPOINTS = ("coordtok", "sit", "larp_tokenizer", "larp_ar", "larp_ar_fp")  # kept in FOLDER
SAMPLE = "--sample_batch_size 3 --save png --i3d_weights i3d.safetensors"
SIT_SAMPLES = f"--sit_model old/sit.pt --first_model_ckpt old/coordtok.pt --data_root data {SAMPLE}"
CLASS_SAMPLES = (
    f"--ar_model old/larp_ar.pt --tokenizer old/larp_tokenizer.pt --cfg_scale 1.25 --num_samples 4 "
    f"--dataset_csv lists/ucf101_train.csv {SAMPLE}"
)
FRAME_SAMPLES = (
    f"--fp --num_cond_frames 5 --ar_model old/larp_ar_fp.pt --tokenizer old/larp_tokenizer.pt --num_samples 4 "
    f"--dataset_csv lists/k600_train.csv {SAMPLE}"
)
SAMPLES = {  # {row: (flags, processes)}
    "sit SDE": (f"{SIT_SAMPLES} --mode SDE --num_sampling_steps 6 --cfg_scale 2 --num_samples 4", 0),
    "sit ODE": (f"{SIT_SAMPLES} --mode ODE --likelihood --num_samples 2 --no_fvd", 0),
    "larp_ar": (CLASS_SAMPLES, 0),
    "larp_ar, 2 processes": (f"{CLASS_SAMPLES} --no_fvd", 2),
    "larp_ar_fp": (FRAME_SAMPLES, 0),
}
EVAL = "--batch_size 2 --lpips_weights random --i3d_weights i3d.safetensors"
EVALS = {  # {row: (script, flags)}
    "coordtok": ("eval/eval_coordtok.py", f"--tokenizer old/coordtok.pt {VIDEOS} --num_clips 4 {EVAL}"),
    "larp_tokenizer": ("eval/eval_larp_tokenizer.py", "--tokenizer old/larp_tokenizer.pt --dataset_csv "
                       f"lists/ucf101_val.csv --use_amp --det {EVAL}"),
    "larp_tokenizer, drawn": ("eval/eval_larp_tokenizer.py", "--tokenizer old/larp_tokenizer.pt --version ema_0.9 "
                              f"--dataset_csv lists/ucf101_train.csv --no_fvd {EVAL}"),
}


# --- checkpoints that are small enough to commit ---

def noise(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers of mean 0 and deviation 1 that follow from the name alone, on any machine."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    bits = np.random.PCG64(seed).random_raw(math.prod(shape)) >> np.uint64(11)
    return torch.from_numpy((bits * 2.0**-53 - 0.5) * math.sqrt(12)).reshape(shape)


def walk(value, change: Callable, name: str = ""):
    """`value` with change(name, leaf) for each leaf of its nested dicts, lists and tuples."""
    if isinstance(value, dict) and "filled" not in value:
        return {key: walk(part, change, f"{name}/{key}") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(walk(part, change, f"{name}/{i}") for i, part in enumerate(value))
    return change(name, value)


def emptied(name: str, leaf):
    """A large float tensor's shape, mean and deviation in its place. Everything else stays as the trainer wrote it."""
    if not (isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel() > 64):
        return leaf
    mean, deviation = leaf.double().mean().item(), leaf.double().std().item()
    if leaf.min() >= 0:  # second moments of Adam stay positive
        deviation = min(deviation, mean / 2)
    return {"filled": list(leaf.shape), "dtype": leaf.dtype, "mean": mean, "deviation": deviation}


def filled(name: str, leaf):
    if not isinstance(leaf, dict):
        return leaf
    return (noise(name, leaf["filled"]) * leaf["deviation"] + leaf["mean"]).to(leaf["dtype"])


def i3d_weights() -> dict[str, torch.Tensor]:
    """Random weights in the layout of pytorch-i3d's file."""
    blocks = {
        "3b": (192, 64, 96, 128, 16, 32, 32), "3c": (256, 128, 128, 192, 32, 96, 64),
        "4b": (480, 192, 96, 208, 16, 48, 64), "4c": (512, 160, 112, 224, 24, 64, 64),
        "4d": (512, 128, 128, 256, 24, 64, 64), "4e": (512, 112, 144, 288, 32, 64, 64),
        "4f": (528, 256, 160, 320, 32, 128, 128), "5b": (832, 256, 160, 320, 32, 128, 128),
        "5c": (832, 384, 192, 384, 48, 128, 128),
    }
    units = {"Conv3d_1a_7x7": (3, 64, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (64, 192, 3)}
    for block, (width, b0, b1a, b1b, b2a, b2b, b3b) in blocks.items():
        branches = {"b0": (width, b0, 1), "b1a": (width, b1a, 1), "b1b": (b1a, b1b, 3), "b2a": (width, b2a, 1),
                    "b2b": (b2a, b2b, 3), "b3b": (width, b3b, 1)}
        units |= {f"Mixed_{block}.{branch}": sizes for branch, sizes in branches.items()}
    weights = {"logits.conv3d.bias": torch.zeros(400)}
    for unit, (width, out, kernel) in {**units, "logits": (1024, 400, 1)}.items():
        shape = (out, width, kernel, kernel, kernel)
        weights[f"{unit}.conv3d.weight"] = (noise(unit, shape) * math.sqrt(2 / math.prod(shape[1:]))).float()
        if unit != "logits":
            weights |= {f"{unit}.bn.{name}": torch.full((out,), value) for name, value in
                        {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items()}
    return weights


# --- what runs leave ---

def exact(value):
    """A number as JSON keeps it bit for bit."""
    return value.hex() if isinstance(value, float) else value


def sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def metrics(run: Path) -> dict:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {f"{line['kind']} step {line['step']} {name}": exact(value) for line in lines for name, value in line.items()
            if name not in SPEED | {"kind", "step"}}


def weights(run: Path) -> dict:
    """SHA-256 of the newest checkpoint's weights and averages."""
    state, hashes = torch.load(max(run.glob("checkpoints/step_*.pt")), "cpu", weights_only=True), {}
    for part in {"model", "ema"} & state.keys():
        tensors = {}
        walk(state[part], lambda name, leaf, found=tensors: found.update({name: leaf}))
        names = sorted(tensors)
        hashes[f"{part} after step {state['step']}"] = sha256(np.array(names), *(tensors[n].numpy() for n in names))
    return hashes


def report(folder: Path) -> dict:
    found = json.loads((folder / "report.json").read_text())
    facts = {name: value for name, value in found["record"].items()
             if isinstance(value, (int, float)) or name.endswith("sha256")}
    return {f"report {name}": exact(value) for name, value in {**facts, **found["results"]}.items()}


def samples(folder: Path) -> dict:
    values = {}
    for video in sorted([*folder.glob("sampled_videos/*"), *folder.glob("gt/*")]):
        frames = [np.asarray(Image.open(path)) for path in sorted(video.glob("*.png"))]
        values[f"pixels {video.parent.name}/{video.name}"] = sha256(*frames)
    chunks = [dict(np.load(path)) for path in sorted(folder.glob("chunks/*.npz"))]
    order = np.concatenate([chunk["index"] for chunk in chunks]).argsort()
    for name in sorted(chunks[0]):
        rows = np.concatenate([chunk[name] for chunk in chunks])
        values[f"chunks {name}"] = sha256(rows if name == "left_out" else rows[order])
    return values | report(folder)


def machine() -> dict:
    """What bits depend on beside the code."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return {**{name: version(name) for name in PACKAGES}, "CPU": model[1] if model else platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability()}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


# --- the rows ---

def cpu_seconds() -> float:
    """Of the commands that have ended: what they take on one idle core."""
    times = os.times()
    return times.children_user + times.children_system


class CommandError(Exception):
    """What a command that failed says."""


class Guard:
    """Runs the rows in the folder `work` and records or compares them.

    old: the folder of the recorded checkpoints. recorded: {row: {name: value}}, or None to record. only: rows of names
    that begin so.
    """

    def __init__(self, work: Path, old: Path, recorded: dict | None, only: str = ""):
        self.work, self.old, self.recorded, self.only = work, old, recorded, only
        self.rows, self.differ, self.clock = {}, [], cpu_seconds()

    def run(self, script: str, flags: str, processes: int = 0, cwd: Path | None = None) -> None:
        launch = [sys.executable]
        if processes:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc_per_node={processes}"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VT_")}
        environment |= {**OFFLINE, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([*launch, str(ROOT / script), *flags.split()], cwd=cwd or self.work, env=environment,
                              capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it says nothing"]
            errors = [line for line in lines if line.startswith("error")] or lines[-1:]
            raise CommandError(f"{script} ends with exit code {done.returncode}: {errors[0]}")

    def row(self, name: str, make: Callable[[], dict]) -> None:
        if not name.startswith(self.only):
            return
        try:
            self.rows[name] = make()
            lines = [] if self.recorded is None else differences(self.recorded[name], self.rows[name])
        except Exception as error:  # whatever a row meets, the others are compared too
            if self.recorded is None:
                raise
            self.rows[name], lines = {}, [f"{type(error).__name__}: {error}"]
        said = "equal" if self.recorded else f"{len(self.rows[name])} values recorded"
        if lines:
            self.differ.append(name)
            said = f"DIFFERS: {lines[0]}" + f" (and {len(lines) - 1} more)" * (len(lines) > 1)
        seconds, self.clock = cpu_seconds() - self.clock, cpu_seconds()
        print(f"{name:<42} {seconds:4.0f} s  {said}", flush=True)

    def data(self) -> dict:
        """The demo data set, lists of it, and random weights of I3D."""
        data = self.work / "data"
        self.run("data/demo.py", f"--root {data} {DEMO}")
        self.run("data/split_ucf.py", f"--data_root {data} --data_name UCF-101", cwd=ROOT / "data")
        (self.work / "lists").mkdir()
        hashes = {}
        for split, other in ("train", "train"), ("test", "val"):
            videos = sorted(data.glob(f"UCF-101_{split}/*/*.avi"))
            hashes |= {str(path.relative_to(data)): hashlib.sha256(path.read_bytes()).hexdigest() for path in videos}
            for name in ("ucf101", "k600"):
                with open(self.work / "lists" / f"{name}_{other}.csv", "w", newline="") as file:
                    rows = csv.writer(file)
                    rows.writerow(["id", "path", "action", "label"])
                    rows.writerows([path.stem, path, path.parent.name, int(path.parent.name == "ZoomIn")]
                                   for path in videos)
        save_file(i3d_weights(), self.work / "i3d.safetensors")
        return hashes

    def train(self, name: str, variant: str, more: str = "", processes: int = 0, steps: int = STEPS,
              start: Path | None = None) -> dict:
        """A run, from the checkpoint `start` if there is one."""
        script, flags, save_dir, length, _ = TRAINERS[name]
        flags += f" {save_dir} runs --exp_name {name}_{variant} --num_workers 1 --log_every 1 {more} "
        flags += length.format(steps=steps, epochs=steps // 3)
        run = self.folder_of(name, variant)
        if start:
            (run / "checkpoints").mkdir(parents=True)
            shutil.copy(start, run / "checkpoints" / f"step_{HALF if steps == STEPS else STEPS:07d}.pt")
            flags += " --resume auto"
        self.run(script, flags, processes)
        return metrics(run) | weights(run)

    def folder_of(self, name: str, variant: str) -> Path:
        return self.work / "runs" / (f"{name}_{variant}" + "_second" * name.endswith("_second"))

    def trainer(self, name: str) -> None:
        small, folder = "--num_val 0", self.folder_of(name, "1") / "checkpoints"
        middle, old = folder / f"step_{HALF:07d}.pt", self.work / "old" / f"{name}.pt"
        cache = f"{TRAINERS[name][4]} --cache_dir cache/{name}"

        self.row(f"{name}, 1 process", lambda: self.train(name, "1", "--num_val 2"))
        if self.recorded is None and name in CHECKPOINTS:
            state = torch.load(folder / f"step_{STEPS:07d}.pt", "cpu", weights_only=True)
            torch.save(walk(state, emptied), self.old / f"{name}.pt")
            self.fill(name)
        self.row(f"{name}, resumed", lambda: self.train(name, "resumed", "--num_val 2", start=middle))
        if name == "coordtok_second":  # rows cost seconds: step 1's tell the two apart
            self.row(f"{name}, 2 processes, accumulation", lambda: self.train(name, "2", f"{small} --accum_iter 2", 2))
        else:
            self.row(f"{name}, 2 processes", lambda: self.train(name, "2", small, 2))
        if name in ("coordtok", "sit", "larp_tokenizer", "larp_ar"):
            self.row(f"{name}, accumulation", lambda: self.train(name, "accum", f"{small} --accum_iter 2"))
        if name != "coordtok_second":  # the same clips by the same cache as step 1's
            self.row(f"{name}, cache", lambda: self.train(name, "cache", f"{small} {cache}"))
        if name in CHECKPOINTS:
            self.row(f"{name}, old checkpoint", lambda: self.train(name, "old", small, steps=STEPS + 3, start=old))

    def fill(self, kind: str) -> None:
        (self.work / "old").mkdir(exist_ok=True)
        state = torch.load(self.old / f"{kind}.pt", "cpu", weights_only=True)
        torch.save(walk(state, filled), self.work / "old" / f"{kind}.pt")

    def sample(self, name: str, flags: str, processes: int) -> dict:
        folder = "samples/" + "".join(filter(str.isalnum, name))
        self.run("sample.py", f"{flags} --output_dir {folder}", processes)
        return samples(self.work / folder)

    def evaluate(self, name: str, script: str, flags: str) -> dict:
        folder = "evals/" + "".join(filter(str.isalnum, name))
        self.run(script, f"{flags} --output_dir {folder}")
        return report(self.work / folder)

    def everything(self) -> None:
        only, self.only = self.only, ""
        self.row("data", self.data)
        self.only = only
        if self.recorded is not None:
            for kind in CHECKPOINTS:
                self.fill(kind)
        for name in TRAINERS:
            self.trainer(name)
        for name, (flags, processes) in SAMPLES.items():
            self.row(f"sample {name}", lambda n=name, f=flags, p=processes: self.sample(n, f, p))
        for name, (script, flags) in EVALS.items():
            self.row(f"eval {name}", lambda n=name, s=script, f=flags: self.evaluate(n, s, f))


def differences(then: dict, now: dict) -> list[str]:
    """Which recorded values differ or are missing. The first steps come first, as the values are in the order of the
    runs. Values that only `now` has are new, and are left out."""

    def shown(value) -> str:
        is_float = isinstance(value, str) and value.lstrip("-").startswith(("0x", "nan", "inf"))
        return repr(float.fromhex(value)) if is_float else str(value)[:16]

    return [f"{name} is {shown(now.get(name, 'missing'))}, recorded was {shown(then[name])}"
            for name in then if then[name] != now.get(name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("folder", type=Path, help="folder of record.json and the old checkpoints")
    parser.add_argument("--only", default="", metavar="PREFIX", help="the rows whose names begin so, e.g. sit")
    args = parser.parse_args()
    path, here, start = args.folder / "record.json", machine(), time.monotonic()
    recorded = None
    if args.action == "compare" or args.only:
        if not path.is_file():
            sys.exit(f"error: {path} is not there: record it first, at the revision to compare with")
        found = json.loads(path.read_text())
        recorded, there = found["rows"], found["machine"]
        changed = [f"{name} {there.get(name)} then, {here[name]} now" for name in here if there.get(name) != here[name]]
        print(f"recorded with torch {there['torch']} on {there['CPU']} ({there['instructions']}). Bits can differ with "
              "another torch, decoder or CPU, without any fault of the code.")
        if changed:
            print(f"THIS MACHINE DIFFERS: {'; '.join(changed)}. Differences below prove nothing: record the old "
                  "revision here and compare with that.")
    with tempfile.TemporaryDirectory(prefix="guard_") as work:
        new = Path(work, "recorded")
        new.mkdir()
        guard = Guard(Path(work), args.folder if recorded else new, recorded, args.only)
        try:
            guard.everything()
        except CommandError as error:
            sys.exit(f"error: nothing is recorded, as a command failed: {error}")
        if recorded is not None and args.action == "record":
            found["rows"] |= {name: row for name, row in guard.rows.items()
                              if row and name.startswith(args.only)}
            path.write_text(json.dumps(found, indent=1) + "\n")
        taken = f"{time.monotonic() - start:.0f} s, {cpu_seconds():.0f} s of CPU time"
        if recorded is None:
            (new / "record.json").write_text(json.dumps({"machine": here, "rows": guard.rows}, indent=1) + "\n")
            shutil.copytree(new, args.folder, dirs_exist_ok=True)
            print(f"{len(guard.rows)} rows in {path}; {taken}")
            return
    gone = [name for name in recorded if name.startswith(args.only) and name not in guard.rows]
    for name in gone:
        print(f"{name:<42}    0 s  DIFFERS: it is recorded, and this script has no such row")
    print(f"{len(guard.rows)} rows, {len(guard.differ) + len(gone)} differ; {taken}")
    sys.exit(bool(guard.differ or gone))


if __name__ == "__main__":
    main()
