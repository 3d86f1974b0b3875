"""train_ar.py and its scripts end to end, as users run them, at a tiny size."""
import json
import math
import os
import random
import re
import signal
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, logged, losses, mistake, num_lines, run, run_bash, run_here, start, tiny_larp, wait
from PIL import Image

import train_ar
from common.cli import Parser
from eval.pictures import MARGIN, SMALLEST, TEXT
from models.larp_ar import LARPGenerator
from models.pretrained import weights_sha256
from training import checkpoint
from training.flags import add_larp_ar, larp_ar_config

STEPS = 6
CODES, CODEBOOK = 12, 64
ARCHITECTURE = "--model llama-abs-S --dim 32 --n_layer 2 --n_head 2 --multiple_of 16".split()
TINY = (
    "--batch_size 4 --num_workers 1 --log_every 1 --val_batch_size 3 --num_samples 3 --sample_batch_size 2 "
    "--device cpu --exp_name run"
).split()
FRAMES = ("--frame_prediction", "--num_cond_frames", 3)
NO_DROPOUT = "--token_dropout_p 0 --resid_dropout_p 0 --ffn_dropout_p 0".split()
SCRIPTS = pytest.mark.skipif(not (ROOT / ".venv" / "installed").exists(), reason="the scripts would set up .venv")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_larp(input_size=32, frame_num=8, bottleneck_token_num=CODES, codebook_size=CODEBOOK).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(data, tokenizer):
    """On videos; later flags win."""

    def make(folder, *flags, architecture=ARCHITECTURE):
        return [*architecture, *TINY, "--tokenizer", tokenizer, "--data_root", data, "--video_name", "UCF-101_train",
                "--save_dir", folder, "--num_iters", STEPS, *flags]

    return make


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory) -> Path:
    """A run in one process from video: classes, dropout, an average, validation and guided samples."""
    folder = tmp_path_factory.mktemp("trained")
    run("train_ar.py", *arguments(folder, "--ema_decays", 0.9, "--eval_every", 2, "--cfg_scale", 1.5))
    return folder / "run"


