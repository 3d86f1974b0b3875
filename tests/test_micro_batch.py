"""--micro_batch auto: training/micro_batch.py; and --num_classes auto."""
import subprocess
import sys
from argparse import Namespace

import pytest
from helpers import LONG, ROOT, TINY_COORDTOK, environment, losses, mistake, run, run_here

import train_sit
from training import checkpoint
from training.micro_batch import fit_micro_batch, try_step

# A script whose model runs out of memory above two clips at a time, also in the process that tries a step.
SMALL_GPU = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from models.coordtok import CoordTok
from train_coordtok import main

encode = CoordTok.encode

def small(self, video, *rest):
    if len(video) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 clips")
    return encode(self, video, *rest)

CoordTok.encode = small
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(("fits", "tried", "accum"), [(64, [24], 1), (23, [24, 12], 2), (5, [24, 12, 6, 3], 8),
                                                      (1, [24, 12, 6, 3, 1], 24)])
def test_halves_until_a_step_fits(tmp_path, capsys, fits, tried, accum):
    args, seen = Namespace(batch_size=24, accum_iter=1, micro_batch="auto", resume=None), []

    def attempt(tried):
        seen.append(tried.batch_size)
        assert (tried.accum_iter, tried.micro_batch) == (1, "off")
        return None if tried.batch_size <= fits else "not enough memory"

    fit_micro_batch(args, tmp_path, attempt)
    assert seen == tried and args.accum_iter == accum and args.batch_size == 24
    assert f"{24 // accum} clips at a time fit, --accum_iter is {accum}" in capsys.readouterr().out


def test_starts_at_accum_iter_and_says_what_does_not_fit(tmp_path):
    args, seen = Namespace(batch_size=24, accum_iter=6, micro_batch="auto", resume=None), []
    with pytest.raises(ValueError, match="not even one clip at a time fits .no memory.; try --gradient_checkpointing"):
        fit_micro_batch(args, tmp_path, lambda tried: seen.append(tried.batch_size) or "no memory")
    assert seen == [4, 2, 1]
    args.accum_iter = 5
    with pytest.raises(ValueError, match="--batch_size 24 does not divide by 1 processes times --accum_iter 5"):
        fit_micro_batch(args, tmp_path, lambda tried: None)
    with pytest.raises(ValueError, match="--fsdp"):
        fit_micro_batch(Namespace(**{**vars(args), "fsdp": True}), tmp_path, lambda tried: None)


@LONG
def test_a_run_on_a_small_gpu(data, tmp_path):
    """Two processes train as one with that --accum_iter; a resumed run does not try again."""
    script = tmp_path / "small_gpu.py"
    script.write_text(SMALL_GPU)
    flags = ["--data_root", data, "--save_dir", tmp_path, "--exp_name", "run", "--point_per_vid", 16,
             "--lpips_loss_scale", 0, *TINY_COORDTOK, "--num_views", 8, "--micro_batch", "auto", "--resume"]

    def train(steps):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run([*launch, str(script), *map(str, flags), "--num_iters", str(steps)], cwd=ROOT,
                              env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "2 clips at a time fit, --accum_iter is 2" in train(2)
    assert "clips at a time fit" not in train(3)
    run("train_coordtok.py", *flags[:-3], "--exp_name", "plain", "--num_iters", 3)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    assert checkpoint.load(tmp_path / "run" / "checkpoints")["args"]["accum_iter"] == 2


def test_another_error_of_the_step_that_is_tried(monkeypatch, tmp_path):
    """It comes from a process of its own, which finds the script by its name."""
    (tmp_path / "broken.py").write_text("def main():\n    raise ValueError('NO CUDA out of memory')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["broken.py"])
    with pytest.raises(ValueError, match="the step that was tried has failed: NO CUDA out of memory"):
        try_step(Namespace(save_dir=str(tmp_path), exp_name="run", num_iters=3))


def test_classes_are_counted(monkeypatch, capsys, scripts, folder, tmp_path):
    for name in ("sit", "larp_ar"):
        script, flags = scripts[name]
        run_here(monkeypatch, script, *flags, "--save_dir", tmp_path, "--exp_name", name, "--num_iters", 1,
                 "--num_classes", "auto")
        state = checkpoint.load(tmp_path / name / "checkpoints")
        assert state["config"]["num_classes"] == state["args"]["num_classes"] == len(state["classes"]) == 2
    _, flags = scripts["sit"]
    flags = [*flags, "--save_dir", tmp_path, "--num_classes", "auto"]
    line = mistake(monkeypatch, capsys, train_sit, *flags, "--data_root", folder.parent, "--video_name", folder.name)
    assert "--num_classes auto" in line and "put each into the folder of its class" in line
    assert "expected 1 or more, or auto" in mistake(monkeypatch, capsys, train_sit, *flags, "--num_classes", "0")
