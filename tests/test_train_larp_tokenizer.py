"""train_larp_tokenizer.py, its scripts and eval/eval_larp_tokenizer.py end to end, as users run them,
but tiny; with training/adversary.py."""
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
import torch
from helpers import mistake, run_here

import train_larp_tokenizer
from common.cli import Parser
from data.augment import draw_flips
from eval import eval_larp_tokenizer
from models.configs import LARPTokenizerConfig
from models.larp_tokenizer import LARPTokenizer
from training import checkpoint
from training.flags import add_flags, merge
from training.load import load_larp_tokenizer

ROOT = Path(__file__).parents[1]
TINY = (
    "--input_size 32 --frame_num 8 --bottleneck_token_num 16 --codebook_size 64 --bottleneck_dim 8 "
    "--encoder_hidden_size 32 --decoder_hidden_size 32 --encoder_num_heads 2 --decoder_num_heads 2 --encoder_depth 1 "
    "--decoder_depth 1 --prior_model gptc-XXS --disc_hidden_size 32 --disc_n_heads 2 --disc_n_layers 1 "
    "--lpips_weights random --num_workers 1 --log_every 1 --batch_size 4 --val_batch_size 2 --device cpu"
).split()
NULL = "--csv_file null128.csv --num_val 0 --precision fp32 --no_dropout true".split()


def environment(**variables):
    # One thread a process: the tests compare numbers, and share two cores.
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


def run(*command, fails=False, cwd=ROOT, **variables):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment(**variables), capture_output=True, text=True
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


def lines(folder: Path, kind: str = "train") -> dict[int, dict]:
    """{step: what was logged, but for the speed}"""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    speed = ("kind", "step", "samples_per_s", "data_wait", "memory_gib")
    return {line["step"]: {k: v for k, v in line.items() if k not in speed} for line in found if line["kind"] == kind}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 videos to train on, 4 held out."""
    root = tmp_path_factory.mktemp("data")
    flags = (
        "--classes PanLeft ZoomIn --groups 1 2 8 9 10 11 12 13 --clips 1 --size 64x48 --min_frames 6 --max_frames 12"
    ).split()
    run(sys.executable, "data/demo.py", "--root", root, *flags)
    run(sys.executable, "split_ucf.py", "--data_root", root, "--data_name", "UCF-101", cwd=ROOT / "data")
    return root


def on_videos(data, logs, *flags):
    return [sys.executable, "train_larp_tokenizer.py", "--data_root", data, "--video_name", "UCF-101_train", *TINY,
            "--save_dir", logs, "--num_iters", 9, "--ema_decays", 0.9, "--keep_checkpoints", 20, *flags]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of nine steps, three an epoch, with the prior's dropout, saved at each and validated at the last."""
    logs = tmp_path_factory.mktemp("logs")
    run(*on_videos(data, logs, "--save_every", 0.3, "--eval_every", 3))
    return logs / "larp_tokenizer"


@pytest.mark.skipif(not (ROOT / ".venv" / "installed").exists(), reason="the scripts would set up .venv")
def test_two_processes_by_the_script_train_as_one(tmp_path):
    """Flags appended to the bash script alone make it small. With R1, LeCam at a weight that shows, the noise of
    targets, and mirrored clips."""
    flags = [*TINY, *NULL, "--save_dir", tmp_path, "--num_iters", 7, "--r1_weight", 0.1, "--lecam_weight", 1, "--flip"]
    config = ["--config", "scripts/configs/larp_tokenizer.yaml"]
    run("bash", "scripts/train_larp_tokenizer.sh", *flags, "--exp_name", "two", GPUS="2")
    run(sys.executable, "train_larp_tokenizer.py", *config, *flags, "--exp_name", "one")
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert one.keys() == two.keys() == set(range(1, 8))
    assert [step for step in one if "disc" in one[step]] == [5]
    for step in one:
        assert two[step] == pytest.approx(one[step], abs=1e-5)


@pytest.mark.skipif(not (ROOT / ".venv" / "installed").exists(), reason="the scripts would set up .venv")
def test_the_reproducing_script_runs_at_a_small_size(tmp_path):
    flags = [*TINY, *NULL, "--save_dir", tmp_path, "--num_iters", 2]
    run("bash", "scripts/train_larp_tokenizer_reproduce.sh", *flags, GPUS="2")
    args = json.loads((tmp_path / "larp_tokenizer_reproduce" / "args.json").read_text())
    assert (args["prior_lr_mult"], args["lecam_weight"], args["seed"], args["world_size"]) == (1, 1e-6, 66667, 2)
    assert (args["precision"], args["allow_tf32"]) == ("fp32", True)
    assert len(lines(tmp_path / "larp_tokenizer_reproduce")) == 2