def test_the_run_says_what_it_did(trained, tokenizer, tmp_path):
    assert losses(trained).keys() == set(range(1, STEPS + 1))
    assert losses(trained)[1] == pytest.approx(math.log(CODEBOOK)), "it starts from a uniform prediction"
    for kind in ("val", "val_ema_0.9"):
        scores = logged(trained, kind)
        assert scores.keys() == {2, 4, 6}  # an epoch has one step
        assert scores[6]["clips"] == 4 and 0 <= scores[6]["accuracy"] <= 1
        assert scores[6]["loss"] != scores[6]["loss_uncond"]
    assert losses(trained, "val")[6] < losses(trained, "val")[2]
    assert {path.name for path in (trained / "samples").iterdir()} == {"step_0000006.png", "step_0000006.mp4"}
    state = checkpoint.load(trained / "checkpoints")
    assert (state["kind"], state["classes"], state["num_cond_frames"]) == ("larp_ar", ["PanLeft", "ZoomIn"], 0)
    assert state["tokenizer"] == weights_sha256(tiny_larp(32, 8, CODES, CODEBOOK))
    scores = losses(trained, "val")
    assert checkpoint.load(trained / "checkpoints" / "best.pt")["step"] == min(scores, key=scores.get)
    checkpoint.export(state, tmp_path / "exported", "ema_0.9")
    generator = LARPGenerator.from_pretrained(tmp_path / "exported")
    assert (generator.config.vocab_size, generator.config.max_seq_len) == (CODEBOOK, CODES)
    decayed, others = state["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], others["weight_decay"], decayed["betas"]) == (0.05, 0.0, (0.9, 0.95))
    assert len(decayed["params"]) == 2 * 5 + 1, "the linear layers alone"


def test_a_stopped_run_goes_on_as_if_it_had_not(arguments, trained, tmp_path):
    """SIGTERM at any step; then all losses are equal to the last bit, with dropout."""
    flags = ("--ema_decays", 0.9, "--eval_every", 2, "--cfg_scale", 1.5)
    running = start("train_ar.py", *arguments(tmp_path, *flags))
    after = random.randint(1, 4)
    wait(running, lambda: num_lines(tmp_path / "run" / "metrics.jsonl") >= after)
    os.killpg(running.pid, signal.SIGTERM)  # as schedulers do: the loader's workers get it too
    output = running.communicate(timeout=60)[0].decode()
    assert running.returncode == 143 and "SIGTERM: saved step" in output, output
    assert max(losses(tmp_path / "run")) < STEPS
    run("train_ar.py", *arguments(tmp_path, *flags, "--resume", architecture=[]))  # the checkpoint has it
    for kind in ("train", "val", "val_ema_0.9"):
        assert losses(tmp_path / "run", kind) == losses(trained, kind)


@SCRIPTS
def test_two_processes_by_the_script_train_as_one(arguments, monkeypatch, tmp_path):
    """Flags appended to the bash script alone make it small. Labels are dropped, clips mirrored, gradients added up."""
    flags = [*NO_DROPOUT, "--class_dropout_prob", 0.5, "--flip", "--precision", "fp32", "--warmup_epoch", 0]
    run_bash("scripts/train_larp_ar.sh", *arguments(tmp_path / "two", *flags, "--accum_iter", 2), gpus=2)
    run_here(monkeypatch, train_ar, *arguments(tmp_path / "one", *flags))
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    for kind in ("train", "val"):
        assert losses(two, kind) == pytest.approx(losses(one, kind), abs=1e-5)
    assert logged(two, "val")[6]["loss_uncond"] == pytest.approx(logged(one, "val")[6]["loss_uncond"], abs=1e-5)


def test_a_cache_is_gone_on_with_and_serves_any_number_of_processes(arguments, monkeypatch, tmp_path):
    """Filling is killed; two processes go on with it and train; one process trains from it as they did."""
    flags = (*FRAMES, *NO_DROPOUT, "--cache_codes", 50, "--cache_dir", tmp_path / "cache")  # 300 windows: two shards
    running = start("train_ar.py", *arguments(tmp_path / "killed", *flags))
    wait(running, lambda: any(tmp_path.glob("cache/*/shard_*.npy")))
    running.send_signal(signal.SIGKILL)
    running.communicate()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/shard_*.npy")}
    assert len(kept) == 1
    run("train_ar.py", *arguments(tmp_path / "two", *flags), processes=2)
    shards = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/shard_*.npy")}
    assert len(shards) == 2 and shards.items() >= kept.items()
    run_here(monkeypatch, train_ar, *arguments(tmp_path / "one", *flags))
    one, two = losses(tmp_path / "one" / "run"), losses(tmp_path / "two" / "run")
    assert two == pytest.approx(one, abs=1e-5)
    state = checkpoint.load(tmp_path / "one" / "run" / "checkpoints")
    assert (state["classes"], state["num_cond_frames"], state["config"]["cls_token_num"]) == ([], 3, CODES + 1)
    sheet = Image.open(tmp_path / "one" / "run" / "samples" / "step_0000006.png")
    assert sheet.height == MARGIN + 3 * (TEXT + 2 * (SMALLEST + MARGIN)), "three real clips above their continuations"


@pytest.mark.parametrize("mode", [["--num_classes", 2], FRAMES], ids=["classes", "frames"])
def test_it_learns_six_videos(arguments, monkeypatch, tmp_path, mode):
    """From the cache, with bfloat16 and recomputed layers."""
    flags = [*mode, *NO_DROPOUT, "--cache_codes", 1, "--cache_dir", tmp_path / "cache", "--num_iters", 40, "--lr", 0.02,
             "--warmup_epoch", 2, "--num_val", 0, "--precision", "bf16", "--gradient_checkpointing"]
    run_here(monkeypatch, train_ar, *arguments(tmp_path, *flags))
    course = losses(tmp_path / "run")
    assert course[40] < 0.5 * course[1]


@SCRIPTS
def test_a_reproducing_script_runs_at_a_small_size(tokenizer, tmp_path):
    """On random clips without files."""
    flags = [*ARCHITECTURE, *TINY, "--tokenizer", tokenizer, "--save_dir", tmp_path, "--num_iters", 1, "--num_val", 4,
             "--csv_file", "null128.csv", "--val_csv", "null128.csv", "--num_cond_frames", 2]
    run_bash("scripts/train_larp_ar_fp_reproduce.sh", *flags, gpus=1)
    assert losses(tmp_path / "run").keys() == losses(tmp_path / "run", "val").keys() == {1}
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (args["precision"], args["frame_prediction"], args["num_cond_frames"]) == ("bf16", True, 2)


@pytest.mark.parametrize("script", ["ar", "ar_fp", "ar_reproduce", "ar_fp_reproduce"])
def test_each_script_has_its_config(script):
    text = (ROOT / "scripts" / f"train_larp_{script}.sh").read_text()
    assert f"--config scripts/configs/larp_{script}.yaml" in text and '--resume auto "$@"' in text


def parse(monkeypatch, *flags) -> Namespace:
    monkeypatch.setattr(sys, "argv", ["train_ar.py", *flags])
    return train_ar.parse_args()


UCF = {
    "model": "llama-abs-LP", "num_classes": 101, "class_dropout_prob": 0.1, "token_dropout_p": 0.1,
    "tokenizer": "hywang66/LARP-L-long-tokenizer", "csv_file": "ucf101_train.csv", "val_csv": "ucf101_val.csv",
    "batch_size": 64, "lr": 6e-4, "betas": [0.9, 0.95], "weight_decay": 0.05, "clip_grad": 0.0,
    "warmup_epoch": 4, "min_lr_mult": 0.01, "max_epoch": 3000, "seed": 66667, "flip": False, "ema_decays": [],
    "cache_codes": 0, "eval_every": 30, "sample_every": 30, "save_every": 30, "num_samples": 32,
    "sample_batch_size": 32, "cfg_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
}
K600 = {
    **UCF, "csv_file": "k600_train.csv", "val_csv": "k600_val.csv", "max_epoch": 75, "warmup_epoch": 1, "eval_every": 1,
    "sample_every": 1, "save_every": 1, "num_samples": 128, "frame_prediction": True, "num_cond_frames": 5,
}
del K600["num_classes"], K600["class_dropout_prob"]


@pytest.mark.parametrize(
    ("config", "recipe"),
    [("larp_ar", UCF), ("larp_ar_reproduce", {**UCF, "precision": "bf16", "allow_tf32": True}),
     ("larp_ar_fp", K600), ("larp_ar_fp_reproduce", {**K600, "precision": "bf16", "allow_tf32": True})],
)
def test_configs_hold_the_published_recipes(monkeypatch, config, recipe):
    args = vars(parse(monkeypatch, "--config", f"scripts/configs/{config}.yaml"))
    assert {name: args[name] for name in recipe} == recipe
    assert args["exp_name"] == config


def test_the_defaults_are_those_of_ucf101(monkeypatch):
    """But for what the tokenizer and the size say."""
    plain, config = (vars(parse(monkeypatch, *flags)) for flags in ([], ["--config", "scripts/configs/larp_ar.yaml"]))
    config["betas"] = tuple(config["betas"])
    differ = {name for name in config if config[name] != plain.get(name)}
    assert differ == {"config", "model", "num_classes", "class_dropout_prob", "token_dropout_p", "val_csv"}
    tokenizer = Namespace(frame_num=16, bottleneck_token_num=1024, bottleneck=Namespace(
        args=Namespace(regularizer=Namespace(args=Namespace(codebook_size=8192)))))
    plain, config = (larp_ar_config(Namespace(**flags), tokenizer) for flags in (plain, config))
    with torch.device("meta"):
        models = [LARPGenerator(**options) for options, _ in (plain, config)]
    assert models[0].config == models[1].config
    assert sum(p.numel() for p in models[0].parameters()) == pytest.approx(632.0e6, rel=1e-3)


@pytest.mark.parametrize("kind", ["ar", "ar_fp"])
def test_quickstart_configs_parse(monkeypatch, kind):
    path = f"scripts/configs/larp_{kind}_quickstart.yaml"
    args = vars(parse(monkeypatch, "--config", path))
    assert {name: args[name] for name in yaml.safe_load((ROOT / path).read_text())} == {
        name: value if name != "lr" else float(value)
        for name, value in yaml.safe_load((ROOT / path).read_text()).items()
    }


def test_every_choice_of_the_architecture_has_a_flag():
    parser = Parser("test")
    add_larp_ar(parser)
    flags = (
        "--model llama-abs-B --n_layer 3 --n_kv_head 4 --ffn_dim_multiplier 1.5 --use_fixed_pe true "
        "--drop_path_rate 0.1 --attn-dropout-p 0.2"
    ).split()
    tokenizer = tiny_larp(16, 4, 6).config
    config, frames = larp_ar_config(parser.parse_args(flags), tokenizer)
    assert config == {
        "n_layer": 3, "dim": 768, "n_head": 12, "n_kv_head": 4, "ffn_dim_multiplier": 1.5, "use_fixed_pe": True,
        "drop_path_rate": 0.1, "attn_dropout_p": 0.2, "vocab_size": 64, "max_seq_len": 6, "cls_token_num": 1,
        "frame_prediction": False,
    }
    assert frames == 0
    config, frames = larp_ar_config(parser.parse_args(["--fp", "--num_cond_frames", "3"]), tokenizer)
    assert (config["frame_prediction"], config["cls_token_num"], frames) == (True, 7, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache_codes", 1, "--batch_size", 3, "--accum_iter", 4], "a global batch of 3 cannot be shared"),
        (["--accum_iter", 0], "--accum_iter is 0, expected 1 or more"),
        (["--num_classes", 1], "but the model has 1 classes: give --num_classes"),
        (["--val_name", "UCF-101_test/PanLeft"], "have different classes: ZoomIn is in one alone"),
        (["--video_name", "nowhere"], "no videos under"),
        (["--batch_size", 7], "6 videos do not fill one batch of 7"),
        (["--accum_iter", 3], "a global batch of 4 cannot be shared"),
        (["--tokenizer", "README.md"], "README.md"),
        (["--tokenizer", "/nowhere.pt"], "no checkpoint at /nowhere.pt"),
        (["--n_head", 3], "dim 32 does not divide by n_head 3"),
        (["--num_cond_frames", 3], "--num_cond_frames 3 is for --frame_prediction"),
        (["--frame_prediction", "--num_cond_frames", 8], "clips have 8 frames: give 1 to 7"),
        (["--frame_prediction", "--cfg_scale", 2], "--cfg_scale is 2.0, but frame prediction has no guidance"),
        (["--resume", "/nowhere.pt"], "no checkpoint at /nowhere.pt"),
    ],
)
def test_mistakes_get_one_line(arguments, monkeypatch, capsys, tmp_path, flags, message):
    assert message in mistake(monkeypatch, capsys, train_ar, *arguments(tmp_path, *flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "--dim", 64], "--dim 64 was given, but the run in .* has 32"),
        (["--resume", "--model", "llama-abs-B"], "--model llama-abs-B, n_layer 12 was given, but the run in .* has 2"),
        (["--resume", *FRAMES], "--frame_prediction True was given, but the run in .* has False"),
        (["--resume", "--tokenizer", "OTHER"], "was trained on another tokenizer than .*other: give .*tokenizer"),
        (["--resume", "KIND"], "holds a larp_tokenizer model, expected a larp_ar checkpoint"),
        ([], "already holds step_0000006.pt"),
    ],
)
def test_a_run_refuses_what_it_was_not(arguments, trained, monkeypatch, capsys, tmp_path, flags, message):
    if "OTHER" in flags:
        other = tiny_larp(32, 8, CODES, CODEBOOK)
        other.final_layer.linear.bias.data += 1
        other.save_pretrained(tmp_path / "other")
    if "KIND" in flags:
        kind = checkpoint.save(tmp_path, 1, {"kind": "larp_tokenizer"})
    flags = [{"OTHER": tmp_path / "other", "KIND": kind if "KIND" in flags else None}.get(flag, flag) for flag in flags]
    error = mistake(monkeypatch, capsys, train_ar, *arguments(trained.parent, *flags, architecture=[]))
    assert re.search(message, error), error
