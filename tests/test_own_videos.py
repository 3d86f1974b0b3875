"""docs/own_videos.md: from a folder of files to samples, FVD and a page, and fine-tuning, as it says, at tiny sizes."""
import importlib
import json
import shlex
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, TINY_COORDTOK, run, run_here, tiny_larp

from eval.i3d import I3D
from scripts import report
from tests.test_docs import commands
from training import checkpoint

LARP = (
    "--input_size 32 --frame_num 12 --bottleneck_token_num 16 --codebook_size 64 --encoder_hidden_size 32 "
    "--decoder_hidden_size 32 --encoder_num_heads 2 --decoder_num_heads 2 --encoder_depth 1 --decoder_depth 1 "
    "--prior_model gptc-tiny --disc_hidden_size 32 --disc_n_heads 2 --disc_n_layers 1"
).split()
SHORT = ["--num_iters", 2, "--num_val", 0, "--device", "cpu", "--micro_batch", "off"]
TINY = {  # script: flags that go over those of the page
    "train_coordtok": [*TINY_COORDTOK, *SHORT, "--num_frames", 12, "--point_per_vid", 64, "--lpips_weights", "random"],
    "train_sit": [*SHORT, "--model", "SiT-XS/4", "--global_batch_size", 2, "--stat_clips", 2],
    "train_larp_tokenizer": [*LARP, *SHORT, "--lpips_weights", "random", "--batch_size", 2],
    "train_ar": ["--dim", 32, "--n_layer", 2, "--n_head", 2, "--multiple_of", 8, *SHORT, "--batch_size", 2,
                 "--num_samples", 0],
    "eval.eval_coordtok": ["--num_clips", 4, "--batch_size", 2, "--lpips_weights", "random", "--motion", 0],
    "sample": ["--num_samples", 4, "--sample_batch_size", 4, "--motion", 0],
}


class Colours(torch.nn.Module):
    """Stands in for I3D: 400 features that are means of random mixes of pixels."""

    weights_sha256 = "0" * 64

    def __init__(self):
        super().__init__()
        self.eps, self.mix = 1e-3, torch.randn(24, 400, generator=torch.Generator().manual_seed(0))

    def forward(self, video, resize=None):
        return F.adaptive_avg_pool3d(video, (2, 2, 2)).flatten(1) @ self.mix


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Runs a command of the page in this process, in an empty folder with DATA in it: files of any names."""
    flags = "--classes PanLeft ZoomIn --groups 1 2 3 4 5 --clips 1 --size 64x48 --min_frames 14 --max_frames 16".split()
    run("data/demo.py", "--root", tmp_path / "demo", *flags)
    for number, path in enumerate(sorted((tmp_path / "demo").rglob("*.avi"))):
        target = tmp_path / "DATA" / ("mine_test" if number % 5 < 2 else "mine_train") / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        path.rename(target / f"video {number}.avi")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(I3D, "from_weights", lambda *_, **__: Colours())

    def run_line(command):
        name, *flags = shlex.split(command)[1:]
        name = name.removesuffix(".py").replace("/", ".")
        if name == "scripts.report":
            monkeypatch.setattr(sys, "argv", [name, *flags])
            report.main()
            return
        script = importlib.import_module(name)
        if hasattr(script, "compile_blocks"):  # compiling takes minutes
            monkeypatch.setattr(script, "compile_blocks", lambda *_, **__: None)
        more = TINY[name]
        if name == "sample":
            more = [*more, *(["--num_sampling_steps", 3] if "--sit_model" in flags else ["--dtype", "float32"])]
        run_here(monkeypatch, script, *flags, *more)

    return run_line


def of_section(title: str) -> list[str]:
    """The commands of a section of the page."""
    page = ROOT / "docs" / "own_videos.md"
    text = page.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    found = [command for _, command in commands(page) if command in text]
    assert found
    return found


def test_from_a_folder_of_files_to_samples_and_a_page(own, tmp_path):
    done = of_section("From a folder of files to samples")
    for command in done:
        own(command)
    assert len(done) == 9
    mine = tmp_path / "results" / "mine"
    for name in ("sit_small", "larp_ar_small"):
        state = checkpoint.load(mine / name / "checkpoints")
        assert state["classes"] == ["PanLeft", "ZoomIn"] and state["config"]["num_classes"] == 2
    for name in ("samples", "larp_samples"):
        results = json.loads((mine / name / "report.json").read_text())["results"]
        assert results["fvd"] > 0 and len(list((mine / name / "sampled_videos").iterdir())) == 4
    page = (mine / "index.html").read_text()
    assert "FVD" in page and page.count("<video") >= 3


def test_fine_tuning(own, tmp_path, coordtok, monkeypatch):
    """With the checkpoints at hand in the place of the published ones."""
    tiny_larp(32, 12, 16).save_pretrained(tmp_path / "larp")
    tune, larp = of_section("Fine-tuning")
    monkeypatch.setitem(TINY, "train_coordtok", [*TINY["train_coordtok"], "--num_frames", 8])
    own(tune.replace("CoordTok_UCF101_1M_50K.pth", str(coordtok)))
    larger = [*SHORT, "--input_size", 64, "--lpips_weights", "random", "--batch_size", 2, "--disc_n_layers", 1]
    monkeypatch.setitem(TINY, "train_larp_tokenizer", larger)
    own(larp.replace("hywang66/LARP-L-long-tokenizer", "larp"))
    found = checkpoint.load(tmp_path / "logs" / "larp_tokenizer" / "checkpoints")["config"]
    assert (found["input_size"], found["bottleneck_token_num"]) == (64, 16)
