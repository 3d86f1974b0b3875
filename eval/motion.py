"""Metrics of how clips move: warping error, flicker, frozen frames, seams of blocks, and VMAF. No network is needed.

Every metric is a pure function of clips (B, 3, T, H, W), float, clamped to [0, 1], and returns one value a clip,
(B,) float64 on the CPU, which does not depend on the other clips of the batch. Where a reconstruction is measured,
`reference` is its input. Motion itself flickers and warps: read a number beside that of the real clips (`*_real`).
"""
import json
import math
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.video import to_bytes

# For the protocol record: how each number of `motion_metrics` is defined.
MOTION_RECORD = {
    "warping_error": "mean squared difference of a frame and the next one warped onto it, where the optical flow of "
    "both directions agrees (arXiv 1808.00449, without its mask of motion boundaries); flow by OpenCV's DIS, preset "
    "medium, of the input for a reconstruction and of the clip itself for a sample",
    "flicker": "mean absolute second difference in time",
    "frozen": "share of frames after the first that differ from the one before by less than half a grey level on "
    "average",
    "seams_t, seams_xy": "of a reconstruction: mean absolute error of the frames, of the pixels, on a block's border, "
    "over that inside the blocks; of a sample: likewise of the absolute difference of neighbours across a border and "
    "inside; 1 where there are no seams",
    "vmaf": "libvmaf, vmaf_v0.6.1, mean over frames; it was trained on frames of 1080 lines: a relative figure here",
    "clips": "motion_clips of them, evenly spaced; *_real: the same of the real clips",
}
METRICS = ("warping_error", "flicker", "frozen", "seams_t", "seams_xy", "vmaf")
NAMES = (*METRICS, *(f"{name}_real" for name in METRICS))  # of all that is reported
SMALLEST = 16  # height and width that DIS takes
HALF_LEVEL = 0.5 / 255


class Flow(NamedTuple):
    """Motion from each frame to the next.

    vectors: (B, T - 1, 2, H, W) float32, pixels to the right and down, on the grid of the earlier frame.
    visible: (B, T - 1, H, W) bool, False where the next frame does not show the pixel again.
    """

    vectors: Tensor
    visible: Tensor


def optical_flow(video: Tensor) -> Flow:
    """The optical flow of clips by OpenCV's DIS (Kroeger et al. 2016, arXiv 1603.03590), on the CPU.

    video: (B, 3, T, H, W) float [0, 1], H and W from 16 on. A pixel counts as visible where it stays in the frame and
    the flow back agrees: |f + b|^2 <= 0.01 (|f|^2 + |b|^2) + 0.5, b taken at its target (Sundaram et al. 2010).
    """
    _check(video)
    if min(video.shape[-2:]) < SMALLEST:
        raise ValueError(f"optical flow needs frames of at least {SMALLEST}x{SMALLEST} pixels, got "
                         f"{video.shape[-1]}x{video.shape[-2]}: give --motion 0")
    luma = torch.einsum("bcthw,c->bthw", _clamped(video), torch.tensor([0.299, 0.587, 0.114]))
    grey = (luma * 255).round().byte().numpy()
    dis: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    num_clips, num_frames, height, width = grey.shape
    found = np.zeros((2, num_clips, max(num_frames - 1, 0), height, width, 2), np.float32)
    for clip in range(num_clips):
        for t in range(num_frames - 1):
            found[0, clip, t] = dis.calc(grey[clip, t], grey[clip, t + 1], None)
            found[1, clip, t] = dis.calc(grey[clip, t + 1], grey[clip, t], None)
    forward, backward = torch.from_numpy(found).permute(0, 1, 2, 5, 3, 4)
    back, inside = _warp(backward, forward)
    mismatch = (forward + back).square().sum(2)
    limit = 0.01 * (forward.square().sum(2) + back.square().sum(2)) + 0.5
    return Flow(forward, inside & (mismatch <= limit))


