import numpy as np
import pytest
import torch

from eval import fvd
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
    merged.save(tmp_path / "stats.pt")
    torch.testing.assert_close(FeatureStats.load(tmp_path / "stats.pt").to_tensor(), merged.to_tensor(), rtol=0, atol=0)
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
    result = fvd.report(real, fake)
    assert result["fvd"] == pytest.approx(8, rel=0.2)
    assert 0 < result["fvd_floor"] < 0.5
    assert 0 < result["fvd_spread"] < 2
    assert result["fvd_rank_deficient"] is False
    assert result == fvd.report(real, fake), "a report is a function of the features and the seed"
    assert fvd.report(real[:8], fake)["fvd_rank_deficient"] is True
    assert "rank-deficient" in fvd.rank_note(400) and fvd.rank_note(401) is None