def test_a_stopped_run_goes_on_as_if_it_had_not(data, trained, tmp_path):
    """SIGTERM in the middle of an epoch; then all losses are equal to the last bit."""
    command = list(map(str, on_videos(data, tmp_path, "--save_every", 100, "--eval_every", 3)))
    metrics = tmp_path / "larp_tokenizer" / "metrics.jsonl"
    running = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    after = random.randint(1, 5)
    while running.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= after):
        time.sleep(0.001)
    os.killpg(running.pid, signal.SIGTERM)  # as schedulers do: the loader's workers get it too
    output = running.communicate(timeout=60)[0].decode()
    assert running.returncode == 143, output
    assert "SIGTERM: saved step" in output
    saved = max(lines(tmp_path / "larp_tokenizer"))
    assert "step " + str(saved) + " of 9" in run(*command, "--resume").stdout
    assert lines(tmp_path / "larp_tokenizer") == lines(trained)
    assert lines(tmp_path / "larp_tokenizer", "val_ema_0.9") == lines(trained, "val_ema_0.9")


def test_micro_batches_train_as_the_whole_batch(monkeypatch, tmp_path):
    """Generator and discriminator, with R1, LeCam at a weight that shows, the noise of targets, and mirrored clips."""
    flags = [*TINY, *NULL, "--save_dir", tmp_path, "--num_iters", 4, "--r1_weight", 0.1, "--lecam_weight", 1, "--flip",
             "--d_update_freq", 2]
    for accum in (1, 4):
        run_here(monkeypatch, train_larp_tokenizer, *flags, "--accum_iter", accum, "--exp_name", accum)
    whole, parts = lines(tmp_path / "1"), lines(tmp_path / "4")
    assert [step for step in whole if "disc" in whole[step]] == [2, 4]
    assert whole.keys() == parts.keys()
    for step in whole:
        assert parts[step] == pytest.approx(whole[step], abs=1e-5)
    whole, parts = (checkpoint.load(tmp_path / name / "checkpoints") for name in ("1", "4"))
    for name in ("discriminator", "lecam"):  # Adam's first steps are of one size, whatever the gradient's
        torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=0)


def test_a_run_of_micro_batches_resumes_exactly(monkeypatch, tmp_path):
    """With the prior's dropout: a run from the checkpoint after step 3 ends at the same last bit."""
    flags = [*TINY, "--csv_file", "null128.csv", "--num_val", 0, "--save_dir", tmp_path, "--num_iters", 4,
             "--accum_iter", 2, "--d_update_freq", 2, "--save_every", 0.03, "--perceptual_weight", 0]
    run_here(monkeypatch, train_larp_tokenizer, *flags, "--exp_name", "whole")
    middle = tmp_path / "whole" / "checkpoints" / "step_0000003.pt"
    run_here(monkeypatch, train_larp_tokenizer, *flags, "--exp_name", "resumed", "--resume", middle)
    whole, resumed = lines(tmp_path / "whole"), lines(tmp_path / "resumed")
    assert resumed == {4: whole[4]} and "disc" in whole[4]


def test_the_discriminator_learns_at_its_own_steps_alone(trained):
    states = {step: checkpoint.load(trained / "checkpoints" / f"step_{step:07d}.pt") for step in (1, 4, 5, 9)}

    def moved(part, a, b):
        return any(not torch.equal(states[a][part][name], states[b][part][name]) for name in states[a][part])

    assert not moved("discriminator", 1, 4) and not moved("lecam", 1, 4)
    assert moved("discriminator", 4, 5) and moved("lecam", 4, 5)
    assert not moved("discriminator", 5, 9)
    assert moved("model", 1, 4)
    prior, codes, rest = (group["lr"] for group in states[9]["optimizer"]["param_groups"])
    assert prior == pytest.approx(50 * rest) and codes == rest
    assert states[9]["disc_optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.3 * rest)


def test_the_generators_loss_leaves_the_discriminator_alone(monkeypatch, tmp_path):
    """With a tokenizer that stands still, the discriminator's step does not know what its verdict weighs."""
    weights = []
    for disc_weight in ("0.3", "3"):
        flags = [*TINY, *NULL, "--perceptual_weight", "0", "--lr", "0", "--num_iters", "5", "--save_dir", str(tmp_path)]
        flags += ["--disc_weight", disc_weight, "--exp_name", disc_weight, "--num_workers", "0"]
        monkeypatch.setattr(sys, "argv", ["train_larp_tokenizer.py", *flags])
        train_larp_tokenizer.main()
        weights.append(checkpoint.load(tmp_path / disc_weight / "checkpoints")["discriminator"])
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])


