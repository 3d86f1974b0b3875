"""A sensitivity card: which metric sees what.

    python -m eval.sensitivity FOLDER [--output DIR]

applies eight graded corruptions to real clips of FOLDER and measures each corrupted set against the clean one with
every metric of this project. It prints one table and writes it to DIR as sensitivity.md, .json (with its record) and
.png. The same clips stand on both sides, so that only the corruption differs: an FVD here is no FVD of a protocol.
"""
import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from common.cli import Parser, one_line_errors
from common.console import Progress
from common.files import atomic_write, git_revision, manifest_sha256
from common.rng import sample_generators
from data.clips import ClipDataset, ClipKey
from data.lists import list_folder
from data.video import TIMEOUT, to_video
from eval.features import FEATURE_METRICS_RECORD, feature_metrics
from eval.fvd import FeatureStats, frechet_distance
from eval.i3d import I3D, MIN_FRAMES
from eval.metrics import mse_clip, ssim_frame
from eval.motion import MOTION_RECORD, check_vmaf, flicker, frozen, optical_flow, seams, vmaf, warping_error
from eval.protocols import COORDTOK_RESIZE
from eval.report import nulls, write_record
from models.pretrained import WeightsError
from models.stlpips import perceptual_metric

MIN_CLIPS = 6  # density and coverage look at the fifth neighbour
BLOCK = 8  # height and width of the blocks, and of the seams
METRICS = ("fvd", "kvd", "precision", "recall", "density", "coverage", "psnr", "ssim", "lpips", "stlpips",
           "warping_error", "warping_error_own", "flicker", "frozen", "seams_xy", "vmaf")
LEGEND = {
    "psnr": "of the mean squared error of all clips, dB",
    "ssim": "ssim_frame",
    "warping_error": "by the flow of the clean clip",
    "warping_error_own": "by the corrupted clip's own flow, as for samples",
    "seams_xy": f"error on borders of {BLOCK}x{BLOCK} blocks over that inside",
}


# --- corruptions: a clip (3, T, H, W) float [0, 1], a strength and a generator -> the same ---

def blur(clip: Tensor, sigma: float, _: torch.Generator) -> Tensor:
    """Gaussian blur of each frame. sigma: in pixels."""
    length = 2 * min(math.ceil(3 * sigma), min(clip.shape[2:]) - 1) + 1
    frames = clip.transpose(0, 1)
    for kernel in ([length, 1], [1, length]):  # rows and columns in turn, as torchvision's kernel is a square
        frames = gaussian_blur(frames, kernel, sigma)
    return frames.transpose(0, 1)


