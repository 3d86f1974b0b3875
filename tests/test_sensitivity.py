"""The sensitivity card, with small stand-ins for its networks."""
import json
import math

import pytest
import torch
from helpers import run
from PIL import Image

from eval import sensitivity
from eval.report import read_record
from eval.sensitivity import CORRUPTIONS, METRICS, blur_of_psnr, corrupt, main, psnr, spearman
from models.pretrained import WeightsError


class Colours(torch.nn.Module):
    """Stands in for I3D: random projections of small clips."""

    weights_sha256, eps = "0" * 64, 1e-3

    def forward(self, video):
        pooled = torch.nn.functional.adaptive_avg_pool3d(video, (4, 8, 8)).flatten(1)
        return pooled @ torch.randn(pooled.shape[1], 16, generator=torch.Generator().manual_seed(0))


class Edges(torch.nn.Module):
    """Stands in for ST-LPIPS: the difference of edges."""

    description = "RANDOM"

    def forward(self, pred, target):
        return (pred - target).diff(dim=4).abs().mean((1, 2, 3, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    flags = "--classes PanLeft TiltUp --groups 1 2 3 --clips 1 --size 48x48 --min_frames 10 --max_frames 10".split()
    run("data/demo.py", "--root", root, *flags)
    return root / "UCF-101"


@pytest.fixture
def offline(monkeypatch):
    """Small stand-ins, and no LPIPS."""
    def metric(name, weights):
        if name == "lpips":
            raise WeightsError("there is no network")
        return Edges()

    monkeypatch.setattr(sensitivity, "perceptual_metric", metric)
    monkeypatch.setattr(sensitivity.I3D, "from_weights", lambda path: Colours())


def test_spearman():
    assert spearman([0, 1, 2, 3], [5, 6, 7, 9]) == pytest.approx(1)
    assert spearman([0, 1, 2, 3], [math.inf, 6, 5, 1]) == pytest.approx(-1)
    assert spearman([0, 1, 2, 3, 4], [0, 1, 3, 2, 4]) == pytest.approx(0.9)
    assert spearman([0, 1, 2], [1, 0, 0]) == pytest.approx(-(3**0.5) / 2)  # ties share a rank
    assert math.isnan(spearman([0, 1, 2], [1, 1, 1]))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_are_graded_seeded_and_of_one_clip(name):
    video = torch.rand(2, 3, 12, 32, 32, generator=torch.Generator().manual_seed(1))
    for strength in CORRUPTIONS[name].strengths:
        fake = corrupt(video, name, strength)
        assert fake.shape == video.shape and fake.min() >= 0 and fake.max() <= 1
        assert torch.equal(fake, corrupt(video, name, strength))
        assert torch.equal(fake[:1], corrupt(video[:1], name, strength))
    found = [psnr(video, corrupt(video, name, strength)) for strength in CORRUPTIONS[name].strengths]
    assert found == sorted(found, reverse=True) and math.isfinite(found[-1])
    if name not in ("blur", "blocks"):  # these draw nothing
        strength = CORRUPTIONS[name].strengths[-2]  # all pairs of frames are swapped by the last
        assert not torch.equal(corrupt(video, name, strength), corrupt(video, name, strength, seed=1))


def test_frames_stay_whole_where_only_time_is_corrupted():
    video = torch.rand(1, 3, 12, 16, 16)
    originals = {frame.numpy().tobytes() for frame in video[0].unbind(1)}
    for name in ("frame_drop", "frame_swap", "time_jitter"):
        fake = corrupt(video, name, CORRUPTIONS[name].strengths[-1])
        assert {frame.numpy().tobytes() for frame in fake[0].unbind(1)} <= originals
    swapped = corrupt(video, "frame_swap", 1)
    assert torch.equal(swapped[:, :, 0], video[:, :, 1]) and torch.equal(swapped[:, :, 1], video[:, :, 0])


def test_a_blur_of_the_same_psnr():
    video = torch.rand(1, 3, 4, 32, 32)
    wanted = psnr(video, corrupt(video, "blur", 0.7))
    _, sigma = blur_of_psnr(video, wanted)
    assert sigma == pytest.approx(0.7, rel=0.01)


def test_the_card(folder, tmp_path, offline, capsys):
    main([str(folder), "--output", str(tmp_path), "--num_clips", "6", "--num_frames", "10", "--size", "32"])
    written = (tmp_path / "sensitivity.md").read_text()
    assert written in capsys.readouterr().out
    content = read_record(tmp_path / "sensitivity.json")  # whose checksum is right
    rows, ranks = content["results"]["rows"], content["results"]["spearman"]
    assert len(rows) == 1 + 4 * 8 + 4
    assert set(rows[0]) == {"corruption", "strength", *METRICS} - {"lpips", "vmaf"}
    assert rows[0]["fvd"] == pytest.approx(0, abs=1e-6) and rows[0]["stlpips"] == 0 and rows[0]["psnr"] is None
    assert written.count("| unavailable |") == len(rows) + 8 and "lpips: unavailable: there is no network" in written
    # Each metric on the corruption that it is for.
    for metric, name in {"psnr": "noise", "ssim": "blur", "stlpips": "blur", "warping_error": "local_warp",
                         "flicker": "noise", "frozen": "frame_drop", "seams_xy": "blocks", "fvd": "colour",
                         "kvd": "colour"}.items():
        assert abs(ranks[name][metric]) >= 0.9 - 1e-9, (metric, name, ranks[name][metric])
    for row in rows:
        if row["corruption"].startswith("blur like"):
            warp = next(other for other in rows if other["corruption"] == "local_warp"
                        and row["corruption"].endswith(f" {other['strength']:g}"))
            assert row["psnr"] == pytest.approx(warp["psnr"], abs=0.05)
    assert content["record"]["num_clips"] == 6 and "RANDOM" in content["record"]["stlpips"]
    json.dumps(content, allow_nan=False)
    with Image.open(tmp_path / "sensitivity.png") as image:
        assert len(image.convert("RGB").getcolors(100)) >= 4  # paper, ink and both kinds of bars


def test_mistakes_are_named(folder, tmp_path, offline, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(FileNotFoundError, match="no videos under"):
        main([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="0 of its 6 videos give a clip of 16 frames, and the card needs 6"):
        main([str(folder)])
    for flags, message in ((["--num_clips", "5"], "expected 6 or more"), (["--num_frames", "9"], "I3D needs 10"),
                           (["--size", "36"], "multiple of 8")):
        with pytest.raises(SystemExit):
            main([str(folder), *flags])
        assert message in capsys.readouterr().err


def test_a_missing_folder_gets_one_line(tmp_path):
    done = run("-m", "eval.sensitivity", tmp_path / "nowhere", fails=True)
    line = f"error: {tmp_path}/nowhere: no such folder; give one of videos, such as data/demo.py makes"
    assert done.stderr.strip().splitlines() == [line]
