"""How well a tokenizer reconstructs: one row of numbers for each clip, gathered, checked and averaged.

Processes exchange rows, not running sums. 10,000 clips are 32 MB, the result does not depend on the batch size or the
number of processes, and every clip is checked to be counted once.
"""
import math
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from common.console import Progress
from data.clips import ClipKey, Quarantine
from data.lists import VideoFile
from data.loader import Loader
from data.video import VideoError, probe
from eval.fvd import fvd_scores
from eval.metrics import mse_clip, psnr_clip, psnr_frame, ssim_frame
from eval.motion import motion_rows, motion_summary
from eval.protocols import Protocol
from models.lpips import FrameDistance


def psnr_mean_frame(video: Tensor, output: Tensor) -> Tensor:
    """The PSNR of the clip's mean frame, which a useful tokenizer must beat: (B,)."""
    return psnr_frame(video, video.mean(2, keepdim=True).expand_as(video))


# What is measured of every clip: name: function of (video, reconstruction), (B, 3, T, H, W) float [0, 1] both, to (B,).
CLIP_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse_clip,
    "psnr_clip": psnr_clip,
    "psnr_frame": psnr_frame,
    "ssim": ssim_frame,
    "psnr_mean_frame": psnr_mean_frame,
}


def protocol_clips(
    protocol: Protocol, files: Sequence[VideoFile], num_frames: int, num_clips: int | None, quarantine: Quarantine,
    timeout: float,
) -> tuple[list[VideoFile], list[ClipKey]]:
    """The videos and clips that a reconstruction protocol compares; see its `clip_start` and `short_videos`.

    num_clips: their number; None: the protocol's. timeout: seconds for one video.
    """
    files = list(files)
    if protocol.short_videos == "discarded":
        with ThreadPoolExecutor(8) as pool:  # decoding runs outside the interpreter lock
            found = pool.map(lambda file: length(file, quarantine, timeout), files)
            lengths = list(Progress(found, "lengths", len(files)))
        files = [file for file, frames in zip(files, lengths) if frames >= num_frames]
        if not files:
            raise ValueError(f"no video has {num_frames} frames: {protocol.name} discards shorter ones")
        wanted = num_clips or protocol.num_real or len(files)
        return files, [ClipKey(i, i % len(files)) for i in range(wanted)]
    wanted = min(num_clips or len(files), len(files))
    return files, [ClipKey(i, i * len(files) // wanted) for i in range(wanted)]


def length(file: VideoFile, quarantine: Quarantine, timeout: float) -> int:
    """Frames of a video; 0 for one that cannot be decoded in `timeout` seconds, which is put in quarantine."""
    try:
        return probe(file.path, timeout).num_frames
    except VideoError as error:
        quarantine.add_error(file.path, error)
        return 0


@torch.inference_mode()
def reconstruct_rows(
    reconstruct: Callable[[Tensor, list[int]], Tensor],
    loader: Loader,
    device: torch.device,
    i3d: nn.Module | None = None,
    i3d_resize: str = "square",
    perceptual: FrameDistance | None = None,
    progress: str | None = None,
    motion_of: Container[int] = (),
    patch: Sequence[int] | None = None,
    vmaf: bool = False,
    known: dict[int, Tensor] | None = None,
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Compare clips with their reconstructions.

    reconstruct: (B, 3, T, H, W) float [0, 1] and the clips' global indices -> reconstructions of that shape, which are
        clamped here. Random numbers for a clip should depend on its index alone.
    loader: batches of clips (data.loader.make_loader) whose `position` is that index.
    motion_of: indices of the clips whose motion is measured (`eval.motion`), since optical flow is slow. patch:
        (t, h, w) of the tokenizer's blocks. vmaf: measure those clips' VMAF too.
    known: logits of real clips by index, used and added to: several tokenizers need them once.
    Returns ({index (n,), metric (n,), real and fake I3D logits (n, 400)}, the first batch's (input, reconstruction)
    pairs), on the CPU.
    """
    rows: list[dict[str, Tensor]] = []
    examples: list[tuple[Tensor, Tensor]] = []
    for batch in Progress(loader, desc=progress, disable=progress is None):
        if not len(batch["position"]):
            continue  # all its clips were damaged
        video = loader.dataset.to_video(batch, device)
        output = reconstruct(video, batch["position"].tolist()).float().clamp(0, 1)
        row = {"index": batch["position"]}
        row |= {name: metric(video, output) for name, metric in CLIP_METRICS.items()}
        if perceptual is not None:
            row[perceptual.name] = perceptual(video, output)
        if i3d is not None:
            indices = batch["position"].tolist()
            if known and all(index in known for index in indices):
                row["real"], row["fake"] = torch.stack([known[i] for i in indices]), i3d(output, resize=i3d_resize)
            else:
                row["real"], row["fake"] = i3d(torch.cat([video, output]), resize=i3d_resize).chunk(2)
            if known is not None:
                known |= zip(indices, row["real"].cpu())
        if motion_of:
            chosen = [index in motion_of for index in batch["position"].tolist()]
            row |= motion_rows(output, chosen, video, patch, vmaf)
        if not rows:
            examples = list(zip(video.cpu(), output.cpu()))
        rows.append({name: value.cpu() for name, value in row.items()})
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]} if rows else {}, examples


def merge(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of all processes in the order of their clips. ValueError where a clip occurs twice, or there is none."""
    parts = [part for part in parts if part]
    if not parts:
        raise ValueError("no clip could be evaluated: all are damaged (see the quarantine list)")
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = rows["index"].argsort()
    rows = {name: value[order] for name, value in rows.items()}
    if (rows["index"].diff() == 0).any():
        raise ValueError("a clip was counted twice: the shards overlap")
    return rows


def summary(rows: dict[str, Tensor], divisor: str) -> dict[str, float]:
    """Means of the metrics over clips, and rFVD with the other results of `eval.fvd.fvd_scores`. divisor: of the
    covariance, "N" or "N-1".

    A clip without any error has an infinite PSNR. Such clips are left out of the mean and counted as NAME_infinite.
    """
    means: dict[str, float] = {"clips": len(rows["index"])}
    for name in ("bits_per_pixel", *CLIP_METRICS, "lpips", "stlpips"):
        if name in rows:
            values = rows[name].double()
            finite = values[values.isfinite()]
            means[name] = finite.mean().item() if len(finite) else math.inf
            if len(finite) < len(values):
                means[f"{name}_infinite"] = len(values) - len(finite)
    means |= motion_summary(rows)
    if "real" in rows:
        for name, value in fvd_scores(rows["real"], rows["fake"], divisor).items():
            means[f"r{name}" if name.startswith(("fvd", "kvd")) else name] = value
    return means
