"""train_sit.py end to end, as users run it, at a tiny size."""
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY_COORDTOK, losses, num_lines, run, run_here, start, wait

import train_sit
from training import checkpoint

STEPS = 6
CLASSES = ("--num_classes", 2, "--class_dropout_prob", 0.3)


def arguments(data, coordtok, results, *flags):
    return ["--data_root", data, "--first_model_ckpt", coordtok / "checkpoints", "--results_dir", results,
            "--model", "SiT-XS/4", "--global_batch_size", 4, "--num_workers", 1, "--num_val", 0, "--log_every", 1,
            "--num_iters", STEPS, "--exp_name", "run", *flags]


def train(*args, **options):
    return run("train_sit.py", *arguments(*args), **options)


@pytest.fixture(scope="module")
def sit(data, coordtok, tmp_path_factory) -> Path:
    """A finished run in one process, from video, with classes and samples."""
    results = tmp_path_factory.mktemp("results")
    train(data, coordtok, results, *CLASSES, "--num_val", 3, "--val_sampling_steps", 3, "--val_cfg_scale", 2)
    return results / "run"


def test_the_run_says_what_it_did(sit):
    assert losses(sit).keys() == set(range(1, STEPS + 1))
    assert {path.name for path in (sit / "samples").iterdir()} == {"step_0000006.png", "step_0000006.mp4"}
    state = checkpoint.load(sit / "checkpoints")
    assert state["classes"] == ["PanLeft", "ZoomIn"]
    assert {name: tuple(values.shape) for name, values in state["statistics"].items()} == {
        f"{plane}_{kind}": (4,) for plane in ("xy", "yt", "xt") for kind in ("mean", "std")}
    moved = [(state["ema"][name] - weights).abs().max() for name, weights in state["model"].items()]
    assert 0 < max(moved) < 0.01, "the average follows the weights"