@pytest.mark.parametrize("source", [[], ["--cache_clips"]])
def test_flip_mirrors_clips_by_their_positions_and_no_validation(monkeypatch, data, tmp_path, source):
    seen, forward = [], LARPTokenizer.forward

    def watch(self, video, *args, **options):
        seen.append((self.training, video.clone()))
        return forward(self, video, *args, **options)

    monkeypatch.setattr(LARPTokenizer, "forward", watch)
    flags = [*TINY, "--data_root", data, "--video_name", "UCF-101_train", "--perceptual_weight", 0, "--disc_weight", 0,
             "--num_iters", 3, "--num_val", 2, "--cache_dir", tmp_path, "--save_dir", tmp_path, *source]
    for flip in ([], ["--flip"]):
        run_here(monkeypatch, train_larp_tokenizer, *flags, "--exp_name", len(flip), *flip)
    plain, flipped = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for training in (True, False):
        before, after = (torch.cat([clip for kind, clip in run if kind == training]) for run in (plain, flipped))
        mirrored = draw_flips(66667, range(12)) if training else torch.zeros(2, dtype=torch.bool)
        assert len(before) == len(mirrored) and mirrored.any() == training and not mirrored.all()
        for clip, other, mirror in zip(before, after, mirrored):
            assert torch.equal(other, clip.flip(-1) if mirror else clip)


def test_stlpips_has_its_own_name(monkeypatch, tmp_path):
    flags = [*TINY, *NULL, "--perceptual", "stlpips", "--disc_weight", 0, "--num_iters", 1, "--save_dir", tmp_path]
    run_here(monkeypatch, train_larp_tokenizer, *flags, "--exp_name", "run")
    line = lines(tmp_path / "run")[1]
    assert line["stlpips"] > 0 and "lpips" not in line


def test_validation_counts_each_held_out_clip_once(trained):
    for kind in ("val", "val_ema_0.9"):
        scores = lines(trained, kind)
        assert scores.keys() == {9}
        assert scores[9]["clips"] == 4
        assert {"psnr_clip", "ssim", "lpips", "code_use", "code_perplexity", "prior_top1"} <= scores[9].keys()
        assert 1 <= scores[9]["code_perplexity"] <= 64 * scores[9]["code_use"]
        assert {path.suffix for path in (trained / "samples" / kind).iterdir()} == {".png", ".mp4"}


def test_checkpoints_load_by_every_name(trained, tmp_path):
    last = trained / "checkpoints" / "step_0000009.pt"
    state = checkpoint.load(last)
    live, average = load_larp_tokenizer(trained / "checkpoints"), load_larp_tokenizer(last, "ema_0.9")
    assert not torch.equal(live.final_layer.linear.weight, average.final_layer.linear.weight)
    checkpoint.export(state, tmp_path / "exported", "ema_0.9")
    average.save_pretrained(tmp_path / "saved")
    authors = {"model": {"args": state["config"], "sd": state["model"], "ema_sd": {0.9: state["ema"]["0.9"]}}}
    torch.save(authors, tmp_path / "theirs.pth")
    copies = [load_larp_tokenizer(tmp_path / name) for name in ("exported", "saved")]
    for copy in [*copies, load_larp_tokenizer(tmp_path / "theirs.pth", "ema_0.9")]:
        assert copy.config == average.config and not copy.training
        for name, value in average.state_dict().items():
            assert torch.equal(copy.state_dict()[name], value)
    with pytest.raises(ValueError, match="no weights 'ema_0.5' in this checkpoint; it holds sd, ema_0.9"):
        load_larp_tokenizer(last, "ema_0.5")
    with pytest.raises(ValueError, match="holds one set of weights"):
        load_larp_tokenizer(tmp_path / "saved", "ema_0.9")


