"""All four scripts: a run that ends anywhere goes on as if it had not, to the last bit, with validation, samples and
caches on; and what cannot work is told at once. The end comes as an exception that nothing catches; the tests of each
script have real signals too."""
import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import TINY_COORDTOK, mistake, run_here, tiny_larp
from safetensors.torch import save_file

import train_ar
import train_coordtok
import train_larp_tokenizer
import train_sit
from common.cli import Parser
from data.cache import RowCache
from eval import i3d
from models.configs import CoordTokConfig
from models.coordtok import CoordTok
from training import checkpoint, clip_cache, setup
from training.flags import add_flags, merge
from training.log import StopSignal
from training.validation import HeldOut, SampleCheck, Validation

SCRIPTS = {script.__name__: script for script in (train_coordtok, train_sit, train_larp_tokenizer, train_ar)}
COORDTOK = [*TINY_COORDTOK, "--num_frames", 16]
COMMON = ["--video_name", "UCF-101_train", "--num_iters", 6, "--num_val", 2, "--val_batch_size", 2, "--log_every", 1,
          "--exp_name", "run", "--device", "cpu"]
LARP = (
    "--input_size 32 --frame_num 12 --bottleneck_token_num 12 --codebook_size 64 --bottleneck_dim 8 "
    "--encoder_hidden_size 32 --decoder_hidden_size 32 --encoder_num_heads 2 --decoder_num_heads 2 --encoder_depth 1 "
    "--decoder_depth 1 --prior_model gptc-tiny --disc_hidden_size 32 --disc_n_heads 2 --disc_n_layers 1 "
    "--lpips_weights random --perceptual_weight 0 --batch_size 4 --ema_decays 0.9 --eval_every 2 --save_every 3 "
    "--cache_clips"
).split()
AR = (
    "--model llama-abs-S --dim 32 --n_layer 2 --n_head 2 --multiple_of 16 --batch_size 4 --ema_decays 0.9 "
    "--eval_every 2 --sample_every 3 --save_every 100 --num_samples 2 --cfg_scale 1.5 --cache_codes 1"
).split()


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def flags(data, tmp_path_factory) -> Callable[[str, Path], list]:
    """The flags of a script's run in a folder. CoordTok's is its second step, with LPIPS's dropout."""
    given = tmp_path_factory.mktemp("given")
    parser = Parser("")
    add_flags(parser, CoordTokConfig)
    tokenizer = CoordTok(**merge(CoordTokConfig, parser.parse_known_args(list(map(str, COORDTOK)))[0]))
    state = {"kind": "coordtok", "config": tokenizer.config.__dict__, "model": tokenizer.state_dict()}
    coordtok = checkpoint.save(given, 1, state)
    tiny_larp(input_size=32, frame_num=12, bottleneck_token_num=12).save_pretrained(given / "larp")

    def of_run(script: str, folder: Path) -> list:
        own = {
            "train_coordtok": [
                *COORDTOK, "--is_second_step", "--first_step_ckpt", coordtok, "--lpips_weights", "random",
                "--lpips_dropout", "--point_per_vid", 32, "--steps_til_summary", 2, "--steps_til_save", 3,
                "--cache_clips",
            ],
            "train_sit": [
                "--first_model_ckpt", coordtok, "--model", "SiT-XS/4", "--global_batch_size", 4, "--num_classes", 2,
                "--class_dropout_prob", 0.3, "--val_cfg_scale", 2, "--val_sampling_steps", 3, "--sample_every", 2,
                "--ckpt_every", 3, "--cache_latents", 1,
            ],
            "train_larp_tokenizer": LARP,
            "train_ar": [*AR, "--tokenizer", given / "larp"],
        }[script]
        return [*own, *COMMON, "--data_root", data, "--save_dir", folder, "--cache_dir", folder / "cache"]

    return of_run


