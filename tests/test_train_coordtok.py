"""train_coordtok.py and eval/eval_coordtok.py end to end, as users run them, at a tiny size."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = (
    "--num_frames 8 --img_size 32 --enc_embed_dim 32 --enc_num_layers 1 --enc_num_heads 2 --enc_patch_size_xy 8 "
    "--enc_patch_size_t 4 --enc_patch_num_layers 1 --latent_resolution_xy 8 --latent_resolution_t 8 "
    "--latent_n_features 4 --latent_patch_size_xy 4 --latent_patch_size_t 4 --dec_embed_dim 32 --dec_num_layers 1 "
    "--dec_num_heads 2 --num_views 4 --num_workers 1 --num_val 0 --log_every 1"
).split()


def command(data, logs, *flags, processes=0):
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc_per_node={processes}"]
    return [*launch, "train_coordtok.py", "--data_root", str(data), "--save_dir", str(logs), *TINY, *map(str, flags)]


def environment():
    # One thread a process: the tests compare numbers, and share two cores.
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def train(data, logs, *flags, processes=0, fails=False):
    done = subprocess.run(
        command(data, logs, *flags, processes=processes), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    flags = "--classes PanLeft ZoomIn --groups 1 2 8 9 10 --size 64x48 --min_frames 6 --max_frames 12".split()
    subprocess.run([sys.executable, "data/demo.py", "--root", root, *flags], cwd=ROOT, check=True)
    split = ["split_ucf.py", "--data_root", root, "--data_name", "UCF-101"]
    subprocess.run([sys.executable, *split], cwd=ROOT / "data", check=True)
    return root


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A finished run of six steps in one process."""
    logs = tmp_path_factory.mktemp("logs")
    train(data, logs, "--exp_name", "one", "--num_iters", 6, "--point_per_vid", 16, "--lpips_loss_scale", "0.0")
    return logs / "one"


def test_two_processes_and_accumulation_train_as_one(data, trained, tmp_path):
    flags = ("--num_iters", 6, "--point_per_vid", 16, "--lpips_loss_scale", "0.0")
    train(data, tmp_path, "--exp_name", "two", *flags, processes=2)
    train(data, tmp_path, "--exp_name", "accumulated", *flags, "--accum_iter", 2)
    one = losses(trained)
    assert one.keys() == set(range(1, 7))
    for name in ("two", "accumulated"):
        assert losses(tmp_path / name) == pytest.approx(one, abs=1e-5)


def test_a_killed_run_resumes_bit_for_bit(data, trained, tmp_path):
    flags = ("--exp_name", "run", "--num_iters", 6, "--point_per_vid", 16, "--lpips_loss_scale", "0.0",
             "--steps_til_save", 1)
    metrics = tmp_path / "run" / "metrics.jsonl"
    running = subprocess.Popen(
        command(data, tmp_path, *flags), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    after = random.randint(1, 4)
    while running.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= after):
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    train(data, tmp_path, *flags, "--resume", "auto")
    assert losses(tmp_path / "run") == losses(trained)


def test_sigterm_saves_and_leaves(data, tmp_path):
    flags = ("--exp_name", "run", "--num_iters", 100000, "--point_per_vid", 16)
    metrics = tmp_path / "run" / "metrics.jsonl"
    running = subprocess.Popen(
        command(data, tmp_path, *flags), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    while running.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGTERM)  # as schedulers do: the loader's workers get it too
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 0, output
    assert b"SIGTERM: saved step" in output
    saved = int(next((tmp_path / "run" / "checkpoints").iterdir()).stem.removeprefix("step_"))
    assert saved == max(losses(tmp_path / "run"))
    resumed = train(data, tmp_path, "--exp_name", "run", "--num_iters", saved + 1, "--point_per_vid", 16, "--resume")
    assert f"step {saved} of {saved + 1}" in resumed.stdout


def test_second_step_validation_and_evaluation(data, trained, tmp_path):
    """The published command of step 2 with two processes; then the evaluation script on what it wrote."""
    done = train(
        data, tmp_path, "--exp_name", "run", "--num_iters", 2, "--point_per_vid", 32, "--num_val", 2,
        "--is_second_step", "--first_step_ckpt", trained / "checkpoints", "--lpips_loss_scale", "1.0",
        "--lpips_weights", "random", processes=2,
    )
    run = tmp_path / "run_second"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["lpips"] > 0 for line in lines if line["kind"] == "train")
    validation = [line for line in lines if line["kind"] == "val"]
    assert [line["clips"] for line in validation] == [2], done.stdout
    assert {"psnr_frame", "ssim", "lpips", "psnr_mean_frame"} <= validation[0].keys()
    assert {path.suffix for path in (run / "samples").iterdir()} == {".png", ".mp4"}

    evaluate = ["eval/eval_coordtok.py", "--tokenizer", run / "checkpoints", "--data_root", data, "--protocol",
                "larp_rfvd", "--no_fvd", "--lpips_weights", "random", "--num_workers", "1", "--batch_size"]
    reports = []
    for batch, launch in ((1, []), (3, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
        out = tmp_path / f"evaluation{batch}"
        line = [sys.executable, *launch, *evaluate, str(batch), "--output_dir", out]
        done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (out / "sheet.png").exists()
        reports.append(json.loads((out / "report.json").read_text()))
    one, two = reports
    assert one["results"] == pytest.approx(two["results"], rel=1e-5), "neither batches nor processes change a number"
    assert one["results"]["clips"] == 6
    assert one["record"]["title"] == "larp_rfvd*"
    assert any("RANDOM" in deviation for deviation in one["record"]["deviations"])


def test_damaged_files_are_listed_once_and_training_goes_on(data, trained, tmp_path):
    folder = tmp_path / "data" / "UCF-101_train" / "Bad"
    shutil.copytree(data / "UCF-101", tmp_path / "data" / "UCF-101_train")
    folder.mkdir()
    good = next((data / "UCF-101").glob("PanLeft/*.avi"))
    (folder / "truncated.avi").write_bytes(good.read_bytes()[:3000])
    (folder / "empty.avi").write_bytes(b"")
    (folder / "text.avi").write_text("not a video")
    done = train(tmp_path / "data", tmp_path, "--exp_name", "run", "--num_iters", 12, "--point_per_vid", 16,
                 "--num_views", 8, "--num_workers", 2, processes=2)
    listed = [line.split("\t")[0] for line in (tmp_path / "run" / "quarantine.txt").read_text().splitlines()]
    assert sorted(Path(path).name for path in listed) == ["empty.avi", "text.avi", "truncated.avi"]
    assert "3 damaged files, listed in" in done.stdout
    assert len(losses(tmp_path / "run")) == 12


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
def test_mistakes_get_one_line(data, tmp_path, flags, message):
    done = train(data, tmp_path, "--exp_name", "run", "--num_iters", 1, *flags, fails=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert message in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_a_foreign_architecture_flag_names_both_values(data, trained, tmp_path):
    done = train(data, tmp_path, "--num_iters", 1, "--is_second_step", "--first_step_ckpt", trained / "checkpoints",
                 "--enc_embed_dim", 64, fails=True)
    assert "--enc_embed_dim 64 was given, but" in done.stderr
    assert "has 32" in done.stderr
