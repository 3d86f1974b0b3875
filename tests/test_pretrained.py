import argparse
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from models.pretrained import load_state, read_released, read_sit_statistics, strip_prefix


@pytest.fixture
def easydict(monkeypatch):
    """A class that pickles as easydict.EasyDict does: items, and the same again as attributes."""

    class EasyDict(dict):
        __module__, __qualname__ = "easydict", "EasyDict"

        def __init__(self, **items):
            super().__init__(items)
            self.__dict__.update(items)

    monkeypatch.setitem(sys.modules, "easydict", types.SimpleNamespace(EasyDict=EasyDict))
    return EasyDict


class Harmful:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_the_authors_saved(tmp_path, easydict, zipped):
    weight = torch.rand(2, 3)
    torch.save(
        {
            "model": OrderedDict(weight=weight),
            "args": argparse.Namespace(lr=1e-4, sizes=[1, 2]),
            "cfg": easydict(model=easydict(name="larp", depth=12), betas=(0.5, 0.9), none=None),
            "best": np.float64(0.5),
            "count": np.int64(3),
            "history": np.arange(3, dtype=np.float32),
        },
        tmp_path / "a.pth",
        _use_new_zipfile_serialization=zipped,
    )
    content = read_released(tmp_path / "a.pth", "model", "cfg")
    assert torch.equal(content["model"]["weight"], weight) and type(content["model"]) is dict
    assert content["args"] == {"lr": 1e-4, "sizes": [1, 2]}
    assert content["cfg"] == {"model": {"name": "larp", "depth": 12}, "betas": (0.5, 0.9), "none": None}
    assert type(content["cfg"]["model"]) is dict
    assert (content["best"], content["count"]) == (0.5, 3) and type(content["best"]) is float
    assert content["history"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a git-lfs pointer"),
        (b"\n<!DOCTYPE html><html>", "an HTML page"),
        (b"", "not a whole PyTorch file"),
        (b"Entry not found", "not a whole PyTorch file"),
        (b"PK\x03\x04 cut short", "not a whole PyTorch file"),
    ],
)
def test_foreign_files_are_one_line_errors(tmp_path, content, message):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_released(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_missing_harmful_and_wrong_files(tmp_path, capsys):
    path = tmp_path / "a.pth"
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_released(path)
    for zipped in (True, False):
        torch.save({"model": Harmful()}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="holds a .*print, which is not admitted"):
            read_released(path)
    assert "this ran" not in capsys.readouterr().out
    torch.save({"ema": {}, "opt": {}}, path)
    with pytest.raises(ValueError, match="no model in it but ema, opt"):
        read_released(path, "model", "ema")
    torch.save([1], path)
    with pytest.raises(ValueError, match="no model in it but list"):
        read_released(path, "model")


def test_load_state_is_all_or_an_error():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    state = {name: torch.rand_like(value) for name, value in model.state_dict().items()}
    load_state(model, strip_prefix({"module." + name: value for name, value in state.items()}, "module."), "F")
    assert torch.equal(model[1].weight, state["1.weight"])
    flags = {"0.weight": "width, inputs", "1.weight": "width, outputs"}
    wider = nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 4))
    with pytest.raises(ValueError, match=r"F: 3 tensors .*0.weight is \(3, 2\) and not \(5, 2\).*; check --width$"):
        load_state(wider, state, "F", flags)
    with pytest.raises(ValueError, match="F: 2 tensors do not fit this model: 1.bias is missing, extra is not exp"):
        load_state(model, {**{k: v for k, v in state.items() if k != "1.bias"}, "extra": state["1.bias"]}, "F")


LOG = """\x1b[34m2024-11-01 10:00:00\x1b[0m] Experiment directory created at results/000
\x1b[34m2024-11-01 10:00:01\x1b[0m] xy_mean: tensor([ 0.1000, -0.2000,  0.3000,  0.4000,  0.5000,
         0.6000,  0.7000, -0.8000])
\x1b[34m2024-11-01 10:00:02\x1b[0m] xy_std: tensor([1., 2., 3., 4., 5., 6., 7., 8.])
\x1b[34m2024-11-01 10:00:03\x1b[0m] yt_mean: tensor([1e-4, 2., 3., 4., 5., 6., 7., 8.], device='cuda:0')
\x1b[34m2024-11-01 10:00:04]\x1b[0myt_std: tensor([1., 2., 3., 4., 5., 6., 7., 9.])
\x1b[34m2024-11-01 10:00:05\x1b[0m] xt_mean: tensor([1., 2., 3., 4., 5., 6., 7., 10.])
\x1b[34m2024-11-01 10:00:06\x1b[0m] xt_std: tensor([1., 2., 3., 4., 5., 6., 7., 11.])
\x1b[34m2024-11-01 10:00:07\x1b[0m] (step=0000100) Train Loss: 1.0
"""


def test_sit_statistics_from_a_log(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(LOG)
    statistics = read_sit_statistics(path)
    assert list(statistics) == ["xy_mean", "xy_std", "yt_mean", "yt_std", "xt_mean", "xt_std"]
    torch.testing.assert_close(statistics["xy_mean"], torch.tensor([0.1, -0.2, 0.3, 0.4, 0.5, 0.6, 0.7, -0.8]))
    assert statistics["yt_mean"][0] == pytest.approx(1e-4)
    assert [values[-1].item() for values in statistics.values()][1:] == [8, 8, 9, 10, 11]

    path.write_text(LOG.replace("xt_std", "xt_sd"))
    with pytest.raises(ValueError, match="no line 'xt_std: tensor"):
        read_sit_statistics(path)
    path.write_text(LOG.replace(", 11.]", "]"))
    with pytest.raises(ValueError, match="channels"):
        read_sit_statistics(path)
    with pytest.raises(FileNotFoundError, match="log.txt"):
        read_sit_statistics(tmp_path / "none.txt")