@pytest.fixture(scope="module", autouse=True)
def cheap_i3d(tmp_path_factory):
    """I3D is built as ever, from weights in the cache, but looks at a few pixels alone."""
    path = tmp_path_factory.mktemp("i3d") / "weights.safetensors"
    save_file(i3d.I3D().state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(i3d, "cached_weights", lambda: path)
        patch.setattr(i3d.I3D, "forward", lambda self, video, resize="": video.mean(dim=(1, 2)).flatten(1)[:, :400])
        yield


def outcome(folder: Path) -> tuple[dict, dict, int | None]:
    """What was logged but for speed, in its order; the last checkpoint's weights; the best step."""
    (run,) = folder.glob("run*")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    speed = ("samples_per_s", "data_wait", "memory_gib")
    logged = {(line["step"], line["kind"]): {k: v for k, v in line.items() if k not in speed} for line in lines}
    best = run / "checkpoints" / "best.pt"
    return logged, checkpoint.load(run / "checkpoints")["model"], best.exists() and checkpoint.load(best)["step"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Callable[[str], tuple]:
    """The outcome of a script's run that nothing stopped."""
    done = {}

    def of_script(script: str) -> tuple:
        if script not in done:
            folder = tmp_path_factory.mktemp(script)
            with pytest.MonkeyPatch.context() as patch:
                run_here(patch, SCRIPTS[script], *flags(script, folder))
            done[script] = outcome(folder)
        return done[script]

    return of_script


def kill_at(monkeypatch, owner, name: str, call: int) -> None:
    """End the process, as it were, at a call of a function."""
    function, left = getattr(owner, name), iter(range(call - 1))

    def deadly(*args, **options):
        if next(left, None) is None:
            raise Killed
        return function(*args, **options)

    monkeypatch.setattr(owner, name, deadly)


ENDS = {
    "saving": lambda patch, _: kill_at(patch, checkpoint, "rename", 2),  # the file is there, but not under its name
    "scoring": lambda patch, script: kill_at(patch, *{
        "train_sit": (SampleCheck, "run"), "train_ar": (HeldOut, "score")}.get(script, (Validation, "run")), 2),
    "marking the best": lambda patch, _: kill_at(patch, checkpoint, "mark_best", 1),
    "sampling": lambda patch, _: kill_at(patch, SampleCheck, "run", 1),
    "filling a cache": lambda patch, script: kill_at(patch, *{
        "train_sit": (RowCache, "write"), "train_ar": (RowCache, "write")}.get(script, (clip_cache, "fill")), 1),
}


@pytest.mark.parametrize(("script", "end"), [
    *((script, end) for script in SCRIPTS for end in ("saving", "scoring")),
    ("train_coordtok", "filling a cache"), ("train_sit", "filling a cache"), ("train_ar", "filling a cache"),
    ("train_coordtok", "marking the best"), ("train_ar", "sampling"),
])
def test_a_killed_run_goes_on_bit_for_bit(flags, whole, monkeypatch, tmp_path, script, end):
    with pytest.MonkeyPatch.context() as patch:
        ENDS[end](patch, script)
        with pytest.raises(Killed):
            run_here(patch, SCRIPTS[script], *flags(script, tmp_path))
    run_here(monkeypatch, SCRIPTS[script], *flags(script, tmp_path), "--resume", "auto")
    check_equal(outcome(tmp_path), whole(script))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stopped_run_goes_on_bit_for_bit(flags, whole, monkeypatch, tmp_path, script):
    """SIGTERM in a step after which scores are due: it leaves without them, and the next run makes up for them."""
    with pytest.MonkeyPatch.context() as patch:
        steps = iter(range(1, 4))
        patch.setattr(StopSignal, "anywhere", lambda self: next(steps) == 2)
        with pytest.raises(SystemExit) as left:
            run_here(patch, SCRIPTS[script], *flags(script, tmp_path))
    assert left.value.code == 143
    assert {kind for _, kind in outcome(tmp_path)[0]} == {"train"}
    run_here(monkeypatch, SCRIPTS[script], *flags(script, tmp_path), "--resume", "auto")
    check_equal(outcome(tmp_path), whole(script))


def check_equal(got: tuple, expected: tuple) -> None:
    (logged, weights, best), (all_logged, all_weights, all_best) = got, expected
    assert logged == all_logged
    assert all(torch.equal(weights[name], weight) for name, weight in all_weights.items())
    assert best == all_best


def test_a_run_that_is_over_computes_nothing_again(flags, whole, monkeypatch, tmp_path):
    run_here(monkeypatch, train_ar, *flags("train_ar", tmp_path))
    for owner, name in ((HeldOut, "score"), (SampleCheck, "run"), (checkpoint, "save")):
        kill_at(monkeypatch, owner, name, 1)
    run_here(monkeypatch, train_ar, *flags("train_ar", tmp_path), "--resume", "auto")
    check_equal(outcome(tmp_path), whole("train_ar"))


DROPOUT = "trained with --class_dropout_prob above 0, this one has 0"


@pytest.mark.parametrize(("script", "mistaken", "message"), [
    ("train_coordtok", ["--point_per_vid", 17], "17 points are no whole number of frames of 4x4 patches"),
    ("train_coordtok", ["--val_name", "nowhere"], "no videos under"),
    ("train_coordtok", ["--lpips_loss_scale", 0, "--lpips_weights", "nowhere"], "nowhere: no such file"),
    ("train_larp_tokenizer", ["--lpips_weights", "nowhere"], "nowhere: no such file"),
    ("train_coordtok", ["--accum_iter", 3], "a global batch of 4 cannot be shared"),
    ("train_coordtok", ["--keep_checkpoints", -1], "--keep_checkpoints is -1, expected 1 or more"),
    ("train_sit", ["--class_dropout_prob", 0], f"cfg_scale 2.0 needs a SiT {DROPOUT}"),
    ("train_sit", ["--val_sampling_steps", 1], "val_sampling_steps"),
    ("train_sit", ["--global_batch_size", 7], "6 videos do not fill one batch of 7"),
    ("train_larp_tokenizer", ["--val_name", "nowhere"], "no videos under"),
    ("train_larp_tokenizer", ["--batch_size", 7], "6 videos do not fill one batch of 7"),
    ("train_ar", ["--class_dropout_prob", 0], f"cfg_scale 1.5 needs a model {DROPOUT}"),
    ("train_ar", ["--val_name", "nowhere"], "no videos under"),
    ("train_ar", ["--batch_size", 7], "6 videos do not fill one batch of 7"),
    *((script, ["--save_dir", "FILE"], "cannot write to the run's folder") for script in SCRIPTS),
])
def test_what_cannot_work_is_told_before_a_cache_is_filled(
    flags, monkeypatch, capsys, tmp_path, script, mistaken, message
):
    (tmp_path / "file").touch()
    mistaken = [tmp_path / "file" if flag == "FILE" else flag for flag in mistaken]
    for owner, name in ((clip_cache, "fill"), (RowCache, "write")):
        kill_at(monkeypatch, owner, name, 1)
    assert message in mistake(monkeypatch, capsys, SCRIPTS[script], *flags(script, tmp_path), *mistaken)


def test_step_2_is_checked_before_step_1(flags, monkeypatch, capsys, tmp_path):
    """Without step 1's checkpoint, which is yet to be made, and without touching the run's folder."""
    given = [*flags("train_coordtok", tmp_path), "--first_step_ckpt", tmp_path / "none", "--check"]
    run_here(monkeypatch, train_coordtok, *given)
    capsys.readouterr()
    for wrong, message in (["--point_per_vid", 17], "17 points are no whole number of frames"), (
            ["--lpips_weights", tmp_path / "vgg.pth"], f"{tmp_path}/vgg.pth: no such file"):
        assert message in mistake(monkeypatch, capsys, train_coordtok, *given, *wrong)
    assert not list(tmp_path.iterdir())


OTHER = {"train_coordtok": "sit", "train_sit": "larp_ar", "train_larp_tokenizer": "coordtok", "train_ar": "sit"}


@pytest.mark.parametrize(("script", "flag"), [
    *((script, "--resume") for script in SCRIPTS), *((script, "auto") for script in SCRIPTS),
    ("train_coordtok", "--first_step_ckpt"), ("train_sit", "--first_model_ckpt"), ("train_ar", "--tokenizer"),
])
def test_another_scripts_checkpoint_is_refused(flags, monkeypatch, capsys, tmp_path, script, flag):
    run = tmp_path / ("run_second" if script == "train_coordtok" else "run")
    path = checkpoint.save(run / "checkpoints", 1, {"kind": OTHER[script], "model": {}})
    given = ["--resume", "auto"] if flag == "auto" else [flag, path]
    exp_name = ["--exp_name", "run" if flag == "auto" else "other"]
    error = mistake(monkeypatch, capsys, SCRIPTS[script], *flags(script, tmp_path), *exp_name, *given)
    assert f"holds a {OTHER[script]} model, expected a " in error
    assert str(run / "checkpoints" if flag == "auto" else path) in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_changed_data_do_not_go_on_unnoticed(flags, monkeypatch, capsys, tmp_path, script):
    """A class folder that is away when the run goes on: it would train on fewer videos, in another order."""
    given = [*flags(script, tmp_path), "--num_val", 0, "--num_iters"]
    run_here(monkeypatch, SCRIPTS[script], *given, 1)
    (run,) = tmp_path.glob("run*")
    before, whole = (run / "metrics.jsonl").read_bytes(), setup.list_folder
    monkeypatch.setattr(setup, "list_folder", lambda folder: [file for file in whole(folder) if file.label == 0])
    capsys.readouterr()
    error = mistake(monkeypatch, capsys, SCRIPTS[script], *given, 2, "--resume", "auto")
    assert "UCF-101_train has 3 videos, but not those that the run has trained on (6): bring these back" in error
    assert (run / "metrics.jsonl").read_bytes() == before


def test_named_checkpoints_go_on_with_changed_data(capsys, tmp_path, data):
    """And a data set that has moved as a whole has not changed."""
    def listed(resume: str, root: Path, before: dict | None) -> dict:
        args = Namespace(data_root=str(root), video_name="UCF-101_train", resume=resume)
        return setup.training_files(args, before)[2]

    first = listed("auto", data, None)
    shutil.copytree(data, tmp_path / "moved")
    assert listed("auto", tmp_path / "moved", {"position": 3, **first}) == first
    assert listed("auto", data, {"position": 3, "files": 5}) == first  # of a checkpoint that does not say which
    next((tmp_path / "moved").glob("UCF-101_train/*/*")).rename(tmp_path / "moved/UCF-101_train/other.avi")
    capsys.readouterr()
    changed = listed("run/step_0000003.pt", tmp_path / "moved", {"position": 3, **first})
    assert changed["files"] == 6 and changed != first
    assert "going on with the changed data" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has 6 videos, but not those that the run has trained on .6.: bring these"):
        listed("auto", tmp_path / "moved", first)
