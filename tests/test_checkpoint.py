"""training/checkpoint.py and training/load.py, and what reads files: models/checkpoint_files.py, models/sharded.py."""
import errno
import json
import os
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file

from common.errors import DamagedFile
from eval.i3d import I3D
from models import checkpoint_files
from models.configs import LARPTokenizerConfig
from models.pretrained import WeightsError, read_released
from training import checkpoint
from training.flags import merge
from training.optim import adamw


def state(value):
    return {"kind": "toy", "config": {"a": 1}, "model": {"w": torch.full((3,), float(value))}}


def test_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, state(step), keep=2)
        if step == 2:
            checkpoint.mark_best(tmp_path, 2)
            checkpoint.mark_best(tmp_path, 2)  # by a run that goes on from there
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["best.pt", "step_0000004.pt", "step_0000005.pt"]
    assert checkpoint.load(tmp_path / "best.pt")["model"]["w"][0] == 2
    assert checkpoint.load(tmp_path)["step"] == 5


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_is_kept(tmp_path, keep):
    checkpoint.save(tmp_path, 1, state(1), keep=3)
    with pytest.raises(ValueError, match=f"--keep_checkpoints is {keep}, expected 1 or more"):
        checkpoint.save(tmp_path, 2, state(2), keep=keep)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000001.pt"]


def test_steps_are_numbers_of_any_length(tmp_path):
    for step in (9_999_998, 9_999_999, 10_000_000):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step_9999999.pt", "step_10000000.pt"]
    assert checkpoint.find(tmp_path, "auto", "toy")["step"] == 10_000_000


def test_what_was_just_written_is_kept(tmp_path):
    """Also by a run that has gone back to an older checkpoint."""
    for step in (7, 8, 3):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step_0000003.pt", "step_0000008.pt"]


def test_a_checkpoint_that_is_gone_is_not_the_best(tmp_path):
    checkpoint.save(tmp_path, 1, state(1))
    checkpoint.mark_best(tmp_path, 2)
    assert not (tmp_path / "best.pt").exists()


def test_another_scripts_checkpoint_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, state(1))
    for resume in ("auto", str(path)):
        with pytest.raises(ValueError, match="holds a toy model, expected a sit checkpoint"):
            checkpoint.find(tmp_path, resume, "sit")


def test_auto_takes_the_newest_whole_one(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step))
    newest = tmp_path / "step_0000002.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.warns(UserWarning, match="step_0000002.pt cannot be read"):
        assert checkpoint.find(tmp_path, "auto", "toy")["step"] == 1


def test_only_damaged_ones_are_not_none(tmp_path):
    """Else the run would start anew, and its files be lost."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step))
    (tmp_path / "step_0000001.pt").write_bytes(b"")
    (tmp_path / "step_0000002.pt").write_bytes((tmp_path / "step_0000002.pt").read_bytes()[:100])
    message = f"none of the 2 checkpoints in {tmp_path} is whole .step_0000001.pt, step_0000002.pt.: put a whole one"
    for read in (lambda: checkpoint.find(tmp_path, "auto", "toy"), lambda: checkpoint.load(tmp_path)):
        with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(ValueError, match=message):
            read()


@pytest.mark.parametrize("error", [
    PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "Input/output error"),
    MemoryError("no room"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
])
def test_what_the_system_refuses_is_not_damage(tmp_path, monkeypatch, error):
    """An older checkpoint would be taken in its place, and the newest be overwritten."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step))
    load = torch.load

    def refuse(path, **options):
        if "step_0000002" in str(path):
            raise error
        return load(path, **options)

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(OSError, match="step_0000002.pt cannot be read: .*(denied|Input/output|room|memory)"):
        checkpoint.find(tmp_path, "auto", "toy")


def test_another_version_is_not_damage(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, state(1))
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    checkpoint.save(tmp_path, 2, state(2))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="step_0000002.pt has checkpoint format 2, this version reads 1"):
        checkpoint.find(tmp_path, "auto", "toy")


def test_refuses_to_start_over_a_run(tmp_path):
    assert checkpoint.find(tmp_path, None, "toy") is None
    checkpoint.save(tmp_path, 7, state(0))
    with pytest.raises(ValueError, match="already holds step_0000007.pt: continue it with --resume auto"):
        checkpoint.find(tmp_path, None, "toy")


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, state(1))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 2, state(2))
    assert checkpoint.find(tmp_path, "auto", "toy")["step"] == 1


