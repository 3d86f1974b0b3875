"""Fréchet video distance (arXiv 1812.01717): mergeable statistics, the distance, its floor and spread, and a command.

Distance between two folders (or file lists) of videos:
    python -m eval.fvd REAL GENERATED --num_frames 16 --size 128
Check of an installation against the value that TensorFlow's own implementation gives (minutes on a CPU):
    python -m eval.fvd --self_test
"""
import argparse
import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.cli import Parser, one_line_errors
from common.console import Progress
from common.files import manifest_sha256
from data.clips import ClipDataset, ClipKey
from data.lists import VideoFile, list_videos
from data.loader import make_loader
from data.video import TIMEOUT
from eval.features import feature_metrics
from eval.i3d import I3D, MIN_FRAMES, RESIZE_RULES
from eval.protocols import COORDTOK_RESIZE, PROTOCOLS, Protocol
from eval.report import describe, run_record, write_record

DIVISORS = ("N", "N-1")


class FeatureStats:
    """Count, sum and sum of outer products of features, in float64, from which mean and covariance follow.

    Statistics add up, `a + b`, across batches and processes; `to_tensor` is one flat tensor to all-reduce.
    """

    def __init__(self, dim: int = 400):
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    @classmethod
    def from_features(cls, features: Tensor | np.ndarray) -> "FeatureStats":
        """features: (N, dim), any real dtype."""
        return cls(features.shape[1]).update(features)

    @property
    def dim(self) -> int:
        return len(self.sum)

    def update(self, features: Tensor | np.ndarray) -> "FeatureStats":
        """Add features (N, dim), any real dtype and device. Returns itself."""
        features = torch.as_tensor(features).detach().to("cpu", torch.float64)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"expected features (N, {self.dim}), got {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError(f"{(~features.isfinite()).any(1).sum()} of {len(features)} clips have non-finite features")
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features
        return self

    def __add__(self, other: "FeatureStats") -> "FeatureStats":
        return self.from_tensor(self.to_tensor() + other.to_tensor())

    def mean(self) -> Tensor:
        """(dim,) float64."""
        return self.sum / self._at_least(1)

    def cov(self, divisor: str) -> Tensor:
        """(dim, dim) float64. divisor: "N" (LARP) or "N-1" (CoordTok)."""
        if divisor not in DIVISORS:
            raise ValueError(f"the covariance divisor is one of {DIVISORS}, got {divisor!r}")
        mean = self.mean()
        scatter = self.outer - self.count * torch.outer(mean, mean)
        return scatter / (self.count if divisor == "N" else self._at_least(2) - 1)

    def _at_least(self, count: int) -> int:
        if self.count < count:
            raise ValueError(f"statistics of {self.count} clips, expected at least {count}; give more videos")
        return self.count

    def to_tensor(self) -> Tensor:
        """(1 + dim + dim^2,) float64; the sum of several processes' tensors is the whole's."""
        return torch.cat([torch.tensor([self.count], dtype=torch.float64), self.sum, self.outer.flatten()])

    @classmethod
    def from_tensor(cls, flat: Tensor) -> "FeatureStats":
        """The inverse of `to_tensor`."""
        flat = flat.detach().to("cpu", torch.float64)
        stats = cls(round((len(flat) - 0.75) ** 0.5 - 0.5))  # 1 + dim + dim^2 = (dim + 1/2)^2 + 3/4
        stats.count, stats.sum = int(flat[0]), flat[1 : 1 + stats.dim].clone()
        stats.outer = flat[1 + stats.dim :].view(stats.dim, stats.dim).clone()
        return stats


def frechet_distance(a: FeatureStats, b: FeatureStats, divisor: str = "N-1") -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two sets of features; covariances with `divisor`.

    tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2), which are real and not negative even if the
    covariances are rank-deficient. Their squares, the eigenvalues of A^(1/2) B A^(1/2), would lose half of the digits.
    """
    cov_a, cov_b = a.cov(divisor), b.cov(divisor)
    cross_trace = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    difference = a.mean() - b.mean()
    return (difference @ difference + cov_a.trace() + cov_b.trace() - 2 * cross_trace).item()


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * _nonnegative(values).sqrt() @ vectors.T


def _nonnegative(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues of a positive semi-definite matrix. Those within rounding error of 0 are set to 0: the distance sums
    their square roots, and 400 roots of 1e-16 would not be small."""
    floor = eigenvalues.abs().max() * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return torch.where(eigenvalues > floor, eigenvalues, 0)


def rank_note(count: int, dim: int = 400) -> str | None:
    """A warning for a distance whose covariances are of `count` clips; None if they can have full rank."""
    if count > dim:
        return None
    return f"{count} clips for {dim} features: the covariance is rank-deficient and the distance is biased upwards"


