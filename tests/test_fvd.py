import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from data.video import write_video
from eval import fvd
from eval.features import FEATURE_METRICS_RECORD
from eval.fvd import FeatureStats, frechet_distance


def test_reference_distance(reference):
    case, _ = reference.case("frechet_distance")
    mix = torch.eye(400) + 0.1 * reference.noise("fvd1.m", (400, 400)) / 400**0.5
    a = FeatureStats.from_features(reference.noise("fvd1.a", (600, 400)))
    b = FeatureStats.from_features(reference.noise("fvd1.b", (500, 400)) @ mix + 0.2)
    assert frechet_distance(a, b, "N") == pytest.approx(case["population_covariance (LARP)"], rel=1e-7)
    expected = case["sample_covariance (CoordTok, float64)"]
    assert frechet_distance(a, b, "N-1") == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-7)


def test_distance_of_diagonal_gaussians_by_hand():
    """Independent axes: the sum of (mean difference)^2 + (difference of standard deviations)^2."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 2)  # mean 0, covariance 1 with divisor N
    a, b = corners * torch.tensor([1.0, 3.0]), corners * torch.tensor([2.0, 1.0]) + torch.tensor([5.0, 0.0])
    stats = [FeatureStats.from_features(x) for x in (a, b)]
    assert frechet_distance(*stats, divisor="N") == pytest.approx(25 + 1 + 4)
    assert frechet_distance(*stats, divisor="N-1") == pytest.approx(25 + (1 + 4) * 4 / 3)


def test_equal_sets_are_at_distance_zero_also_when_rank_deficient():
    stats = FeatureStats.from_features(100 * torch.randn(20, 50))
    assert abs(frechet_distance(stats, stats)) < 1e-8 * stats.cov("N").trace()


def test_equal_sets_of_uneven_spread_are_at_distance_zero():
    """Variances from 25 to 2.5e-11, as logits have: the root of each survives."""
    torch.manual_seed(0)
    stats = FeatureStats.from_features(5 * torch.randn(600, 400) * torch.logspace(0, -6, 400) + 3)
    assert abs(frechet_distance(stats, stats)) < 1e-9


def test_statistics_are_numpys():
    features = torch.randn(30, 5) + 3
    stats = FeatureStats.from_features(features)
    np.testing.assert_allclose(stats.mean(), features.double().mean(0))
    np.testing.assert_allclose(stats.cov("N-1"), np.cov(features.double(), rowvar=False), rtol=1e-10)
    np.testing.assert_allclose(stats.cov("N"), np.cov(features.double(), rowvar=False, ddof=0), rtol=1e-10)


def test_merged_statistics_equal_one_pass(tmp_path):
    features = torch.randn(37, 6)
    whole = FeatureStats.from_features(features)
    merged = FeatureStats(6)
    for part in features.split([10, 1, 26]):
        merged = merged + FeatureStats.from_features(part)
    assert merged.count == 37
    torch.testing.assert_close(merged.cov("N"), whole.cov("N"), rtol=1e-13, atol=1e-14)
    assert FeatureStats.from_tensor(FeatureStats(400).to_tensor()).dim == 400


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="covariance divisor"):
        FeatureStats.from_features(torch.randn(5, 2)).cov("n")
    with pytest.raises(ValueError, match="at least 2"):
        FeatureStats.from_features(torch.randn(1, 2)).cov("N-1")
    with pytest.raises(ValueError, match="at least 1"):
        FeatureStats(2).mean()
    with pytest.raises(ValueError, match="1 of 2 clips"):
        FeatureStats(2).update(torch.tensor([[1.0, float("nan")], [1.0, 2.0]]))
    with pytest.raises(ValueError, match="expected features"):
        FeatureStats(2).update(torch.zeros(3, 4))


def test_report():
    torch.manual_seed(0)
    real, fake = torch.randn(300, 8), torch.randn(200, 8) + 1
    result = fvd.fvd_scores(real, fake)
    assert result["fvd"] == pytest.approx(8, rel=0.2)
    assert 0 < result["fvd_floor"] < 0.5
    assert 0 < result["fvd_spread"] < 2
    assert result["fvd_rank_deficient"] is False
    assert result == fvd.fvd_scores(real, fake), "a report is a function of the features and the seed"
    assert result["fvd_infinity_low"] < 8 < result["fvd_infinity_high"]
    assert result["kvd"] > 0 and 0 <= result["recall"] < result["precision"] <= 1 and result["density"] > 0
    assert fvd.fvd_scores(real[:8], fake)["fvd_rank_deficient"] is True
    assert "rank-deficient" in fvd.rank_note(400) and fvd.rank_note(401) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five videos of 12 frames, one of 6, one damaged."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(6):
        write_video(root / f"{i}.mp4", torch.rand(3, 6 if i == 2 else 12, 32, 32))
    (root / "9.mp4").write_text("not a video")
    return root


@pytest.mark.parametrize("keep", [["0"], ["0", "2"]])
def test_one_clip_is_of_a_side(folder, tmp_path, monkeypatch, keep):
    """Of one video, or of two of which one is short."""
    for name in keep:
        shutil.copy(folder / f"{name}.mp4", tmp_path)
    monkeypatch.setattr(fvd.I3D, "from_weights", lambda *_, **__: MeanColours())
    flags = ["--num_frames", "10", "--size", "16", "--num_workers", "0", "--device", "cpu"]
    with pytest.raises(ValueError, match=f"the generated side, {tmp_path}, has 1 (video|whole clip), but a dist"):
        fvd.main([str(folder), str(tmp_path), *flags])


class MeanColours(nn.Module):
    """Stands in for I3D where the features do not matter: mean and spread of the three colours."""

    weights_sha256 = "none"

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, video, resize):
        assert resize == "square" and video.shape[1:] == (3, 10, 16, 16)
        return self.scale * torch.cat([video.mean((2, 3, 4)), video.std((2, 3, 4))], dim=1)


def test_folder_features_take_whole_clips_whatever_the_batch(folder):
    protocol = dataclasses.replace(fvd.FOLDERS, num_frames=10, size=16)
    files = fvd.list_videos(str(folder))
    one, left_out = fvd.folder_features(MeanColours(), files, protocol, None, seed=3, batch_size=1, num_workers=0)
    assert one.shape == (5, 6) and left_out == {"short": 1, "damaged": 1}
    all_at_once, _ = fvd.folder_features(MeanColours(), files, protocol, None, seed=3, batch_size=7, num_workers=0)
    torch.testing.assert_close(one, all_at_once)
    counts = []
    for batch_size in (1, 2, 7):
        some, left_out = fvd.folder_features(MeanColours(), files, protocol, 3, 3, batch_size, num_workers=0)
        torch.testing.assert_close(some, one[:3])
        counts.append(left_out)
    assert counts[0] == counts[1] == counts[2]
    long = dataclasses.replace(protocol, num_frames=99)
    with pytest.raises(ValueError, match="none of 7 videos gave a clip of 99 frames"):
        fvd.folder_features(MeanColours(), files, long, None, seed=0, batch_size=4, num_workers=0)


def test_lists_of_videos(folder, tmp_path):
    paths = [str(folder / f"{i}.mp4") for i in (3, 0)]
    (tmp_path / "list.txt").write_text("\n".join(paths) + "\n")
    assert [file.path for file in fvd.list_videos(str(tmp_path / "list.txt"))] == sorted(paths)
    with pytest.raises(FileNotFoundError, match="absent"):
        fvd.list_videos(str(tmp_path / "absent"))


def test_command_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fvd.I3D, "from_weights", lambda path, eps: MeanColours())
    flags = ["--num_frames", "10", "--size", "16", "--num_clips", "4", "--num_workers", "0", "--device", "cpu"]
    out = tmp_path / "fvd.json"
    code = fvd.main([str(folder), str(folder), *flags, "--seed", "1", "--out", str(out)])
    assert code == 0
    saved = json.loads(out.read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert saved["results"]["fvd_infinity"] is saved["results"]["density"] is None, "too few clips for these"
    assert saved["results"]["precision"] == saved["results"]["recall"] == 1 and abs(saved["results"]["kvd"]) < 1
    assert saved["record"]["feature_metrics"] == FEATURE_METRICS_RECORD
    assert abs(saved["results"]["fvd"]) < 1e-6 and saved["results"]["fvd_rank_deficient"]
    assert saved["results"]["fvd_floor"] > 0
    record = saved["record"]
    assert record["num_real"] == record["num_generated"] == 4 and record["num_frames"] == 10 and record["seed"] == 1
    assert record["deviations"] == ["num_frames: 10 instead of 16", "size: 16 instead of 128"]
    text = capsys.readouterr().out
    assert "folders*" in text and "rank-deficient" in text and "floor" in text
    wrong = {"--num_clips 1": "--num_clips is 1, expected 2 or more", "--self_test": "leave one of them out"}
    for flags, error in wrong.items():
        with pytest.raises(SystemExit):
            fvd.main([str(folder), str(folder), *flags.split()])
        assert error in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fvd.main([str(folder)])
