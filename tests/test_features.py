import math

import numpy as np
import pytest
import torch

from eval import features
from eval.features import ball_metrics, feature_metrics, kvd
from eval.fvd import FeatureStats, frechet_distance, frechet_infinity


def two_sets(num_real: int, num_fake: int, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Two overlapping clouds, so that no share is 0 or 1."""
    return torch.randn(num_real, dim), 0.7 * torch.randn(num_fake, dim) + 0.5


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The kernel's formula, with gamma 1 / dim as of I3D's 400 features."""
    size, dim = x.shape
    xx, yy, xy = ((a @ b.T / dim + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    others = [(kernel.sum() - np.diag(kernel).sum()) / (size * (size - 1)) for kernel in (xx, yy)]
    return others[0] + others[1] - 2 * xy.mean()


def test_kvd_is_the_kernel_formula():
    real, fake = torch.randn(50, 400), torch.randn(50, 400) * 1.1 + 0.05
    expected = mmd(real.double().numpy(), fake.double().numpy())
    assert kvd(real, fake) == pytest.approx(expected, abs=1e-9)
    rng, subsets = np.random.default_rng(4), []
    for _ in range(3):
        subsets.append([x.double().numpy()[rng.choice(50, 20, replace=False)] for x in (real, fake)])
    expected = np.mean([mmd(*subset) for subset in subsets])
    assert kvd(real, fake, seed=4, num_subsets=3, subset_size=20) == pytest.approx(expected, abs=1e-9)


def test_kvd_is_unbiased():
    """Two sets of one distribution: around 0, and below it at times."""
    values = [kvd(torch.randn(20, 5), torch.randn(20, 5)) for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5 and min(values) < 0


def radii(x: torch.Tensor, k: int) -> list[float]:
    return [sorted((a - b).norm().item() for j, b in enumerate(x) if i != j)[k - 1] for i, a in enumerate(x)]


@pytest.fixture(params=[features.BLOCK, 100])
def block(request, monkeypatch):
    """All distances at once, and a few rows of them at a time."""
    monkeypatch.setattr(features, "BLOCK", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_a_loop(k):
    real, fake = two_sets(40, 30)
    real_radii, fake_radii = radii(real.double(), k), radii(fake.double(), k)
    near = [[(a - b).norm().item() for b in fake.double()] for a in real.double()]
    precise = [any(near[i][j] <= real_radii[i] for i in range(40)) for j in range(30)]
    recalled = [any(near[i][j] <= fake_radii[j] for j in range(30)) for i in range(40)]
    found = ball_metrics(real, fake, k=k)
    assert (found["precision"], found["recall"]) == pytest.approx((sum(precise) / 30, sum(recalled) / 40))
    assert 0 < found["recall"] < found["precision"]


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("k", [2, 5])
def test_density_and_coverage_are_those_of_a_loop(k):
    real, fake = two_sets(40, 30)
    real_radii = radii(real.double(), k)
    within = [[(a - b).norm().item() <= radius for b in fake.double()] for a, radius in zip(real.double(), real_radii)]
    expected = sum(map(sum, within)) / (k * 30), sum(map(any, within)) / 40
    found = ball_metrics(real, fake, k_density=k)
    assert (found["density"], found["coverage"]) == pytest.approx(expected) and expected[1] < 1


@pytest.mark.usefixtures("block")
def test_equal_and_distant_sets():
    """Also where clips repeat, whose balls have no size, and where rounding is large beside distances."""
    real = 100 + torch.randn(30, 8)
    for same in (real, real[:10].repeat(5, 1)):
        found = ball_metrics(same, same.flip(0))
        assert found["precision"] == found["recall"] == found["coverage"] == 1
    assert ball_metrics(real, real)["density"] == pytest.approx(6 / 5)  # each ball holds its own centre too
    assert set(ball_metrics(real, real + 100).values()) == {0}


def test_precision_falls_with_quality_and_recall_with_variety():
    real = torch.randn(300, 4)
    near, noisy = 0.1 * torch.randn(300, 4), 3 * torch.randn(300, 4)
    near, noisy = ball_metrics(real, near), ball_metrics(real, noisy)
    assert near["precision"] > 0.99 > 0.5 > near["recall"]
    assert noisy["recall"] > 0.9 > 0.6 > noisy["precision"]


def test_feature_metrics_are_plain_and_repeat():
    real, fake = two_sets(60, 50)
    found = feature_metrics(real, fake, seed=1)
    assert list(found) == ["kvd", "precision", "recall", "density", "coverage"]
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    torch.rand(3)
    assert feature_metrics(real.float(), fake, seed=1) == found
    few = feature_metrics(real[:5], fake)
    assert math.isnan(few["density"]) and math.isnan(few["coverage"]) and 0 <= few["precision"] <= 1
    assert all(map(math.isnan, feature_metrics(real[:1], fake).values()))
    for name in [*found, "fvd_infinity"]:
        assert any(name in names.split(", ") for names in features.FEATURE_METRICS_RECORD)


def test_too_few_features_are_an_error():
    for measure, few in ((kvd, 1), (ball_metrics, 0)):
        with pytest.raises(ValueError, match="expected features"):
            measure(torch.randn(few, 3), torch.randn(10, 3))
        with pytest.raises(ValueError, match="expected features"):
            measure(torch.randn(10), torch.randn(10, 3))
    for swapped in (False, True):
        sides = torch.randn(4, 3), torch.randn(2, 3)
        assert all(map(math.isnan, ball_metrics(*(sides[::-1] if swapped else sides)).values()))
    assert math.isnan(ball_metrics(torch.randn(6, 3), torch.randn(3, 3))["recall"])
    assert ball_metrics(torch.randn(6, 3), torch.randn(3, 3))["density"] >= 0


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_distance_at_infinity_is_rid_of_the_bias(shift):
    """Two sets of Gaussians whose distance is known: 0 for the halves of one."""
    dim, true = 20, 20 * shift**2
    for _ in range(5):
        both = torch.randn(600, dim) * torch.linspace(0.2, 2, dim)
        real, fake = both[:300], both[300:] + shift
        value, low, high = frechet_infinity(real, fake)
        plain = frechet_distance(*(FeatureStats.from_features(x) for x in (real, fake)))
        assert low <= true <= high and high - low < 4
        assert abs(value - true) < abs(plain - true)
    assert frechet_infinity(real, fake) == (value, low, high)
    assert all(map(math.isnan, frechet_infinity(real[: int(2.5 * dim) - 1], fake)))