def noise(clip: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise, independent in each pixel, colour and frame."""
    return (clip + sigma * torch.randn(clip.shape, generator=generator)).clamp(0, 1)


def blocks(clip: Tensor, step: float, _: torch.Generator) -> Tensor:
    """Coarse quantisation of the cosine transform of 8x8 blocks, as by a codec. step: of the coefficients; the mean of
    a block is kept, so that a large step leaves a mosaic."""
    k, n = torch.arange(BLOCK)[:, None], torch.arange(BLOCK)
    dct = (2 / BLOCK) ** 0.5 * torch.cos(math.pi * (2 * n + 1) * k / (2 * BLOCK))
    dct[0] /= 2**0.5
    tiles = rearrange(clip, "c t (y h) (x w) -> c t y x h w", h=BLOCK, w=BLOCK)
    coefficients = dct @ tiles @ dct.T
    rounded = (coefficients / step).round() * step
    rounded[..., 0, 0] = coefficients[..., 0, 0]
    return rearrange(dct.T @ rounded @ dct, "c t y x h w -> c t (y h) (x w)").clamp(0, 1)


def colour(clip: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A tint of the whole clip: red, green and blue are scaled by exp(strength * d), d a random unit vector."""
    direction = F.normalize(torch.randn(3, generator=generator), dim=0)
    return (clip * (strength * direction).exp().view(3, 1, 1, 1)).clamp(0, 1)


def frame_drop(clip: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of the frames is lost, and the last one before is shown again."""
    lost = torch.rand(clip.shape[1], generator=generator) < share
    kept = torch.where(lost, 0, torch.arange(clip.shape[1]))  # the first frame stays
    return clip[:, kept.cummax(0).values]


def frame_swap(clip: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Frames 2i and 2i + 1 change places, for a share of all i."""
    swapped = (torch.rand(clip.shape[1] // 2, generator=generator) < share).long()
    order = torch.arange(clip.shape[1])
    order[: 2 * len(swapped)] += torch.stack([swapped, -swapped], dim=1).flatten()
    return clip[:, order]


def time_jitter(clip: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Each frame is shown as of another time, Gaussian around its own. sigma: in frames."""
    num_frames = clip.shape[1]
    times = torch.arange(num_frames) + sigma * torch.randn(num_frames, generator=generator)
    return clip[:, times.round().long().clamp(0, num_frames - 1)]


def local_warp(clip: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Each frame is bent smoothly, and each in another way: every single one is a plausible picture, but what it shows
    wobbles. sigma: displacement of a 5x5 grid, as a share of the height. After "On the content bias in FVD" (arXiv
    2404.12391)."""
    height, width = clip.shape[2:]
    field = 2 * sigma * torch.randn(clip.shape[1], 2, 5, 5, generator=generator)
    field = F.interpolate(field, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    grid = torch.stack([x, y], dim=-1) + field
    frames = F.grid_sample(clip.transpose(0, 1), grid, padding_mode="reflection", align_corners=True)
    return frames.transpose(0, 1).clamp(0, 1)


class Corruption(NamedTuple):
    function: Callable[[Tensor, float, torch.Generator], Tensor]
    strengths: tuple[float, ...]  # rising
    unit: str


CORRUPTIONS = {
    "blur": Corruption(blur, (0.5, 1, 2, 4), "sigma in pixels"),
    "noise": Corruption(noise, (0.02, 0.05, 0.1, 0.2), "sigma"),
    "blocks": Corruption(blocks, (0.1, 0.3, 0.9, 2.7), "step of the coefficients of 8x8 blocks"),
    "colour": Corruption(colour, (0.1, 0.2, 0.4, 0.8), "logarithm of the gain"),
    "frame_drop": Corruption(frame_drop, (0.15, 0.3, 0.5, 0.75), "share of frames"),
    "frame_swap": Corruption(frame_swap, (0.15, 0.3, 0.6, 1), "share of pairs"),
    "time_jitter": Corruption(time_jitter, (0.5, 1, 2, 4), "sigma in frames"),
    "local_warp": Corruption(local_warp, (0.005, 0.01, 0.02, 0.04), "sigma as a share of the height"),
}


def corrupt(video: Tensor, name: str, strength: float, seed: int = 0) -> Tensor:
    """Clips (B, 3, T, H, W) float [0, 1] under a corruption. What is drawn for clip i depends on the name, the seed and
    i alone: a stronger corruption of a clip is more of the same one."""
    first = 2**20 * list(CORRUPTIONS).index(name)
    generators = sample_generators(seed, range(first, first + len(video)))
    function = CORRUPTIONS[name].function
    return torch.stack([function(clip, strength, generator) for clip, generator in zip(video, generators)])


def psnr(a: Tensor, b: Tensor) -> float:
    """Of the mean squared error of all clips, in dB: a clip without error is not infinite by itself."""
    return (-10 * mse_clip(a, b).mean().log10()).item()


def blur_of_psnr(video: Tensor, wanted: float) -> tuple[Tensor, float]:
    """(the clips, sigma) under the blur whose PSNR is the wanted one, by bisection."""
    low, high = math.log(0.05), math.log(max(video.shape[-2:]) / 3)
    for _ in range(12):
        sigma = math.exp((low + high) / 2)
        blurred = corrupt(video, "blur", sigma)
        if psnr(video, blurred) > wanted:
            low = math.log(sigma)
        else:
            high = math.log(sigma)
    return blurred, sigma


# --- the card ---

class Yardstick:
    """Measures sets of clips against the clean one, what is needed of which is computed once."""

    def __init__(self, real: Tensor, i3d: nn.Module, distances: Mapping[str, nn.Module], device: torch.device,
                 batch_size: int, with_vmaf: bool = False):
        self.real, self.i3d, self.distances, self.device = real, i3d, distances, device
        self.batch_size, self.with_vmaf = batch_size, with_vmaf
        self.features, self.flow = self._features(real), optical_flow(real)

    def _features(self, video: Tensor) -> Tensor:
        return torch.cat([self.i3d(part.to(self.device)).cpu() for part in video.split(self.batch_size)])

    @torch.inference_mode()
    def measure(self, fake: Tensor) -> dict[str, float]:
        """{metric: value} of corrupted clips, in the order of METRICS."""
        features = self._features(fake)
        both = [FeatureStats.from_features(side) for side in (self.features, features)]
        found = {"fvd": frechet_distance(both[0], both[1], "N-1"), **feature_metrics(self.features, features),
                 "psnr": psnr(self.real, fake)}
        clips = {"ssim": ssim_frame(self.real, fake)}
        for name, distance in self.distances.items():
            pairs = zip(self.real.split(self.batch_size), fake.split(self.batch_size))
            clips[name] = torch.cat([distance(b.to(self.device), a.to(self.device)).cpu() for a, b in pairs])
        clips |= {
            "warping_error": warping_error(fake, self.flow), "warping_error_own": warping_error(fake),
            "flicker": flicker(fake), "frozen": frozen(fake),
            "seams_xy": seams(fake, (1, BLOCK, BLOCK), self.real)["seams_xy"],
        }
        if self.with_vmaf:
            clips["vmaf"] = vmaf(fake, self.real)
        found |= {name: values.double().nanmean().item() for name, values in clips.items()}
        return {name: found[name] for name in METRICS if name in found}


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; nan where one side is constant."""

    def ranks(side: Sequence[float]) -> np.ndarray:
        values = np.asarray(side, np.float64)
        return (values[:, None] > values).sum(1) + 0.5 * (values[:, None] == values).sum(1)

    x, y = (ranks(side) - ranks(side).mean() for side in (a, b))
    return float(x @ y / math.sqrt(x @ x * (y @ y))) if x.any() and y.any() else math.nan


def responses(rows: list[dict]) -> dict[str, dict[str, float]]:
    """{corruption: {metric: Spearman's rank correlation with the strength, from 0 (the clean clips) on}}."""
    clean, found = rows[0], {}
    for name in CORRUPTIONS:
        ladder = [clean, *(row for row in rows if row["corruption"] == name)]
        strengths = [row["strength"] for row in ladder]
        found[name] = {metric: spearman(strengths, [row[metric] for row in ladder]) for metric in METRICS
                       if metric in clean}
    return found


def card(real: Tensor, yardstick: Yardstick, seed: int = 0) -> list[dict[str, Any]]:
    """A row {"corruption", "strength", each metric} for the clean clips, each corruption and strength, and a last few
    for the blur that has the PSNR of each local warp."""
    planned = [(name, strength) for name, known in CORRUPTIONS.items() for strength in known.strengths]
    rows: list[dict[str, Any]] = [{"corruption": "none", "strength": 0.0, **yardstick.measure(real)}]
    for name, strength in Progress(planned, "corruptions"):
        fake = corrupt(real, name, strength, seed)
        rows.append({"corruption": name, "strength": float(strength), **yardstick.measure(fake)})
    for row in [row for row in rows if row["corruption"] == "local_warp"]:
        fake, sigma = blur_of_psnr(real, row["psnr"])
        rows.append({"corruption": f"blur like local_warp {row['strength']:g}", "strength": sigma,
                     **yardstick.measure(fake)})
    return rows


def shown(value: float | None) -> str:
    return "unavailable" if value is None else f"{value:.3g}" if math.isfinite(value) else str(value)


def markdown(rows: list[dict], ranks: dict[str, dict[str, float]], missing: dict[str, str]) -> str:
    """Both tables: the values, and the rank correlations."""
    metrics = [name for name in METRICS if name in rows[0] or name in missing]
    head = f"| corruption | strength | {' | '.join(metrics)} |"
    lines = [head, "|---" * (len(metrics) + 2) + "|"]
    for row in rows:
        values = [shown(row.get(name)) for name in metrics]
        lines.append(f"| {row['corruption']} | {row['strength']:.3g} | {' | '.join(values)} |")
    lines += ["", "Spearman's rank correlation of each metric with the strength (nan: no response at all):", "",
              head.replace(" strength |", ""), "|---" * (len(metrics) + 1) + "|"]
    for name, found in ranks.items():
        values = [f"{found[metric]:.2f}" if metric in found else "unavailable" for metric in metrics]
        lines.append(f"| {name} | {' | '.join(values)} |")
    lines += ["", *(f"- {name}: {reason}" for name, reason in (LEGEND | missing).items() if name in metrics)]
    return "\n".join(lines) + "\n"


def picture(path: Path, rows: list[dict], ranks: dict[str, dict[str, float]]) -> None:
    """Bars in a grid, corruptions by metrics: each strength's response as a share of the metric's largest one."""
    metrics = [name for name in METRICS if name in rows[0]]
    width, height, left, top = 86, 52, 110, 62
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    image = Image.new("RGB", (left + width * len(metrics) + 10, top + height * len(CORRUPTIONS) + 10), "white")
    draw = ImageDraw.Draw(image)
    for line, text in enumerate((
        "Distance of each metric from its value for clean clips, by rising strength; square root of the share of the "
        "metric's largest.",
        "Blue: it rises or falls with the strength (Spearman 0.9 or more). Orange: it does not.",
    )):
        draw.text((8, 6 + 16 * line), text, "black", font)

    def response(row: dict, metric: str) -> float:
        if metric == "psnr":  # the clean clips' is infinite: shown is the root of the squared error
            return 10 ** (-row["psnr"] / 20)
        return abs(row[metric] - rows[0][metric])

    for i, metric in enumerate(metrics):
        values = [response(row, metric) for row in rows if row["corruption"] in CORRUPTIONS]
        largest = max([value for value in values if math.isfinite(value)], default=0) or 1
        draw.text((left + width * (i + 0.5), top - 18), metric.replace("warping_error", "warping"), "black", small,
                  anchor="ma")
        for j, name in enumerate(CORRUPTIONS):
            bottom = top + height * (j + 1) - 4
            if i == 0:
                draw.text((left - 8, bottom - height / 2), name, "black", font, anchor="rm")
            ladder = [row for row in rows if row["corruption"] == name]
            colour = "#4878a8" if abs(ranks[name][metric]) >= 0.9 - 1e-9 else "#c08040"
            step = (width - 14) / len(ladder)
            for k, row in enumerate(ladder):
                value = response(row, metric)
                bar = (height - 8) * math.sqrt(value / largest) if math.isfinite(value) else 0
                x = left + width * i + 7 + step * k
                draw.rectangle((x, bottom - bar, x + step - 3, bottom), colour)
            draw.line((left + width * i + 4, bottom + 1, left + width * (i + 1) - 4, bottom + 1), "#999999")
    with atomic_write(path) as file:
        image.quantize(16).save(file, format="PNG", optimize=True)


# --- command line ---

def load_clips(args: argparse.Namespace) -> tuple[Tensor, list]:
    """(whole clips (N, 3, T, H, W), one of a video, videos drawn by the seed; all videos of the folder)."""
    if not Path(args.folder).is_dir():
        raise ValueError(f"{args.folder}: no such folder; give one of videos, such as data/demo.py makes")
    files = list_folder(args.folder)
    dataset = ClipDataset(files, args.num_frames, args.size, "coordtok", seed=args.seed, damaged="skip",
                          timeout=args.decode_timeout)
    frames = []
    for index in np.random.default_rng(args.seed).permutation(len(files)):
        sample = dataset[ClipKey(int(index), int(index))]
        if "error" not in sample and sample["n_frames"] == args.num_frames:
            frames.append(sample["frames"])
        if len(frames) == args.num_clips:
            break
    if len(frames) < MIN_CLIPS:
        raise ValueError(f"{args.folder}: {len(frames)} of its {len(files)} videos give a clip of {args.num_frames} "
                         f"frames, and the card needs {MIN_CLIPS}: give more videos, or lower --num_frames")
    return to_video(torch.stack(frames), args.size, "coordtok", "cpu"), files


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__.split("\n")[0], prog="python -m eval.sensitivity")
    add = parser.add_argument
    add("folder", help="folder of real videos")
    add("--output", default="results/sensitivity", help="folder of the table and the picture")
    add("--num_clips", type=int, default=32, help="clips, one of a video")
    add("--num_frames", type=int, default=16, help="frames of a clip")
    add("--size", type=int, default=128, help="height and width of the clips")
    add("--seed", type=int, default=0, help="draws clips and corruptions")
    add("--batch_size", type=int, default=8, help="clips at once in a network")
    add("--i3d_weights", help="file of I3D weights (default: the cache, or a download)")
    add("--lpips_weights", default="auto", metavar="auto|random|PATH", help="LPIPS's VGG16 backbone")
    add("--vmaf", action="store_true", help="measure VMAF too")
    add("--decode_timeout", type=float, default=TIMEOUT, help="seconds after which a file counts as damaged")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the networks run")
    args = parser.parse_args(argv)
    if args.num_frames < MIN_FRAMES:
        parser.error(f"--num_frames is {args.num_frames}: I3D needs {MIN_FRAMES} or more")
    if args.size % BLOCK or args.size < 32:
        parser.error(f"--size is {args.size}, expected a multiple of {BLOCK}, from 32 on")
    if args.num_clips < MIN_CLIPS:
        parser.error(f"--num_clips is {args.num_clips}, expected {MIN_CLIPS} or more")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.vmaf:
        check_vmaf()
    real, files = load_clips(args)
    device, folder = torch.device(args.device), Path(args.output)
    i3d = I3D.from_weights(args.i3d_weights).to(device)
    distances, missing = {}, {}
    for name, weights in (("lpips", args.lpips_weights), ("stlpips", "auto")):
        try:
            distances[name] = perceptual_metric(name, weights=weights).to(device)
        except WeightsError as error:
            missing[name] = f"unavailable: {error}"
    with torch.inference_mode():
        yardstick = Yardstick(real, i3d, distances, device, args.batch_size, args.vmaf)
    rows = card(real, yardstick, args.seed)
    ranks = responses(rows)
    record = {
        "description": "real clips against the same clips under graded corruptions", "folder": Path(args.folder).name,
        "num_videos": len(files), "manifest_sha256": manifest_sha256([file.path for file in files], args.folder),
        "num_clips": len(real), "num_frames": args.num_frames, "size": args.size, "resize": COORDTOK_RESIZE,
        "clip_start": "videos drawn without replacement, first frame uniform over the video, both from the seed",
        "seed": args.seed, "extractor_sha256": i3d.weights_sha256, "i3d_eps": i3d.eps, "i3d_resize": "square",
        "divisor": "N-1", **{name: distance.description for name, distance in distances.items()}, **missing,
        "corruptions": {name: f"{known.unit}: {(known.function.__doc__ or '').split(chr(10))[0]}"
                        for name, known in CORRUPTIONS.items()},
        "metrics": LEGEND, "feature_metrics": FEATURE_METRICS_RECORD, "motion_metrics": MOTION_RECORD,
        "git_revision": git_revision(),
    }
    text = markdown(rows, ranks, missing)
    write_record(folder / "sensitivity.json", nulls(record), {"rows": rows, "spearman": ranks})
    with atomic_write(folder / "sensitivity.md", "w") as file:
        file.write(text)
    picture(folder / "sensitivity.png", rows, ranks)
    print(text)
    print(f"{len(real)} clips; table and picture: {folder}/sensitivity.md, .json, .png")


if __name__ == "__main__":
    with one_line_errors():
        main()
