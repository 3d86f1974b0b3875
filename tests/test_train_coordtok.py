"""train_coordtok.py and eval/eval_coordtok.py end to end at a tiny size, with training/setup.py."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY_COORDTOK, logged, losses, mistake, num_lines, run, run_here, start, wait

import train_coordtok
from data.video import write_video
from eval import eval_coordtok
from training import checkpoint

PIXELS = ("--point_per_vid", 16, "--lpips_loss_scale", "0.0")


def train(data, logs, *flags, **options):
    return run("train_coordtok.py", *arguments(data, logs, *flags), **options)


def arguments(data, logs, *flags):
    return ["--data_root", data, "--save_dir", logs, *TINY_COORDTOK, *flags]


def test_two_processes_and_accumulation_train_as_one(data, coordtok, tmp_path):
    flags = ("--num_iters", 6, *PIXELS)
    train(data, tmp_path, "--exp_name", "two", *flags, processes=2)
    train(data, tmp_path, "--exp_name", "accumulated", *flags, "--accum_iter", 2, processes=2)
    one = losses(coordtok)
    assert one.keys() == set(range(1, 7))
    for name in ("two", "accumulated"):
        assert losses(tmp_path / name) == pytest.approx(one, abs=1e-5)


def test_cached_clips_train_as_decoded_ones(data, coordtok, tmp_path):
    flags = ("--num_iters", 6, *PIXELS, "--cache_clips", "--cache_dir", tmp_path / "cache")
    two = train(data, tmp_path, "--exp_name", "two", *flags, processes=2)
    assert "clips of 6 of 6 videos" in two.stdout
    assert losses(tmp_path / "two") == pytest.approx(losses(coordtok), abs=1e-5)
    train(data, tmp_path, "--exp_name", "one", *flags, "--num_workers", 0)
    assert losses(tmp_path / "one") == losses(coordtok)


def test_a_killed_run_resumes_bit_for_bit(data, coordtok, tmp_path):
    flags = ("--exp_name", "run", "--num_iters", 6, *PIXELS, "--steps_til_save", 1)
    running = start("train_coordtok.py", *arguments(data, tmp_path, *flags))
    after = random.randint(1, 4)
    wait(running, lambda: num_lines(tmp_path / "run" / "metrics.jsonl") >= after)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    train(data, tmp_path, *flags, "--resume", "auto")
    assert losses(tmp_path / "run") == losses(coordtok)


def test_the_learning_rate_warms_up_and_decays(data, coordtok, tmp_path):
    def rates(run):
        states = (checkpoint.load(path) for path in checkpoint.list_checkpoints(run / "checkpoints"))
        return {state["step"]: state["optimizer"]["param_groups"][0]["lr"] for state in states}

    flags = ("--exp_name", "run", *PIXELS, "--lr", 1e-2, "--steps_til_save", 1, "--keep_checkpoints", 6)
    schedule = ("--num_iters", 6, "--warmup_iters", 2, "--min_lr_mult", 0.1)
    train(data, tmp_path, *flags, *schedule)
    found = rates(tmp_path / "run")
    assert found == pytest.approx({1: 5.5e-3, 2: 1e-2, 3: 8.682e-3, 4: 5.5e-3, 5: 2.318e-3, 6: 1e-3}, rel=1e-3)
    assert set(rates(coordtok).values()) == {1e-4}, "without the flags it is constant, to the bit"


@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGTERM, b"SIGTERM", 143), (signal.SIGINT, b"Ctrl-C", 130)]
)
def test_a_signal_saves_and_leaves(data, tmp_path, number, name, code):
    """And ends with its code, so that a script does not go on with an unfinished model."""
    flags = ("--exp_name", "run", "--num_iters", 100000, "--point_per_vid", 16)
    running = start("train_coordtok.py", *arguments(data, tmp_path, *flags))
    wait(running, lambda: num_lines(tmp_path / "run" / "metrics.jsonl") >= 2)
    os.killpg(running.pid, number)  # as schedulers and terminals do: the loader's workers get it too
    output, _ = running.communicate(timeout=60)
    assert running.returncode == code and b"Traceback" not in output, output
    assert output.splitlines()[-1].startswith(name + b": saved step")
    saved = int(next((tmp_path / "run" / "checkpoints").iterdir()).stem.removeprefix("step_"))
    assert saved == max(losses(tmp_path / "run"))
    resumed = train(data, tmp_path, "--exp_name", "run", "--num_iters", saved + 1, "--point_per_vid", 16, "--resume")
    assert f"step {saved} of {saved + 1}" in resumed.stdout


def test_second_step_validation_and_evaluation(data, coordtok, tmp_path):
    """The published command of step 2 with two processes, from the export of step 1; then the evaluation script on what
    it wrote, and on its export."""
    checkpoint.export(checkpoint.load(coordtok / "checkpoints"), tmp_path / "first")
    done = train(
        data, tmp_path, "--exp_name", "run", "--num_iters", 2, "--point_per_vid", 32, "--num_val", 2,
        "--is_second_step", "--first_step_ckpt", tmp_path / "first", "--lpips_loss_scale", "1.0",
        "--lpips_weights", "random", processes=2,
    )
    folder = tmp_path / "run_second"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["lpips"] > 0 for line in lines if line["kind"] == "train")
    validation = [line for line in lines if line["kind"] == "val"]
    assert [line["clips"] for line in validation] == [2], done.stdout
    assert {"psnr_frame", "ssim", "lpips", "psnr_mean_frame"} <= validation[0].keys()
    assert {path.suffix for path in (folder / "samples").iterdir()} == {".png", ".mp4"}

    checkpoint.export(checkpoint.load(folder / "checkpoints"), tmp_path / "second")
    evaluate = ["--data_root", data, "--protocol", "larp_rfvd", "--no_fvd",
                "--lpips_weights", "random", "--num_workers", "1", "--batch_size"]
    reports = []
    for tokenizer, batch, processes in ((folder / "checkpoints", 1, 0), (tmp_path / "second", 3, 2)):
        out = tmp_path / f"evaluation{batch}"
        run("eval/eval_coordtok.py", *evaluate, batch, "--output_dir", out, "--tokenizer", tokenizer,
            processes=processes)
        assert (out / "sheet.png").exists() and len(list((out / "reconstructions").glob("*.mp4"))) >= 1
        reports.append(json.loads((out / "report.json").read_text()))
    one, two = reports
    assert [each["record"]["model"].split()[-1] for each in reports] == [one["record"]["model"].split()[-1]] * 2
    assert one["results"] == pytest.approx(two["results"], rel=1e-5), "neither batches nor processes change a number"
    assert one["results"]["clips"] == 6
    assert one["record"]["title"] == "larp_rfvd*"
    assert any("RANDOM" in deviation for deviation in one["record"]["deviations"])


def test_second_step_and_evaluation_by_stlpips(monkeypatch, data, coordtok, tmp_path):
    """It has its own name in logs, results and record, and LPIPS has none."""
    perceptual = ("--perceptual", "stlpips", "--lpips_weights", "random")
    flags = (*perceptual, "--exp_name", "run", "--num_iters", 1, "--point_per_vid", 32, "--num_val", 2)
    second = ("--is_second_step", "--first_step_ckpt", coordtok / "checkpoints", "--lpips_loss_scale", 1)
    run_here(monkeypatch, train_coordtok, *arguments(data, tmp_path, *flags), *second)
    folder = tmp_path / "run_second"
    for kind in ("train", "val"):
        assert logged(folder, kind)[1]["stlpips"] > 0 and "lpips" not in logged(folder, kind)[1]
    run_here(monkeypatch, eval_coordtok, "--tokenizer", folder / "checkpoints", "--data_root", data, "--protocol",
             "larp_rfvd", "--no_fvd", "--output_dir", tmp_path / "out", *perceptual)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["results"]["stlpips"] > 0 and "lpips" not in report["results"]
    assert report["record"]["lpips"] == "none" and report["record"]["stlpips"] == "stlpips 0.0.2 alex, RANDOM network"


def test_damaged_files_are_listed_once_and_training_goes_on(data, coordtok, tmp_path):
    folder = tmp_path / "data" / "UCF-101_train" / "Bad"
    shutil.copytree(data / "UCF-101", tmp_path / "data" / "UCF-101_train")
    folder.mkdir()
    good = next((data / "UCF-101").glob("PanLeft/*.avi"))
    (folder / "truncated.avi").write_bytes(good.read_bytes()[:3000])
    (folder / "empty.avi").write_bytes(b"")
    (folder / "text.avi").write_text("not a video")
    write_video(folder / "one_frame.mp4", torch.rand(3, 1, 48, 64))  # short, but good
    bad = ["empty.avi", "text.avi", "truncated.avi"]
    corrupted = ROOT.parent / "shared" / "clips" / "corrupted.mp4"
    if corrupted.exists():
        shutil.copy(corrupted, folder)
        bad = [corrupted.name, *bad]
    done = train(tmp_path / "data", tmp_path, "--exp_name", "run", "--num_iters", 12, "--point_per_vid", 16,
                 "--num_views", 8, "--num_workers", 2, processes=2)
    listed = [line.split("\t")[0] for line in (tmp_path / "run" / "quarantine.txt").read_text().splitlines()]
    assert sorted(Path(path).name for path in listed) == bad
    assert f"{len(bad)} damaged files are listed in" in done.stdout
    assert len(losses(tmp_path / "run")) == 12


def test_a_folder_of_damaged_files_ends_the_run_and_its_workers(tmp_path):
    folder = tmp_path / "data" / "UCF-101_train" / "Bad"
    folder.mkdir(parents=True)
    (folder / "text.avi").write_text("not a video")
    running = start("train_coordtok.py", *arguments(tmp_path / "data", tmp_path, "--num_iters", 2, *PIXELS))
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 1
    assert f"error: no readable video left of 1 under {folder}" in output.decode()
    assert "Traceback" not in output.decode()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_root", "/nowhere"], "no videos under /nowhere/UCF-101_train"),
        (["--img_size", "33"], "img_size 33 is not a multiple of enc_patch_size_xy 8"),
        (["--num_views", "4", "--accum_iter", "3"], "4"),
        (["--is_second_step"], "--is_second_step needs --first_step_ckpt"),
        (["--is_second_step", "--first_step_ckpt", "README.md"], "README.md"),
        (["--resume", "/nowhere.pt"], "no checkpoint at /nowhere.pt"),
    ],
)
def test_mistakes_get_one_line(monkeypatch, capsys, data, tmp_path, flags, message):
    flags = arguments(data, tmp_path, "--num_iters", 1, *flags)
    assert message in mistake(monkeypatch, capsys, train_coordtok, *flags)


@pytest.mark.skipif(not (ROOT / ".venv" / "installed").exists(), reason="the script would set up .venv")
def test_the_reproducing_script_has_the_released_settings(monkeypatch, tmp_path):
    """What it gives to torchrun, for which a function stands in here."""
    monkeypatch.setenv("BASH_FUNC_torchrun%%", '() { printf "%s\\n" "$@" -- ; }')
    monkeypatch.setenv("BASH_FUNC_python%%", "() { :; }")  # the look at what step 2 needs
    monkeypatch.setenv("DATA_ROOT", "/a b")
    command = ["bash", "scripts/train_coordtok_reproduce.sh", "--num_val", "0"]
    lines, steps = subprocess.check_output(command, cwd=ROOT, text=True), []
    for words in lines.removesuffix("--\n").split("--\n"):
        monkeypatch.setattr(sys, "argv", words.splitlines()[2:])
        assert sys.argv[0] == "train_coordtok.py"
        steps.append(vars(train_coordtok.parse_args()))
    common = {"padding": "released", "precision": "fp16", "allow_tf32": True, "batch_size": 256, "lr": 1e-4,
              "data_root": "/a b", "num_val": 0, "exp_name": "coordtok_reproduce", "resume": "auto"}
    first = {"num_iters": 1000001, "point_per_vid": 1024, "lpips_loss_scale": 0, "lpips_dropout": False}
    second = {"num_iters": 50001, "point_per_vid": 4096, "lpips_loss_scale": 1, "lpips_dropout": True,
              "is_second_step": True, "first_step_ckpt": "logs/coordtok_reproduce/checkpoints"}
    for step, recipe in zip(steps, (common | first, common | second), strict=True):
        assert {name: step[name] for name in recipe} == recipe


def test_a_foreign_architecture_flag_names_both_values(monkeypatch, capsys, data, coordtok, tmp_path):
    line = mistake(monkeypatch, capsys, train_coordtok, *arguments(data, tmp_path), "--num_iters", 1,
                   "--is_second_step", "--first_step_ckpt", coordtok / "checkpoints", "--enc_embed_dim", 64)
    assert "--enc_embed_dim 64 was given, but" in line and "has 32" in line


@pytest.mark.parametrize("flags", [["--first_step_ckpt", "x.pt"], ["--lpips_dropout"], ["--check"]])
def test_flags_of_step_2_need_step_2(monkeypatch, capsys, flags):
    """Left unnoticed, step 1 would be trained again."""
    assert f"{flags[0]} is of step 2: add --is_second_step" in mistake(monkeypatch, capsys, train_coordtok, *flags)