def test_random_state_comes_back(tmp_path):
    checkpoint.save(tmp_path, 1, state(0))
    expected = torch.rand(4)
    torch.manual_seed(99)
    checkpoint.set_rng_state(checkpoint.load(tmp_path)["rng"])
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"version https://git-lfs.github.com/spec/v1"])
def test_foreign_files_are_named_in_one_line(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    assert not checkpoint_files.is_ours(path)
    with pytest.raises(ValueError, match="x.pt cannot be read as a checkpoint") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        checkpoint.load(tmp_path / "x.pt")


def test_a_flipped_byte_is_found(tmp_path):
    """In any tensor, and with the checkpoint before it to go on from."""
    checkpoint.save(tmp_path, 1, state(1))
    path = checkpoint.save(tmp_path, 2, {**state(2), "optimizer": {"moment": torch.rand(1000)}})
    whole = path.read_bytes()
    for place in (len(whole) // 2, whole.index(torch.full((3,), 2.0).numpy().tobytes()) + 5):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="step_0000002.pt cannot be read .* is not what was written"):
            checkpoint.load(path)
        with pytest.warns(UserWarning, match="step_0000002.pt cannot be read"):
            assert checkpoint.find(tmp_path, "auto", "toy")["step"] == 1


@pytest.mark.parametrize("place", ["model", "ema", "one of ema"])
def test_weights_that_are_not_finite_are_refused(tmp_path, place):
    bad = {"w": torch.tensor([1.0, torch.nan])}
    averages = {"ema": bad, "one of ema": {"0.9": {"w": torch.ones(1)}, "0.99": bad}}.get(place, {})
    path = checkpoint.save(tmp_path, 1, {"model": bad if place == "model" else {}, "ema": averages})
    with pytest.raises(ValueError, match="step_0000001.pt: w is not finite: the file is damaged, or of a run that has"):
        checkpoint.load(path)


def test_export(tmp_path):
    checkpoint.save(tmp_path, 1, state(5))
    checkpoint.export(checkpoint.load(tmp_path), tmp_path / "weights")
    assert load_file(tmp_path / "weights" / "model.safetensors")["w"].tolist() == [5, 5, 5]
    assert json.loads((tmp_path / "weights" / "config.json").read_text()) == {"a": 1}


def test_weights_by_version():
    averaged = {**state(1), "ema": {"0.9": state(2)["model"], "0.99": state(3)["model"]}}
    assert checkpoint.select_weights(averaged)["w"][0] == 1
    assert checkpoint.select_weights(averaged, "ema_0.99")["w"][0] == 3
    assert checkpoint.select_weights({**state(1), "ema": state(4)["model"]}, "ema")["w"][0] == 4
    with pytest.raises(ValueError, match="no weights 'ema' in this checkpoint; it holds sd, ema_0.9, ema_0.99"):
        checkpoint.select_weights(averaged, "ema")


def spoil_shape(moments: dict) -> None:
    moments["exp_avg"] = moments["exp_avg"][:1]


@pytest.mark.parametrize("spoil", [spoil_shape, lambda moments: moments.pop("exp_avg_sq"), dict.clear])
def test_an_optimizer_of_another_model_is_refused(tmp_path, spoil):
    """By torch only at the first step, or not at all."""
    model = torch.nn.Linear(3, 2)
    optimizer = adamw(model.parameters(), lr=1.0)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    good = checkpoint.save(tmp_path / "good", 1, {"optimizer": optimizer.state_dict()})
    checkpoint.restore({"optimizer": optimizer}, checkpoint.load(good))
    content = optimizer.state_dict()
    spoil(content["state"][0])
    path = checkpoint.save(tmp_path, 1, {"optimizer": content})
    with pytest.raises(DamagedFile, match=f"{path} cannot be read as the state of this run: .* for a parameter that"):
        checkpoint.restore({"optimizer": optimizer}, checkpoint.load(path))


@pytest.mark.parametrize(("name", "value", "found"), [
    ("step", "one", "its step is a str"), ("step", None, "its step is a NoneType"), ("step", -1, "its step is -1"),
    ("rng", [5], "'int' object is not subscriptable"), ("rng", [{}], "it has no 'cpu'"),
    ("rng", [{"cpu": torch.zeros(3)}], "its rng are not generators' states"), ("best", "x", "its best is a str"),
    ("statistics", [1], "its statistics is a list"), ("interpolant", [1], "its interpolant is a list"),
    ("data", 5, "its data is a int"),
])
def test_values_of_a_wrong_type_are_damage(tmp_path, name, value, found):
    """Else they are errors of the code that uses them first, which does not know the file."""
    path = checkpoint.save(tmp_path, 1, state(1))
    content = torch.load(path)
    torch.save({**content, name: value}, path)
    with pytest.raises(DamagedFile, match=f"{path} cannot be read as a checkpoint: .*{found}; give another"):
        checkpoint.load(path)


def test_what_a_nested_dict_lacks_names_the_file(tmp_path):
    path = checkpoint.save(tmp_path, 1, {**state(1), "config": {"bottleneck": {"args": {}}}})
    with pytest.raises(DamagedFile, match=f"{path} has no 'regularizer'"):
        merge(LARPTokenizerConfig, Namespace(codebook_size=64), checkpoint.load(path)["config"], "the run")


class Foreign:
    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ("touch run",)


@pytest.mark.parametrize("function", [os.system, print])
def test_a_checkpoint_that_names_code_is_refused_without_torchs_advice(tmp_path, monkeypatch, function):
    """Which is to load it all the same."""
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "x": Foreign(function)}, tmp_path / "x.pt")
    name = f"{function.__module__}.{function.__name__}".removeprefix("builtins.")
    with pytest.raises(DamagedFile, match=f"x.pt cannot be read as a checkpoint: it names {name}, which is not adm"):
        checkpoint.load(tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=f"x.pt cannot be read .it names {name}, which is not admitted"):
        I3D.from_weights(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt: holds a {name}, which is not admitted"):
        read_released(tmp_path / "x.pt")
    assert not (tmp_path / "run").exists()
