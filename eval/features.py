"""Metrics of two sets of features beside their Fréchet distance: kernel distance, precision and recall, density and
coverage. Pure, deterministic functions of features in memory, for real and generated sets of any sizes.

Features are (N, dim), any real dtype; computations are in float64. Distances between 50,000 and 50,000 features are
computed in blocks of rows, with BLOCK values in memory at a time.
"""
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

BLOCK = 2**24

# For the record of a number: how each result of `feature_metrics` and `eval.fvd.frechet_infinity` is defined.
FEATURE_METRICS_RECORD = {
    "kvd": "squared MMD with kernel (x.y / 400 + 1)^3, unbiased, mean over 100 subsets of 1,000 clips of each side, "
    "or of the smaller side where it has fewer (arXiv 1801.01401, 1812.01717)",
    "precision, recall": "share of generated clips within a real clip's ball, of real clips within a generated clip's; "
    "a ball reaches to its clip's k-th nearest other clip of its side, k = 3 (arXiv 1904.06991)",
    "density, coverage": "mean over generated clips of the number of real balls around each, over k; share of real "
    "balls with a generated clip in them, k = 5 (arXiv 2002.09797)",
    "fvd_infinity": "FVD at infinitely many clips, by a straight line over 1/N through a half, three quarters and all "
    "of the clips; fvd_infinity_low, fvd_infinity_high: 95 % interval, jackknife over 10 groups (arXiv 1911.07023); "
    "null below 2.5 clips a feature",
}


def kvd(real: Tensor, fake: Tensor, seed: int = 0, num_subsets: int = 100, subset_size: int = 1000) -> float:
    """Kernel video distance: the squared maximum mean discrepancy with the kernel (x.y / dim + 1)^3.

    The unbiased estimate, which may be negative, averaged over random subsets of both sides. If a subset would be the
    whole of both sides, it is computed once. real, fake: (N, dim), two or more. Source: "Demystifying MMD GANs" (arXiv
    1801.01401); on the features of I3D, "FVD" (arXiv 1812.01717).
    """
    real, fake = _prepared(real, 2), _prepared(fake, 2)
    size, rng = min(subset_size, len(real), len(fake)), np.random.default_rng(seed)
    if len(real) == len(fake) == size:
        return _mmd(real, fake)
    subsets = [[x[torch.from_numpy(rng.choice(len(x), size, replace=False))] for x in (real, fake)]
               for _ in range(num_subsets)]
    return float(np.mean([_mmd(*subset) for subset in subsets]))


def _mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of two sets of equal size."""
    size, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1).pow(3)

    def others(kernels: Tensor) -> Tensor:
        return (kernels.sum() - kernels.trace()) / (size * (size - 1))

    return (others(kernel(x, x)) + others(kernel(y, y)) - 2 * kernel(x, y).mean()).item()


def ball_metrics(real: Tensor, fake: Tensor, k: int = 3, k_density: int = 5) -> dict[str, float]:
    """{"precision", "recall", "density", "coverage"}, from one pass over the distances within and between the sets.

    A feature's ball reaches to its k-th nearest other feature of the same set, and includes its surface.
    precision: share of generated features in the ball of any real one; recall: share of real features in the ball of
    any generated one ("Improved precision and recall", arXiv 1904.06991, with its k = 3). density: how many balls of
    real features a generated one lies in on average, divided by k, which is 1 for equal distributions; coverage: share
    of real balls that hold any generated feature ("Reliable fidelity and diversity metrics", arXiv 2002.09797, with
    its k = 5). real, fake: (N, dim), one or more; nan where no ball has a k-th neighbour.
    """
    real, fake = _prepared(real, 1), _prepared(fake, 1)
    real_radii, wide_radii = _squared_radii(real, (k, k_density))
    (fake_radii,) = _squared_radii(fake, (k,))
    found, recalled, inside, covered = torch.zeros(len(fake), dtype=torch.bool), 0, 0, 0
    for rows, distances in _squared_distances(real, fake):
        found |= (distances <= real_radii[rows, None]).any(dim=0)
        recalled += int((distances <= fake_radii).any(dim=1).sum())
        counts = (distances <= wide_radii[rows, None]).sum(dim=1)
        inside += int(counts.sum())
        covered += int((counts > 0).sum())
    results = {"precision": found.double().mean().item(), "recall": recalled / len(real),
               "density": inside / (k_density * len(fake)), "coverage": covered / len(real)}
    few = {"precision": len(real) <= k or len(fake) <= k, "density": len(real) <= k_density}
    few |= {"recall": few["precision"], "coverage": few["density"]}
    return {name: math.nan if few[name] else value for name, value in results.items()}


def _prepared(features: Tensor, fewest: int) -> Tensor:
    features = torch.as_tensor(features).detach().to("cpu", torch.float64)
    if features.ndim != 2 or len(features) < fewest:
        raise ValueError(f"expected features (N, dim), N at least {fewest}, got {tuple(features.shape)}")
    return features


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of the squared distances (len(a), len(b)), with their places. Features that differ by no more than
    rounding are at distance 0."""
    a_norms, b_norms = a.square().sum(1, keepdim=True), b.square().sum(1, keepdim=True)
    left, right = torch.cat([a, a_norms, torch.ones_like(a_norms)], 1), torch.cat([-2 * b, torch.ones_like(b_norms),
                                                                                   b_norms], 1)
    for start in range(0, len(a), step := max(1, BLOCK // len(b))):
        rows = slice(start, start + step)
        distances = left[rows] @ right.T
        yield rows, distances.masked_fill_(distances < 2e-12 * a_norms[rows], 0)


def _squared_radii(x: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """For each k of ks, (N,) squared distances to the k-th nearest other feature, wider by a little more than rounding
    errors; nan where there are not as many."""
    found, most = [], min(max(ks), len(x) - 1)
    for rows, distances in _squared_distances(x, x):
        distances[torch.arange(len(distances)), torch.arange(len(x))[rows]] = math.inf
        found.append(distances.topk(most, dim=1, largest=False).values)
    nearest = torch.cat(found) * (1 + 1e-9)
    return [nearest[:, k - 1] if k <= most else torch.full((len(x),), math.nan, dtype=x.dtype) for k in ks]


def feature_metrics(real: Tensor, fake: Tensor, seed: int = 0) -> dict[str, float]:
    """{"kvd", "precision", "recall", "density", "coverage"} of real and generated features (N, dim), as
    FEATURE_METRICS_RECORD defines them. nan where a set is too small for one."""
    return {"kvd": kvd(real, fake, seed) if min(len(real), len(fake)) > 1 else math.nan, **ball_metrics(real, fake)}