def frechet_floor(features: Tensor, divisor: str = "N-1", seed: int = 0) -> float:
    """Distance between two disjoint random halves of features (N, dim): the value for equal distributions at N/2
    clips."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    half = len(features) // 2
    first, second = (FeatureStats.from_features(features[order[start : start + half]]) for start in (0, half))
    return frechet_distance(first, second, divisor)


def frechet_spread(real: Tensor, fake: Tensor, divisor: str = "N-1", seed: int = 0, num_resamples: int = 10) -> float:
    """Standard deviation of the distance over bootstrap resamples of both sets (N, dim)."""
    rng = np.random.default_rng(seed)

    def resample(features: Tensor) -> FeatureStats:
        return FeatureStats.from_features(features[torch.from_numpy(rng.integers(len(features), size=len(features)))])

    distances = [frechet_distance(resample(real), resample(fake), divisor) for _ in range(num_resamples)]
    return float(np.std(distances, ddof=1))


NUM_GROUPS, STUDENT_T = 10, 2.262  # of the jackknife; 97.5 % quantile of Student's t with 9 degrees of freedom


def frechet_infinity(real: Tensor, fake: Tensor, divisor: str = "N-1", seed: int = 0) -> tuple[float, float, float]:
    """(distance, low, high): extrapolated to infinitely many clips, and its 95 % interval.

    The distance of N and N clips is biased upwards by about c / N ("Effectively unbiased FID", arXiv 1911.07023). The
    intercept of a straight line over 1 / N, through the distances at a half, three quarters and all of the clips, has
    no such bias; it may be negative. The interval is from a jackknife over groups of clips. Below 2.5 clips a feature
    the covariances of a half are rank-deficient, no line fits, and all three are nan. real, fake: (N, dim); the larger
    set is subsampled to the size of the other.
    """
    count, rng = min(len(real), len(fake)), np.random.default_rng(seed)
    if count < 2.5 * real.shape[1]:
        return math.nan, math.nan, math.nan
    chunks = [np.array_split(rng.permutation(len(side))[:count], NUM_GROUPS) for side in (real, fake)]
    groups = [[FeatureStats.from_features(side[torch.from_numpy(chunk)]) for chunk in parts]
              for side, parts in zip((real, fake), chunks)]

    def distance(chosen: list[int]) -> tuple[float, float]:
        """(1 / N, the distance) of some of the groups."""
        a, b = (sum((side[group] for group in chosen[1:]), side[chosen[0]]) for side in groups)
        return 1 / a.count, frechet_distance(a, b, divisor)

    def intercept(kept: list[int]) -> float:
        half, most = len(kept) // 2, 3 * len(kept) // 4
        subsets = [kept, kept[:half], kept[-half:], kept[:most], kept[-most:]]
        inverse_counts, distances = zip(*map(distance, subsets))
        return float(np.polyfit(inverse_counts, distances, deg=1)[1])

    whole = intercept(list(range(NUM_GROUPS)))
    without = [intercept([group for group in range(NUM_GROUPS) if group != left]) for left in range(NUM_GROUPS)]
    error = float(np.sqrt((NUM_GROUPS - 1) * np.var(without)))
    return whole, whole - STUDENT_T * error, whole + STUDENT_T * error


def fvd_scores(real: Tensor, fake: Tensor, divisor: str = "N-1", seed: int = 0) -> dict[str, float | bool]:
    """The distance between real and generated features (N, dim), and the numbers to read it with.

    fvd; fvd_floor: between disjoint halves of the real clips; fvd_spread: over resamples (see above; both nan for fewer
    than four clips); fvd_rank_deficient: no more clips than features on either side (see `rank_note`); fvd_infinity,
    fvd_infinity_low, fvd_infinity_high: see `frechet_infinity`; and those of `feature_metrics`.
    """
    fewest = min(len(real), len(fake))
    infinity = dict(zip(("fvd_infinity", "fvd_infinity_low", "fvd_infinity_high"),
                        frechet_infinity(real, fake, divisor, seed)))
    return {
        "fvd": frechet_distance(FeatureStats.from_features(real), FeatureStats.from_features(fake), divisor),
        "fvd_floor": frechet_floor(real, divisor, seed) if fewest >= 4 else float("nan"),
        "fvd_spread": frechet_spread(real, fake, divisor, seed) if fewest >= 4 else float("nan"),
        "fvd_rank_deficient": fewest <= real.shape[1],
        **infinity,
        **feature_metrics(real, fake, seed),
    }


# --- command line: folders of videos ---
FOLDERS = Protocol(
    name="folders",
    description="one clip per video of two folders",
    metrics=("fvd",),
    dataset=None,
    split=None,
    num_frames=16,
    stride=1,
    clip_start="videos drawn without replacement, first frame uniform over the video, both from the seed",
    short_videos="discarded",
    size=128,
    resize=COORDTOK_RESIZE,
    num_real=None,
    num_generated=None,
    pixels="files",
)
CHOICES = {"folders": FOLDERS} | {name: PROTOCOLS[name] for name in ("styleganv_fvd2048_16f", "styleganv_fvd2048_128f")}

# Distance of 128 and 128 clips of uniform noise, without preprocessing, by TensorFlow's implementation with divisor
# N-1.
ANCHOR = 10.138085


@torch.inference_mode()
def folder_features(
    i3d: I3D, files: list[VideoFile], protocol: Protocol, num_clips: int | None, seed: int, batch_size: int,
    num_workers: int, progress: str | None = None, timeout: float = TIMEOUT,
) -> tuple[Tensor, dict[str, int]]:
    """I3D logits of one clip each of `num_clips` videos (None: all), drawn without replacement.

    Short and damaged videos are left out, and replaced by others while there are any. The choice of clips depends on
    `files` and `seed` alone.
    Returns features (n, 400) float32 and the numbers left out: {"short": .., "damaged": ..}.
    """
    dataset = ClipDataset(
        files, protocol.num_frames, protocol.size, rule="coordtok", seed=seed, stride=protocol.stride, damaged="skip",
        timeout=timeout,
    )
    order = np.random.default_rng(seed).permutation(len(files))
    keys = [ClipKey(int(index), int(index)) for index in order]
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    wanted = len(files) if num_clips is None else min(num_clips, len(files))
    features, left_out, taken = [], {"short": 0, "damaged": 0}, 0
    device = next(i3d.parameters()).device
    bar = Progress(total=wanted, desc=progress, disable=progress is None, unit="clip")
    for asked, batch in zip(batches, make_loader(dataset, batches, num_workers)):
        place = {position: i for i, position in enumerate(batch["position"].tolist())}
        whole: list[int] = []
        for key in asked:  # in this order, so that neither clips nor counts depend on the batch size
            if taken + len(whole) == wanted:
                break
            if key.position not in place:
                left_out["damaged"] += 1
            elif batch["n_frames"][place[key.position]] < protocol.num_frames:
                left_out["short"] += 1
            else:
                whole.append(place[key.position])
        if whole:
            video = dataset.to_video(batch, device)[whole]
            features.append(i3d(video, resize=protocol.i3d_resize).cpu())
        taken += len(whole)
        bar.update(len(whole))
        if taken == wanted:
            break
    bar.close()
    if not features:
        raise ValueError(f"none of {len(files)} videos gave a clip of {protocol.num_frames} frames: {left_out}")
    return torch.cat(features), left_out


@torch.inference_mode()
def noise_distance(i3d: I3D, batch_size: int = 4) -> float:
    """Distance between the 128 and 128 clips of noise behind ANCHOR."""
    device = next(i3d.parameters()).device
    stats = []
    for seed in (1, 2):
        rng, part = np.random.RandomState(seed), FeatureStats()
        for _ in Progress(range(0, 128, batch_size), desc=f"noise {seed} of 2", unit="batch"):
            # RandomState gives the same numbers in parts as in one call.
            noise = torch.from_numpy(rng.rand(batch_size, 16, 224, 224, 3).astype(np.float32))
            part.update(i3d.forward_prepared(noise.to(device).permute(0, 4, 1, 2, 3)))
        stats.append(part)
    return frechet_distance(stats[0], stats[1], divisor="N-1")


def self_test(i3d: I3D, batch_size: int = 4) -> float:
    """`noise_distance`, printed beside ANCHOR. Returns the relative error."""
    distance = noise_distance(i3d, batch_size)
    error = abs(distance - ANCHOR) / ANCHOR
    print(f"self test: FVD {distance:.6f}, TensorFlow's {ANCHOR:.6f}, relative error {error:.1e} (limit 1e-4)")
    return error


def check_enough(count: int, what: str, side: str, source: str) -> None:
    """ValueError where a side has fewer than two videos or clips, of which there is no covariance."""
    if count < 2:
        raise ValueError(f"the {side} side, {source}, has {count} {what}, but a distance needs 2 or more: give more "
                         "videos")


def add_measurement(parser: Parser) -> None:
    """Add the flags that say how FVD is measured; `eval.audit` has them too."""
    add = parser.add_argument
    add("--protocol", choices=CHOICES, default="folders", help="gives the defaults of what follows")
    add("--num_frames", type=int, help="frames of a clip")
    add("--stride", type=int, help="frames between two frames of a clip")
    add("--size", type=int, help="clips are resized and cropped to this before the extractor's own resize")
    add("--resize", dest="i3d_resize", choices=RESIZE_RULES, help="the extractor's resize to 224x224")
    add("--divisor", choices=DIVISORS, help="of the covariance")
    add("--i3d_eps", type=float, help="1e-3 (the tfhub module) or 1e-5 (CoordTok's port)")
    add("--i3d_weights", help="file of I3D weights (default: the cache, or a download)")
    add("--seed", type=int, default=0, help="draws clips and resamples")
    add("--decode_timeout", type=float, default=TIMEOUT, help="seconds after which a file counts as damaged")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where I3D runs")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__.split("\n")[0], prog="python -m eval.fvd")
    add = parser.add_argument
    add("real", nargs="?", help="folder of videos, csv list, or text file with a path a line")
    add("generated", nargs="?", help="the same")
    add("--self_test", action="store_true", help="check this installation against the published value")
    add_measurement(parser)
    add("--num_clips", type=int, help="of each side (default: the protocol's, or all)")
    add("--dataset", help="what the real videos are, for the record (default: the name of their folder)")
    add("--split", help="likewise (default: all)")
    add("--batch_size", type=int, default=8, help="clips at once in I3D")
    add("--num_workers", type=int, default=2, help="loader workers")
    add("--out", help="JSON file for the numbers and their record")
    args = parser.parse_args(argv)
    if not args.self_test and args.generated is None:
        parser.error("give two folders, REAL and GENERATED, or --self_test")
    if args.self_test and args.real is not None:
        parser.error(f"--self_test measures no folders, but {args.real} is given: leave one of them out")
    if args.num_clips is not None and args.num_clips < 2:
        parser.error(f"--num_clips is {args.num_clips}, expected 2 or more: a distance needs two clips of each side")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    planned = CHOICES[args.protocol]
    names = ("num_frames", "stride", "size", "i3d_resize", "divisor", "i3d_eps")
    chosen = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    protocol = dataclasses.replace(planned, **chosen)
    if args.self_test:
        return int(self_test(I3D.from_weights(args.i3d_weights, eps=protocol.i3d_eps).to(args.device)) > 1e-4)
    if protocol.num_frames < MIN_FRAMES:
        raise ValueError(f"--num_frames {protocol.num_frames}: I3D needs clips of at least {MIN_FRAMES} frames")

    files, features, left_out = {side: list_videos(getattr(args, side)) for side in ("real", "generated")}, {}, {}
    for side in files:
        check_enough(len(files[side]), "video", side, getattr(args, side))
    i3d = I3D.from_weights(args.i3d_weights, eps=protocol.i3d_eps).to(args.device)
    for side, planned_clips in (("real", planned.num_real), ("generated", planned.num_generated)):
        num_clips = planned_clips if args.num_clips is None else args.num_clips
        features[side], left_out[side] = folder_features(
            i3d, files[side], protocol, num_clips, args.seed, args.batch_size, args.num_workers, side,
            args.decode_timeout,
        )
        check_enough(len(features[side]), "whole clip", side, getattr(args, side))
    results = fvd_scores(features["real"], features["generated"], protocol.divisor, args.seed)
    full = run_record(
        planned,
        args.real,
        len(files["real"]),
        i3d,
        **chosen,
        dataset=args.dataset or Path(args.real).stem,
        split=args.split or "all",
        pixels="files",
        num_real=len(features["real"]),
        num_generated=len(features["generated"]),
        seed=args.seed,
        manifest_sha256=manifest_sha256(
            (file.path for file in files["real"]), args.real if Path(args.real).is_dir() else None
        ),
        sampler="none: videos in files",
        model=args.generated,
    )
    print(describe(full))
    for side, numbers in left_out.items():
        print(f"  {side}: {len(files[side])} videos, without {numbers['short']} short and {numbers['damaged']} damaged")
    note = rank_note(min(len(features["real"]), len(features["generated"])))
    print(f"FVD {results['fvd']:.4f}" + (f" ({note})" if note else ""))
    print(f"  floor {results['fvd_floor']:.4f} (two halves of the real clips), spread {results['fvd_spread']:.4f}")
    print("  at infinitely many clips {fvd_infinity:.4f}, from {fvd_infinity_low:.4f} to {fvd_infinity_high:.4f}\n"
          "  KVD {kvd:.5f}, precision {precision:.3f}, recall {recall:.3f}, density {density:.3f}, "
          "coverage {coverage:.3f}".format(**results))
    if args.out:
        write_record(args.out, full, results | {"left_out": left_out})
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
