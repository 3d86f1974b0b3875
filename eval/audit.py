"""An audit of an FVD: what each choice that is often left unsaid does to the number.

    python -m eval.audit REAL GENERATED [--output DIR]

measures the distance under a named protocol, then changes one choice at a time and prints a row for each: the distance,
its shift from the protocol's, and 95 % intervals of both. It also looks for files that are in both lists, and shows the
nearest real clip of a few generated ones. REAL and GENERATED are folders of videos, output folders of sample.py, or
lists, as `python -m eval.fvd` takes them. With the default 32 clips it takes about six minutes on two CPU cores; time
grows with --num_clips (2,048 clips: six hours there).

    python -m eval.audit --self_test

measures the shift by eps on the noise of the published value (seven minutes on two CPU cores).
"""
import argparse
import dataclasses
import hashlib
import itertools
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.cli import Parser, one_line_errors
from common.console import Progress
from common.errors import DamagedFile, read_json, reading, shown
from common.files import atomic_write, manifest_sha256
from data.clips import ClipDataset, ClipKey, Quarantine
from data.lists import VideoFile
from data.loader import make_loader
from data.video import TIMEOUT, VideoError, probe, read_frames, write_video
from eval.fvd import (
    ANCHOR,
    CHOICES,
    DIVISORS,
    FeatureStats,
    add_measurement,
    frechet_distance,
    frechet_infinity,
    list_videos,
    noise_distance,
    rank_note,
)
from eval.i3d import I3D, MIN_FRAMES, RESIZE_RULES, prepare
from eval.metrics import psnr_clip, psnr_frame
from eval.pictures import contact_sheet
from eval.protocols import PROTOCOLS
from eval.report import describe, run_record, write_record

ROWS = ("eps", "divisor", "resize", "stride", "start", "seed", "clips", "mp4", "other_real", "chunks", "psnr")
PORT_EPS, PORT_ANCHOR = 1e-5, 10.166  # of the port that CoordTok copied, and its distance of the anchor's noise
CHUNK = 16  # frames of CoordTok's released validation
NUM_RESAMPLES, NUM_SUBSETS = 50, 10
NUM_NEAREST = 4
HALF_WIDTH = 1.96  # of a 95 % interval, in standard deviations


@dataclass(frozen=True)
class Choice:
    """How the features of a set of videos are made.

    size: of the clips compared; None leaves frames as they are, for the extractor's own resize. rule: see
    `data.video.resize_crop`. window: see ClipDataset. crf: of H.264, which the clips go through; None is lossless.
    chunk: frames of the pieces that clips are cut into; None keeps them whole.
    """

    eps: float
    i3d_resize: str
    size: int | None
    rule: str
    stride: int
    seed: int
    window: str = "random"
    crf: int | None = None
    chunk: int | None = None