def test_evaluation_does_not_depend_on_batches_or_processes(data, trained, tmp_path):
    """Drawn codes, half precision, fewer frames than were trained."""
    flags = ["--tokenizer", trained / "checkpoints", "--version", "ema_0.9", "--num_frames", 4, "--repeat_to_16",
             "--use_amp", "--amp_dtype", "bfloat16", "--data_root", data, "--video_name", "UCF-101_train",
             "--no_fvd", "--lpips_weights", "random", "--num_workers", 1]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    reports = []
    for batch, launch in ((1, []), (5, launcher)):
        out = tmp_path / f"batch{batch}"
        run(sys.executable, *launch, "eval/eval_larp_tokenizer.py", *flags, "--batch_size", batch, "--output_dir", out)
        assert (out / "sheet.png").exists()
        reports.append(json.loads((out / "report.json").read_text()))
    one, two = reports
    assert one["results"] == pytest.approx(two["results"], rel=1e-3)  # bfloat16 sums depend on the batch
    assert one["results"]["code_use"] == two["results"]["code_use"] > 0
    assert one["results"]["clips"] == 12
    assert one["record"]["num_frames"] == 4
    assert one["record"]["sampler"] == {"precision": "bf16", "deterministic": False, "repeated_frames": 4}
    assert one["record"]["model"].split()[-2] == "ema_0.9"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--csv_file", "nowhere_train.csv"], "no list nowhere_train.csv"),
        (["--video_name", "nowhere"], "no videos under /data/nowhere"),
        (["--patch_size", 7], "input_size 32 is not a multiple of patch_size 7: change --input_size or --patch_size"),
        (["--prior_model", "gpt"], "prior_model.name is one of gptc-tiny"),
        (["--disc_n_heads", 5], "change --disc_hidden_size or --disc_n_heads"),
        (["--batch_size", 129], "128 videos do not fill one batch of 129"),
        (["--stochastic_temperature", -0.1, "--temperature_to", 0.1], "leave one of them out"),
        (["--resume", "/nowhere.pt"], "no checkpoint at /nowhere.pt"),
    ],
)
def test_mistakes_get_one_line(monkeypatch, capsys, tmp_path, flags, message):
    data = [] if "--video_name" in flags else NULL
    flags = [*TINY, *data, "--perceptual_weight", 0, "--save_dir", tmp_path, *flags]
    assert message in mistake(monkeypatch, capsys, train_larp_tokenizer, *flags)


def test_a_run_refuses_another_architecture(monkeypatch, capsys, trained):
    flags = [*TINY, "--save_dir", trained.parent, "--resume", "auto", "--perceptual_weight", 0]
    error = mistake(monkeypatch, capsys, train_larp_tokenizer, *flags, "--codebook_size", 32)
    assert "--codebook_size 32 was given, but the run in" in error and "has 64" in error
    error = mistake(monkeypatch, capsys, train_larp_tokenizer, *flags, "--disc_n_layers", 2)
    assert "--disc_n_layers 2 was given, but" in error


def test_evaluation_of_what_is_not_there(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = ["--dataset_csv", "ucf101_train.csv", "--use_amp", "--det", "--device", "cpu"]
    for tokenizer, message in (
        ("hywang66/no-such-tokenizer", "HF_HUB_OFFLINE=1"),
        (tmp_path / "nothing.pt", "no checkpoint at"),
        (tmp_path, "no checkpoint and no config.json and no model.safetensors in it"),
    ):
        error = mistake(monkeypatch, capsys, eval_larp_tokenizer, "--tokenizer", tokenizer, *flags)
        assert message in error


def test_every_option_of_the_released_config_has_a_flag():
    """But for names that can have one value only, and the colour channels."""
    parser = Parser("test")
    add_flags(parser, LARPTokenizerConfig)
    assert merge(LARPTokenizerConfig, parser.parse_args([])) == {}
    flags = "--norm layer --prior_l2_normalized false --no_dropout true --learned_decoder_latent_pe True".split()
    config = merge(LARPTokenizerConfig, parser.parse_args([*flags, "--stochastic_temperature", "-0.05"]))
    assert config == {
        "bottleneck": {"args": {"norm": "layer", "regularizer": {"args": {"stochastic_temperature": -0.05}}}},
        "prior_model": {"no_dropout": True, "args": {"l2_normalized": False}},
        "learned_decoder_latent_pe": True,
    }
    with pytest.raises(SystemExit):
        parser.parse_args(["--no_dropout", "maybe"])


@pytest.mark.skipif(not (ROOT / ".venv" / "installed").exists(), reason="the script would set up .venv")
def test_set_datasets_links_and_lists(data, tmp_path):
    code = ("scripts/set_datasets.sh", "scripts/setup.sh", "data/metadata.py", "common/__init__.py", "common/errors.py")
    for name in (*code, "requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    script = tmp_path / "scripts" / "set_datasets.sh"
    assert "no data set: set UCF_ROOT" in run("bash", script, fails=True).stderr
    assert "/nowhere is not a folder" in run("bash", script, UCF_ROOT="/nowhere", fails=True).stderr
    run("bash", script, UCF_ROOT=str(data / "UCF-101"))
    assert (tmp_path / "data" / "ucf101").resolve() == (data / "UCF-101").resolve()
    train = (tmp_path / "data" / "metadata" / "ucf101_train.csv").read_text().splitlines()
    assert len(train) == 1 + 12 and ",data/ucf101/PanLeft/v_PanLeft_g08_c01.avi,PanLeft,0" in train[1]
    assert "K600_ANNOTATIONS" in run("bash", script, K600_ROOT=str(data), fails=True).stderr