def test_two_processes_train_as_one(data, coordtok, sit, tmp_path):
    train(data, coordtok, tmp_path, *CLASSES, "--accum_iter", 2, processes=2)
    assert losses(tmp_path / "run") == pytest.approx(losses(sit), abs=1e-5)
    one, two = (checkpoint.load(folder / "checkpoints")["statistics"] for folder in (sit, tmp_path / "run"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)


def test_a_killed_run_resumes_bit_for_bit(data, coordtok, sit, tmp_path):
    flags = (*CLASSES, "--ckpt_every", 1)
    running = start("train_sit.py", *arguments(data, coordtok, tmp_path, *flags))
    after = random.randint(1, 4)
    wait(running, lambda: num_lines(tmp_path / "run" / "metrics.jsonl") >= after)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    train(data, coordtok, tmp_path, *flags, "--ckpt", "auto")
    assert losses(tmp_path / "run") == losses(sit)
    there, here = (checkpoint.load(folder / "checkpoints") for folder in (sit, tmp_path / "run"))
    for name, weights in there["ema"].items():
        assert torch.equal(here["ema"][name], weights)


def test_a_cache_is_gone_on_with_and_sigterm_saves(data, coordtok, tmp_path):
    """Filling is killed; two processes go on with it and train; one process trains from it as they did."""
    views = 100  # 600 windows: three shards
    flags = ("--cache_latents", views, "--cache_dir", tmp_path / "cache")
    running = start("train_sit.py", *arguments(data, coordtok, tmp_path / "killed", *flags))
    wait(running, lambda: any(tmp_path.glob("cache/*/shard_*.npy")))
    running.send_signal(signal.SIGKILL)
    running.communicate()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/shard_*.npy")}
    assert 0 < len(kept) < 3
    train(data, coordtok, tmp_path / "two", *flags, processes=2)
    shards = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/shard_*.npy")}
    assert len(shards) == 3
    assert shards.items() >= kept.items()

    flags = (*flags, "--data_root", data, "--num_iters", 100000)
    running = start("train_sit.py", *arguments(data, coordtok, tmp_path / "one", *flags))
    run_folder = tmp_path / "one" / "run"
    wait(running, lambda: num_lines(run_folder / "metrics.jsonl") >= STEPS)
    os.killpg(running.pid, signal.SIGTERM)  # as schedulers do: to the whole session
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 143, output
    assert b"SIGTERM: saved step" in output
    one, two = losses(run_folder), losses(tmp_path / "two" / "run")
    assert {step: one[step] for step in two} == pytest.approx(two, abs=1e-5)
    assert checkpoint.load(run_folder / "checkpoints")["step"] == max(one)


def test_the_published_command_with_the_authors_tokenizer(data, coordtok, tmp_path):
    state = checkpoint.load(coordtok / "checkpoints")["model"]
    released = tmp_path / "CoordTok.pth"
    torch.save({"epoch": 1, "model": {f"module.{name}": value for name, value in state.items()}}, released)
    architecture = TINY_COORDTOK[: TINY_COORDTOK.index("--num_views")]
    train(data, coordtok, tmp_path, *architecture, "--first_model_ckpt", released, "--epochs", 1, "--num-iters", 1,
          "--path-type", "GVP", "--prediction", "score", "--loss-weight", "velocity", "--global_seed", 1, processes=1)
    state = checkpoint.load(tmp_path / "run" / "checkpoints")
    assert state["interpolant"]["path"] == "GVP"
    assert state["step"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_classes", "3"], "--num_classes is 3, but .* has 2 classes"),
        (["--global_batch_size", "5", "--accum_iter", "2"], "global batch of 5 cannot be shared by 1 processes x 2"),
        (["--global_batch_size", "7"], "6 videos do not fill one batch of 7"),
        (["--first_model_ckpt", "README.md"], "README.md"),
        (["--first_model_ckpt", "/nowhere"], "/nowhere"),
        (["--model", "SiT-S/8", "--latent_resolution_xy", "16"], "--latent_resolution_xy 16 was given, but .* has 8"),
        (["--ckpt", "auto"], "has other settings than the flags .*num_classes 2 there, 1 here"),
        (["--ckpt", "auto", *map(str, CLASSES), "--first_model_ckpt", "OTHER"], "was trained on another tokenizer"),
        ([], "already holds step_0000006.pt"),
    ],
)
def test_mistakes_are_named(data, coordtok, sit, tmp_path, monkeypatch, flags, message):
    state = checkpoint.load(coordtok / "checkpoints")
    state["model"]["weight_tokens_xy"] += 1
    other = checkpoint.save(tmp_path, 1, state)
    flags = [str(other) if flag == "OTHER" else flag for flag in flags]
    results = sit.parent if not flags or flags[0] == "--ckpt" else tmp_path
    monkeypatch.setattr(sys, "argv", ["train_sit.py", *map(str, arguments(data, coordtok, results, *flags))])
    with pytest.raises((ValueError, OSError), match=message):
        train_sit.main()


def test_damaged_clips_of_the_statistics(data, coordtok, monkeypatch, tmp_path):
    """A batch of them alone counts for nothing; where all are damaged, an error says so."""
    videos = tmp_path / "data" / "V" / "A"
    videos.mkdir(parents=True)
    for i, path in enumerate(sorted((data / "UCF-101_train").glob("*/*"))[:5]):
        shutil.copy(path, videos / f"{i}.mp4")
    (videos / "2.mp4").write_text("no video")
    flags = [*arguments(tmp_path / "data", coordtok, tmp_path, "--video_name", "V", "--val_batch_size", 1)]
    run_here(monkeypatch, train_sit, *flags, "--num_iters", 1)
    assert checkpoint.load(tmp_path / "run" / "checkpoints")["statistics"]["xy_std"].isfinite().all()
    for path in videos.iterdir():
        path.write_text("no video")
    with pytest.raises(ValueError, match="none of the clips that the latents' mean and std are of can be decoded"):
        run_here(monkeypatch, train_sit, *flags, "--exp_name", "none")