class Extractor:
    """Features of sets of videos under any Choice. No network sees the same pixels twice: choices share features."""

    def __init__(self, weights: str | None, num_frames: int, num_clips: int, batch_size: int, num_workers: int,
                 timeout: float, device: str):
        self.weights, self.num_frames, self.num_clips, self.device = weights, num_frames, num_clips, device
        self.batch_size, self.num_workers, self.timeout = batch_size, num_workers, timeout
        self.quarantine = Quarantine()
        self.networks: dict[float, I3D] = {}
        self.lengths: dict[str, int] = {}
        self.known: dict[tuple[float, bytes], Tensor] = {}  # (eps, digest of the network's input) -> (400,)

    def network(self, eps: float) -> I3D:
        if eps not in self.networks:
            self.networks[eps] = I3D.from_weights(self.weights, eps=eps).to(self.device)
        return self.networks[eps]

    def clips(self, files: list[VideoFile], choice: Choice) -> Iterator[tuple[str, Tensor]]:
        """(path, clip (3, T, H, W) float [0, 1]) of up to `num_clips` videos, drawn as `eval.fvd.folder_features` draws
        them. Short and damaged videos are left out."""
        dataset = ClipDataset(
            files, self.num_frames, choice.size or 1, choice.rule, seed=choice.seed, stride=choice.stride,
            resize="worker" if choice.size else "device", window=choice.window, damaged="skip",
            quarantine=self.quarantine, timeout=self.timeout,
        )
        keys = [ClipKey(int(index), int(index)) for index in np.random.default_rng(choice.seed).permutation(len(files))]
        batches, taken = [keys[i : i + self.batch_size] for i in range(0, len(keys), self.batch_size)], 0
        for batch in make_loader(dataset, batches, self.num_workers):
            for path, frames, length in zip(batch["path"], batch["frames"], batch["n_frames"].tolist()):
                if length == self.num_frames and taken < self.num_clips:
                    taken += 1
                    clip = frames.permute(3, 0, 1, 2)
                    yield path, clip / 255 if clip.dtype == torch.uint8 else clip
            if taken == self.num_clips:
                return

    @torch.inference_mode()
    def features(self, files: list[VideoFile], choice: Choice, name: str) -> Tensor:
        """(clips, pieces of a clip, 400) float32. name: for the progress bar."""
        keys, pieces = [], 1
        pending: dict[tuple[float, bytes], Tensor] = {}

        def run() -> None:
            if pending:
                found = self.network(choice.eps).forward_prepared(torch.cat([*pending.values()]).to(self.device))
                self.known.update(zip(pending, found.cpu()))
                pending.clear()

        total = min(self.num_clips, len(files))
        for _, clip in Progress(self.clips(files, choice), name, total, unit="clips"):
            clip = clip if choice.crf is None else through_mp4(clip, choice.crf, self.timeout)
            parts = [part for part in clip.split(choice.chunk or self.num_frames, dim=1)
                     if part.shape[1] == (choice.chunk or self.num_frames)]
            pieces = len(parts)
            for part in parts:
                prepared = prepare(part[None], choice.i3d_resize)
                keys.append((choice.eps, hashlib.blake2b(prepared.numpy().tobytes()).digest()))
                if keys[-1] not in self.known:
                    pending[keys[-1]] = prepared
                if len(pending) == self.batch_size:
                    run()
        run()
        if len(keys) < 2 * pieces:
            raise ValueError(f"{name}: {len(keys) // pieces} of {len(files)} videos give a clip of {self.num_frames} "
                             "frames, and a distance needs 2: give more videos, or lower --num_frames")
        return torch.stack([self.known[key] for key in keys]).unflatten(0, (-1, pieces))

    def num_long(self, files: list[VideoFile], length: int) -> int:
        """How many of the videos have `length` frames or more."""
        return sum(self.length(file.path) >= length for file in files) if length else len(files)

    def length(self, path: str) -> int:
        """Frames of a video, 0 of a damaged one."""
        if path not in self.lengths:
            try:
                self.lengths[path] = probe(path, self.timeout).num_frames
            except VideoError:
                self.lengths[path] = 0
        return self.lengths[path]


def through_mp4(clip: Tensor, crf: int, timeout: float = TIMEOUT) -> Tensor:
    """A clip (3, T, H, W) float [0, 1], written as H.264 and read again."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/clip.mp4"
        write_video(path, clip, crf=crf)
        return read_frames(path, range(clip.shape[1]), timeout).permute(3, 0, 1, 2) / 255


# --- distances and intervals ---
def distance(real: Tensor, fake: Tensor, divisor: str) -> float:
    """`frechet_distance` of features (..., dim), quick for few of them: with centred features A and B, over the root of
    the divisor, tr (A'A B'B)^(1/2) is the sum of the singular values of A B'."""
    means, factors = [], []
    for side in (real, fake):
        side = side.flatten(0, -2).double()
        means.append(side.mean(0))
        side = (side - means[-1]) / math.sqrt(len(side) - (divisor == "N-1"))
        factors.append(torch.linalg.qr(side, mode="r").R if len(side) > side.shape[1] else side)
    a, b = factors
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return ((means[0] - means[1]).square().sum() + a.square().sum() + b.square().sum() - 2 * cross).item()