def _warp(images: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(images (B, T, C, H, W) at the targets of vectors (B, T, 2, H, W), bilinear; whether those are in the frame)."""
    height, width = vectors.shape[-2:]
    x = torch.arange(width) + vectors[:, :, 0]
    y = torch.arange(height)[:, None] + vectors[:, :, 1]
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    if not images.shape[0] * images.shape[1]:
        return images, inside
    warped = F.grid_sample(images.flatten(0, 1), grid.flatten(0, 1), padding_mode="border", align_corners=True)
    return warped.view(images.shape), inside


def warping_error(video: Tensor, flow: Flow | None = None) -> Tensor:
    """Mean squared difference of each frame and the next one, warped back onto it, over the visible pixels of a clip.

    flow: of `video` itself where it is None; of the input, for a reconstruction. Returns (B,) in [0, 1], 0 where every
    pixel follows the flow; nan where no pixel is visible in two frames. Source: "Learning blind video temporal
    consistency" (arXiv 1808.00449). Blur and a constant tint move with the picture, so that it does not see them.
    """
    _check(video)
    flow = optical_flow(video) if flow is None else flow
    frames = _clamped(video).transpose(1, 2)  # (B, T, 3, H, W)
    warped, _ = _warp(frames[:, 1:], flow.vectors)
    errors = (frames[:, :-1] - warped).double().square().mean(2) * flow.visible
    return errors.sum((1, 2, 3)) / flow.visible.sum((1, 2, 3))


def flicker(video: Tensor) -> Tensor:
    """Mean absolute second difference in time, |x[t-1] - 2 x[t] + x[t+1]|: (B,) in [0, 2], 0 for brightness that
    changes evenly; nan for fewer than three frames."""
    _check(video)
    return _clamped(video).double().diff(n=2, dim=2).abs().mean((1, 2, 3, 4))


def frozen(video: Tensor) -> Tensor:
    """Share of the frames after the first that repeat the one before: the mean absolute difference is below half a
    grey level of 255. (B,) in [0, 1]; nan for a single frame."""
    _check(video)
    steps = _clamped(video).double().diff(dim=2).abs().mean((1, 3, 4))
    return (steps < HALF_LEVEL).double().mean(1)


def seams(video: Tensor, patch: Sequence[int], reference: Tensor | None = None) -> dict[str, Tensor]:
    """How much worse a clip is on the borders of its blocks than inside them: {"seams_t": (B,), "seams_xy": (B,)},
    each 0 or more, 1 where borders are like the inside.

    patch: (t, h, w) of a block. With a reference: the mean absolute error of the frames (t) or pixels (xy) on a
    border, over that of those inside; the clip's own first and last frame and outermost pixels count as neither.
    Without: the mean absolute difference of neighbours across a border, over that inside (blockiness, Wang et al.
    2000). Directions without two blocks, or without an inside, are left out.
    """
    _check(video, reference)
    t, h, w = patch
    clip = _clamped(video).double()
    found = {}
    if reference is not None:
        values = (clip - _clamped(reference).double()).abs()

    def border(length: int, size: int) -> Tensor:
        """Which positions lie on a border between two blocks."""
        place = torch.arange(length)
        return ((place % size == 0) | (place % size == size - 1)) & (place > 0) & (place < length - 1)

    def steps(dim: int, size: int) -> tuple[Tensor, Tensor]:
        """Absolute differences (B, n) of neighbours, and which of them (n,) are across a border."""
        jumps = clip.diff(dim=dim).abs().transpose(1, dim).flatten(2).mean(2)
        return jumps, (torch.arange(jumps.shape[1]) + 1) % size == 0

    if 3 <= t < clip.shape[2] or (reference is None and 2 <= t < clip.shape[2]):
        if reference is None:
            jumps, across = steps(2, t)
            found["seams_t"] = _ratio(jumps[:, across], jumps[:, ~across])
        else:
            errors, on = values.mean((1, 3, 4))[:, 1:-1], border(clip.shape[2], t)[1:-1]
            found["seams_t"] = _ratio(errors[:, on], errors[:, ~on])
    if min(h, w) >= 3 and h < clip.shape[3] and w < clip.shape[4]:
        if reference is None:
            both = [steps(3, h), steps(4, w)]
            found["seams_xy"] = _ratio(torch.cat([jumps[:, across] for jumps, across in both], 1),
                                       torch.cat([jumps[:, ~across] for jumps, across in both], 1))
        else:
            on = (border(clip.shape[3], h)[:, None] | border(clip.shape[4], w))[1:-1, 1:-1].flatten()
            errors = values.mean((1, 2))[:, 1:-1, 1:-1].flatten(1)
            found["seams_xy"] = _ratio(errors[:, on], errors[:, ~on])
    return found


def _ratio(border: Tensor, inside: Tensor) -> Tensor:
    return (border.mean(1) + 1e-6) / (inside.mean(1) + 1e-6)


def motion_metrics(
    video: Tensor, reference: Tensor | None = None, patch: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """All metrics of this module but VMAF, {name: (B,) float64}, as MOTION_RECORD defines them.

    video: samples or, where their input is given as `reference`, reconstructions, (B, 3, T, H, W) float [0, 1].
    patch: (t, h, w) of the blocks that the clips are made of, for the seams. With a reference, NAME_real is its own.
    """
    _check(video, reference)
    flow = optical_flow(video if reference is None else reference)
    metrics = {"warping_error": warping_error(video, flow), "flicker": flicker(video), "frozen": frozen(video)}
    if patch is not None:
        metrics |= seams(video, patch, reference)
    if reference is not None:
        metrics |= {"warping_error_real": warping_error(reference, flow), "flicker_real": flicker(reference),
                    "frozen_real": frozen(reference)}
    return metrics


# --- some of many clips ---

def evenly_spaced_clips(total: int, count: int) -> set[int]:
    """The indices of `count` of `total` clips. Lists are sorted by class: the first ones would be of one class."""
    count = min(count, total)
    return {i * total // count for i in range(count)}


def motion_rows(
    video: Tensor, chosen: Iterable[bool], reference: Tensor | None = None, patch: Sequence[int] | None = None,
    with_vmaf: bool = False,
) -> dict[str, Tensor]:
    """`motion_metrics` of the chosen clips of a batch, and nan for the others: {name: (B,) float64}."""
    places = torch.tensor(list(chosen), dtype=torch.bool).nonzero().flatten()
    some = video[places.to(video.device)]
    real = None if reference is None else reference[places.to(reference.device)]
    found = motion_metrics(some, real, patch)
    if with_vmaf:
        assert real is not None, "VMAF compares clips with a reference"
        found["vmaf"] = vmaf(some, real)
    rows = {}
    for name, values in found.items():
        rows[name] = torch.full((len(video),), math.nan, dtype=torch.float64)
        rows[name][places] = values
    return rows


def motion_summary(rows: dict[str, Tensor]) -> dict[str, float]:
    """The means over the clips that were measured, in rows of all clips, and how many they are (`motion_clips`)."""
    means = {name: rows[name].double().nanmean().item() for name in NAMES if name in rows}
    measured = rows.get("frozen", torch.empty(0)).isfinite().sum().item()
    return {**means, "motion_clips": measured} if measured else {}


# --- VMAF ---

def check_vmaf() -> None:
    """ValueError where the ffmpeg of imageio-ffmpeg has no libvmaf."""
    listed = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-filters"], capture_output=True,
                            text=True, stdin=subprocess.DEVNULL).stdout
    if " libvmaf " not in listed:
        raise ValueError(f"the ffmpeg of imageio-ffmpeg {imageio_ffmpeg.__version__} has no libvmaf, which VMAF needs: "
                         "install imageio-ffmpeg 0.6 or newer, or leave --vmaf out")


def vmaf(video: Tensor, reference: Tensor) -> Tensor:
    """VMAF (Netflix, vmaf_v0.6.1) of reconstructions, the mean over frames: (B,) in [0, 100], 100 for the best.

    It was trained on frames of 1080 lines: at other sizes its values may be compared with one another alone.
    Raises ValueError where ffmpeg has no libvmaf (`check_vmaf`) or fails.
    """
    _check(video, reference)
    check_vmaf()
    height, width = video.shape[-2:]
    raw = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r 25".split()
    scores = []
    for pair in zip(to_bytes(_clamped(video)), to_bytes(_clamped(reference))):
        with tempfile.TemporaryDirectory() as folder:
            for name, clip in zip(("video", "reference"), pair):
                Path(folder, name).write_bytes(clip.permute(1, 2, 3, 0).contiguous().numpy().tobytes())
            done = subprocess.run(
                [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *raw, "-i", "video", *raw, "-i", "reference", "-lavfi",
                 "[0]format=yuv444p[a];[1]format=yuv444p[b];[a][b]libvmaf=log_fmt=json:log_path=log", "-f", "null",
                 "-"], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            )
            if done.returncode:
                raise ValueError(f"ffmpeg could not compute VMAF: {done.stderr.strip().splitlines()[-1:]}")
            scores.append(json.loads(Path(folder, "log").read_text())["pooled_metrics"]["vmaf"]["mean"])
    return torch.tensor(scores, dtype=torch.float64)


def _clamped(video: Tensor) -> Tensor:
    return video.detach().to("cpu", torch.float32).clamp(0, 1)


def _check(video: Tensor, reference: Tensor | None = None) -> None:
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"expected clips (B, 3, T, H, W), got {tuple(video.shape)}")
    if reference is not None and reference.shape != video.shape:
        raise ValueError(f"expected a reference of the clips' shape {tuple(video.shape)}, got "
                         f"{tuple(reference.shape)}")