def resampled(real: Tensor, fake: Tensor, divisor: str, seed: int) -> np.ndarray:
    """(NUM_RESAMPLES,) distances of bootstrap resamples of the clips of both sides. Sets of one size are resampled
    alike, so that differences of two results are those of the same clips."""
    draws = [np.random.default_rng([seed, side, len(x)]).integers(len(x), size=(NUM_RESAMPLES, len(x)))
             for side, x in enumerate((real, fake))]
    return np.array([distance(real[torch.from_numpy(a)], fake[torch.from_numpy(b)], divisor) for a, b in zip(*draws)])


def interval(value: float, deviations: Iterable[float]) -> list[float]:
    """95 % interval around a value, whose errors are distributed as `deviations` are around their mean."""
    half = HALF_WIDTH * float(np.std(list(deviations), ddof=1))
    return [value - half, value + half]


def curve(real: Tensor, fake: Tensor, divisor: str, seed: int) -> list[tuple[int, float, list[float]]]:
    """(N, mean distance, interval) of random subsets of N clips of each side, for a quarter, a half and three quarters
    of the clips."""
    rng, count, points = np.random.default_rng(seed), min(len(real), len(fake)), []
    for size in sorted({max(2, count * quarters // 4) for quarters in (1, 2, 3)}):
        subsets = ([side[torch.from_numpy(rng.choice(len(side), size, replace=False))] for side in (real, fake)]
                   for _ in range(NUM_SUBSETS))
        found = [distance(one, other, divisor) for one, other in subsets]
        points.append((size, float(np.mean(found)), interval(float(np.mean(found)), found)))
    return points


# --- lists and neighbours ---
def in_both(a: list[VideoFile], b: list[VideoFile]) -> list[str]:
    """Paths of `a` that are in `b` too, by name or by content."""

    def sizes(files: list[VideoFile]) -> dict[str, int]:
        return {file.path: os.path.getsize(file.path) for file in files if os.path.isfile(file.path)}

    ours, theirs = sizes(a), sizes(b)
    shared = set(ours.values()) & set(theirs.values())

    def digest(path: str) -> bytes:
        return hashlib.blake2b(Path(path).read_bytes()).digest()

    known = {digest(path) for path, size in theirs.items() if size in shared}
    return [path for path, size in ours.items() if size in shared and digest(path) in known]


def nearest(real: Tensor, fake: Tensor) -> tuple[Tensor, float]:
    """For features (N, dim): the place of the real clip that is nearest to each generated one; and the median distance
    to it, over that of a real clip to the nearest other real one. Well below 1, samples copy real clips."""
    real, fake = real.double(), fake.double()
    between, within = torch.cdist(fake, real), torch.cdist(real, real)
    within.fill_diagonal_(math.inf)
    return between.argmin(1), (between.min(1).values.median() / within.min(1).values.median()).item()


def stored_features(folder: Path, paths: list[str], i3d: I3D, resize: str) -> Tensor | None:
    """(n, 1, 400) features that sample.py computed of the samples at `paths` before they were written; None where
    `folder` is not its output, or it measured in another way."""
    if not (folder / "settings.json").is_file():
        return None
    settings = read_json(folder / "settings.json", "settings of samples", "make the samples anew")
    protocol = PROTOCOLS.get(settings.get("protocol"))  # frame prediction is measured at another size
    if (settings.get("i3d"), settings.get("i3d_eps")) != (i3d.weights_sha256, i3d.eps) or protocol is None or (
            protocol.num_cond_frames or protocol.i3d_resize != resize):
        return None
    rows: dict[str, Tensor] = {}
    for path in sorted((folder / "chunks").glob("*.npz")):
        with reading(path, "a chunk of samples", "make it anew with sample.py"), np.load(path) as chunk:
            rows |= zip((f"{i:06d}" for i in chunk["index"]), torch.from_numpy(chunk["fake"]))
    stems = [Path(path).stem for path in paths]
    if lacking := [stem for stem in stems if stem not in rows]:
        raise DamagedFile(f"{folder}/chunks lacks {len(lacking)} of the samples, among them {lacking[0]}: run "
                          "sample.py again")
    return torch.stack([rows[stem] for stem in stems])[:, None]


# --- the audit ---
class Audit:
    """Rows of an audit: {"row", "value", "shift", "interval", "shift_interval", "note"}, value and shift None where it
    could not be measured."""

    def __init__(self, extractor: Extractor, files: dict[str, list[VideoFile]], base: Choice, divisor: str):
        self.extractor, self.files, self.base, self.divisor = extractor, files, base, divisor
        self.sets: dict[tuple[str, Choice], Tensor] = {}
        self.features = {side: self.measured(side, base, side) for side in ("real", "generated")}
        self.value = self._fvd(self.features, divisor)
        self.draws = self._resampled(self.features, divisor)
        self.rows = [{"row": "the named protocol", "value": self.value, "shift": 0.0, "unit": "",
                      "interval": interval(self.value, self.draws), "shift_interval": [0.0, 0.0], "note": ""}]

    def measured(self, side: str, choice: Choice, name: str) -> Tensor:
        """Features of a side under a choice, computed once."""
        if (side, choice) not in self.sets:
            self.sets[side, choice] = self.extractor.features(self.files[side], choice, name)
        return self.sets[side, choice]

    def _fvd(self, features: dict[str, Tensor], divisor: str) -> float:
        real, generated = (FeatureStats.from_features(features[side].flatten(0, 1)) for side in ("real", "generated"))
        return frechet_distance(real, generated, divisor)

    def _resampled(self, features: dict[str, Tensor], divisor: str) -> np.ndarray:
        return resampled(features["real"], features["generated"], divisor, self.base.seed)

    def add(self, row: str, changed: dict[str, Tensor] | None = None, divisor: str | None = None,
            note: str = "") -> None:
        """Measure with other features of some sides, or another divisor."""
        features, divisor = self.features | (changed or {}), divisor or self.divisor
        value, draws = self._fvd(features, divisor), self._resampled(features, divisor)
        shift = value - self.value
        self.put(row, value, shift, interval(value, draws), interval(shift, draws - self.draws), note)

    def put(self, row: str, value: float | None, shift: float | None = None, interval: list[float] | None = None,
            shift_interval: list[float] | None = None, note: str = "", unit: str = "") -> None:
        self.rows.append({"row": row, "value": value, "shift": shift, "unit": unit, "interval": interval,
                          "shift_interval": shift_interval, "note": note})

    def change(self, row: str, sides: tuple[str, ...] = ("real", "generated"), frames: int = 0, **changes) -> None:
        """Measure with a changed Choice for `sides`. A side with fewer videos of `frames` frames than clips under the
        protocol keeps those."""
        choice, found, notes = replace(self.base, **changes), {}, []
        for side in sides:
            if (long := self.extractor.num_long(self.files[side], frames)) < len(self.features[side]):
                notes.append(f"{side}: {long} videos have {frames} frames")
            else:
                found[side] = self.measured(side, choice, f"{row}, {side}")
        if not found:
            self.put(row, None, note=f"not measured: {', '.join(notes)}")
        else:
            self.add(row, found, note=", ".join(f"{note}, kept as they are" for note in notes))


def measure(audit: Audit, wanted: tuple[str, ...], other: tuple[str, list[VideoFile]] | None,
            stored: Tensor | None) -> None:
    """Add the wanted rows."""
    base, real, fake = audit.base, audit.features["real"], audit.features["generated"]
    num_frames = audit.extractor.num_frames
    if "eps" in wanted:
        for eps in {1e-3, PORT_EPS} - {base.eps}:
            audit.change(f"I3D eps {eps:g} instead of {base.eps:g}", eps=eps)
    if "divisor" in wanted:
        for divisor in set(DIVISORS) - {audit.divisor}:
            audit.add(f"covariance divisor {divisor} instead of {audit.divisor}", divisor=divisor)
    if "resize" in wanted:
        audit.change(f"files to {base.size}x{base.size}: bilinear, antialias (LARP)", rule="larp")
        for resize in RESIZE_RULES:
            if resize != base.i3d_resize:
                audit.change(f"I3D resize {resize} instead of {base.i3d_resize}", i3d_resize=resize)
        for resize in RESIZE_RULES:
            audit.change(f"files straight to 224x224, {resize}", size=None, i3d_resize=resize)
    if "stride" in wanted:
        stride = 2 if base.stride == 1 else 1
        audit.change(f"stride {stride} instead of {base.stride}", frames=(num_frames - 1) * stride + 1, stride=stride)
    if "start" in wanted:
        audit.change("clips from each video's first frame", window="start")
    if "seed" in wanted:
        audit.change("videos and starts of another seed", seed=base.seed + 1)
    if "clips" in wanted:
        for size, value, spread in curve(real, fake, audit.divisor, base.seed):
            shift = value - audit.value
            audit.put(f"{size} clips of each side", value, shift, spread, [end - audit.value for end in spread],
                      f"mean and spread of {NUM_SUBSETS} subsets")
        value, *ends = frechet_infinity(real.flatten(0, 1), fake.flatten(0, 1), audit.divisor, base.seed)
        if math.isnan(value):
            audit.put("infinitely many clips", None, note="not measured: the extrapolation needs "
                      f"{math.ceil(2.5 * real.shape[-1])} clips of each side")
        else:
            audit.put("infinitely many clips", value, value - audit.value, ends, [end - audit.value for end in ends],
                      "straight line over 1/N; interval by jackknife")
    if "mp4" in wanted:
        for crf, what in ((5, "as this project writes"), (23, "ffmpeg's default")):
            audit.change(f"generated clips through mp4, crf {crf}", ("generated",), crf=crf)
            audit.rows[-1]["note"] = what
        audit.change("both sides through mp4, crf 23", crf=23)
        if stored is None:
            audit.put("generated clips as tensors, before any file", None, note="not measured: GENERATED is not an "
                      "output folder of sample.py under this protocol")
        else:
            audit.add("generated clips as tensors, before any file", {"generated": stored})
    if "other_real" in wanted:
        if other is None:
            audit.put("other real side", None, note="not measured: give --other_real, as the test list for the train "
                      "list")
        else:
            audit.add(f"{other[0]} as the real side", {"real": audit.extractor.features(other[1], base, "other real")})
    if "chunks" in wanted:
        if num_frames < 2 * CHUNK:
            audit.put(f"chunks of {CHUNK} frames", None, note=f"not measured: a clip of {num_frames} frames is one "
                      f"piece; --num_frames {2 * CHUNK} or more")
        else:
            audit.change(f"chunks of {CHUNK} frames instead of whole clips", chunk=CHUNK)
    if "psnr" in wanted:
        add_psnr(audit)


def add_psnr(audit: Audit) -> None:
    """Rows of PSNR by clip and by frame: between files of one name, or the generated clips and their copy in mp4."""
    names = {side: {Path(file.path).stem: file for file in audit.files[side]} for side in ("real", "generated")}
    start = replace(audit.base, window="start")
    clips, what = audit.extractor.clips, "generated against real files of one name"
    if names["generated"].keys() <= names["real"].keys():
        sides = [dict(clips([names[side][name] for name in names["generated"]], start)) for side in names]
        by_name = [{Path(path).stem: clip for path, clip in side.items()} for side in sides]
        pairs = [(by_name[0][name], by_name[1][name]) for name in by_name[0].keys() & by_name[1].keys()]
    else:
        what = "generated clips against their copy in mp4, crf 23"
        pairs = [(clip, through_mp4(clip, 23)) for _, clip in clips(audit.files["generated"], audit.base)]
    found = [(psnr_clip(a[None], b[None]).item(), psnr_frame(a[None], b[None]).item()) for a, b in pairs]
    by_clip, by_frame = np.array([values for values in found if all(map(math.isfinite, values))]).reshape(-1, 2).T
    if len(by_clip) < 2:
        audit.put("PSNR", None, note=f"not measured: {len(by_clip)} pairs with an error; {what}")
        return
    note = what + (f"; without {len(found) - len(by_clip)} pairs that have equal frames" if len(found) > len(by_clip)
                   else "")
    draws = np.random.default_rng(audit.base.seed).integers(len(by_clip), size=(NUM_RESAMPLES, len(by_clip)))
    for row, values in (("PSNR of each clip's error", by_clip), ("PSNR of each frame's error", by_frame)):
        shift = float((values - by_clip).mean())
        audit.put(row, float(values.mean()), shift, interval(float(values.mean()), values[draws].mean(1)),
                  interval(shift, (values - by_clip)[draws].mean(1)), note, "dB")


def markdown(rows: list[dict]) -> str:
    """The rows as a table."""

    def span(ends: list[float] | None, sign: str = "") -> str:
        return "" if ends is None else f"{ends[0]:{sign}.3f} to {ends[1]:{sign}.3f}"

    lines = ["| choice | FVD | 95 % interval | shift | 95 % interval of the shift | note |", "|---" * 6 + "|"]
    for row in rows:
        unit = f" {row['unit']}" if row["unit"] else ""
        value = "-" if row["value"] is None else f"{row['value']:.3f}{unit}"
        shift = "-" if row["shift"] is None else f"{row['shift']:+.3f}{unit}"
        lines.append(f"| {row['row']} | {value} | {span(row['interval'])} | {shift} | "
                     f"{span(row['shift_interval'], '+')} | {row['note']} |")
    return "\n".join(lines) + "\n"


# --- command line ---
def other_split(source: str) -> str | None:
    """The test list beside a train list, or the train list beside a test list, by its name; None where none is."""
    path = Path(source)
    for here, there in (("train", "test"), ("test", "train")):
        if here in path.name and (other := path.with_name(path.name.replace(here, there))).exists():
            return str(other)
    return None


def self_test(args: argparse.Namespace) -> int:
    """The shift by eps on the noise behind the published value. Returns the exit code."""
    found, published = {}, {1e-3: ANCHOR, PORT_EPS: PORT_ANCHOR}
    for eps, expected in published.items():
        found[eps] = noise_distance(I3D.from_weights(args.i3d_weights, eps=eps).to(args.device), args.batch_size)
        print(f"eps {eps:g}: FVD {found[eps]:.6f}, published {expected:g}", flush=True)
    print(f"shift by eps {PORT_EPS:g}: {found[PORT_EPS] - found[1e-3]:+.4f}, published {PORT_ANCHOR - ANCHOR:+.4f}")
    return int(any(abs(found[eps] / expected - 1) > 1e-4 for eps, expected in published.items()))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__.split("\n")[0], prog="python -m eval.audit")
    add = parser.add_argument
    add("real", nargs="?", help="folder of videos, csv list, or text file with a path a line")
    add("generated", nargs="?", help="the same, or an output folder of sample.py")
    add("--self_test", action="store_true", help="measure the shift by eps on the noise of the published value")
    add("--other_real", help="another set of real videos to measure against (default: the test folder or list beside "
        "a train one, and the other way round)")
    add("--rows", nargs="+", choices=ROWS, default=ROWS, help="which choices to change")
    add_measurement(parser)
    add("--num_clips", type=int, default=32, help="of each side; the full audit is up to 17 passes of so many through "
        "I3D, each a second on one CPU core for 16 frames")
    add("--batch_size", type=int, default=4, help="clips at once in I3D")
    add("--num_workers", type=int, default=0, help="loader workers")
    add("--output", default="results/audit", help="folder of the table and the picture")
    args = parser.parse_args(argv)
    if not args.self_test and args.generated is None:
        parser.error("give two folders, REAL and GENERATED, or --self_test")
    if args.num_clips < 2:
        parser.error(f"--num_clips is {args.num_clips}: a distance needs 2 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.self_test:
        return self_test(args)
    planned = CHOICES[args.protocol]
    names = ("num_frames", "stride", "size", "i3d_resize", "divisor", "i3d_eps")
    chosen = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    protocol = dataclasses.replace(planned, **chosen)
    if protocol.num_frames < MIN_FRAMES:
        raise ValueError(f"--num_frames {protocol.num_frames}: I3D needs clips of at least {MIN_FRAMES} frames")
    files = {side: list_videos(getattr(args, side)) for side in ("real", "generated")}
    other = args.other_real or other_split(args.real)
    other = (Path(other).name, list_videos(other)) if other and "other_real" in args.rows else None

    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    base = Choice(protocol.i3d_eps, protocol.i3d_resize, protocol.size, "coordtok", protocol.stride, args.seed)
    extractor = Extractor(args.i3d_weights, protocol.num_frames, args.num_clips, args.batch_size, args.num_workers,
                          args.decode_timeout, args.device)
    audit = Audit(extractor, files, base, protocol.divisor)
    i3d = extractor.network(base.eps)
    stored = None
    if "mp4" in args.rows:
        drawn = [(path, clip.shape[2:]) for path, clip in extractor.clips(files["generated"], replace(base, size=None))]
        whole = all(extractor.length(path) == protocol.num_frames for path, _ in drawn)
        if whole and {shape for _, shape in drawn} == {(base.size, base.size)}:  # else clips are cut or resized here
            stored = stored_features(Path(args.generated), [path for path, _ in drawn], i3d, base.i3d_resize)
    measure(audit, args.rows, other, stored)

    counts = {side: len(audit.features[side]) for side in files}
    places, ratio = nearest(audit.features["real"].flatten(0, 1), audit.features["generated"].flatten(0, 1))
    shown_places = places[:NUM_NEAREST].tolist()
    fakes = list(itertools.islice(extractor.clips(files["generated"], base), len(shown_places)))
    reals = {i: clip for i, clip in enumerate(extractor.clips(files["real"], base)) if i in shown_places}
    shown_clips = [(fake, reals[place]) for fake, place in zip(fakes, shown_places)]
    contact_sheet(
        folder / "nearest.png", [(fake[1], real[1]) for fake, real in shown_clips],
        [f"{Path(fake[0]).name}, nearest real clip in {Path(real[0]).name}" for fake, real in shown_clips],
        ("generated", "real"), NUM_NEAREST,
    )
    lists = {"generated": files["generated"]} | ({other[0]: other[1]} if other else {})
    doubles = {name: in_both(files["real"], videos) for name, videos in lists.items()}
    record = run_record(
        planned, args.real, len(files["real"]), i3d, **chosen, dataset=Path(args.real).stem, split="all",
        pixels="files", num_real=counts["real"], num_generated=counts["generated"], seed=args.seed,
        manifest_sha256=manifest_sha256((file.path for file in files["real"]),
                                        args.real if Path(args.real).is_dir() else None),
        sampler="none: videos in files", model=args.generated,
    )
    table = markdown(audit.rows)
    notes = [rank_note(min(counts.values())),
             f"the median distance of a generated clip to the nearest of the {counts['real']} real ones, by I3D's "
             f"features, is {ratio:.2f} times that of a real clip to its nearest other real one"]
    for name, paths in doubles.items():
        examples = f": {', '.join(map(shown, paths[:3]))}" if paths else ""
        notes.append(f"{len(paths)} files of the real list are in {name} too{examples}")
    text = "\n".join([describe(record), "", table, *(f"- {note}" for note in notes if note)]) + "\n"
    with atomic_write(folder / "audit.md", "w") as file:
        file.write(text)
    write_record(folder / "audit.json", record, {"rows": audit.rows, "nearest_ratio": ratio, "in_both": doubles,
                                                 "clips_through_i3d": len(extractor.known)})
    print(text)
    print(f"{len(extractor.known)} clips went through I3D; table: {folder}/audit.md, .json; picture: "
          f"{folder}/nearest.png")
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
