"""How well a tokenizer reconstructs: one row of numbers a clip, gathered, checked and summarised under a protocol.

Rows, not running sums, cross between processes: 10,000 clips are 32 MB, the result does not depend on batch size or on
the number of processes, and it can be checked that every clip was counted once.
"""
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.clips import ClipKey, Quarantine, VideoFile
from data.video import VideoError, probe, to_video
from eval import fvd
from eval.metrics import mse_clip, psnr_clip, psnr_frame, ssim_frame
from eval.protocols import Protocol

METRICS = ("mse", "psnr_clip", "psnr_frame", "ssim", "lpips", "psnr_mean_frame")


def protocol_clips(
    protocol: Protocol, files: Sequence[VideoFile], num_frames: int, num_clips: int | None, quarantine: Quarantine,
    timeout: float,
) -> tuple[list[VideoFile], list[ClipKey]]:
    """The videos and clips that a reconstruction protocol compares; see its `clip_start` and `short_videos`.

    num_clips: fewer or more than the protocol's; None: as many as it says. timeout: seconds for one video.
    """
    files = list(files)
    if protocol.short_videos == "discarded":
        with ThreadPoolExecutor(8) as pool:  # decoding runs outside the interpreter lock
            lengths = pool.map(lambda file: length(file, quarantine, timeout), files)
            lengths = list(tqdm(lengths, "lengths", len(files), False))
        files = [file for file, frames in zip(files, lengths) if frames >= num_frames]
        if not files:
            raise ValueError(f"no video has {num_frames} frames: {protocol.name} discards shorter ones")
        wanted = num_clips or protocol.num_real
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
    loader: Iterable[dict],
    device: torch.device,
    size: int,
    rule: str,
    i3d: nn.Module | None = None,
    i3d_resize: str = "square",
    perceptual: nn.Module | None = None,
    progress: str | None = None,
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Compare clips with their reconstructions.

    reconstruct: (B, 3, T, H, W) float [0, 1] and the clips' global indices -> the same, need not be clamped: it is
        here. What it draws for a clip should depend on the clip's index alone.
    loader: batches of data.clips.collate, whose `position` is that index.
    Returns ({index (n,), metric (n,), real and fake I3D logits (n, 400)}, the first batch's (input, reconstruction)
    pairs), on the CPU. psnr_mean_frame is of the clip's mean frame, which a useful tokenizer must beat.
    """
    rows, examples = [], []
    for batch in tqdm(loader, desc=progress, disable=progress is None):
        if not len(batch["position"]):
            continue  # all its clips were damaged
        video = to_video(batch["frames"], size, rule, device)
        output = reconstruct(video, batch["position"].tolist()).float().clamp(0, 1)
        row = {
            "index": batch["position"],
            "mse": mse_clip(video, output),
            "psnr_clip": psnr_clip(video, output),
            "psnr_frame": psnr_frame(video, output),
            "ssim": ssim_frame(video, output),
            "psnr_mean_frame": psnr_frame(video, video.mean(2, keepdim=True).expand_as(video)),
        }
        if perceptual is not None:
            row["lpips"] = perceptual(video, output)
        if i3d is not None:
            row["real"], row["fake"] = i3d(torch.cat([video, output]), resize=i3d_resize).chunk(2)
        if not rows:
            examples = list(zip(video.cpu(), output.cpu()))
        rows.append({name: value.cpu() for name, value in row.items()})
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]} if rows else {}, examples


def merge(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of all processes in the order of their clips. ValueError where a clip is there twice, or none is."""
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
    """Means of the metrics over clips, and rFVD with all that `eval.fvd.report` gives beside it. divisor: of the
    covariance, "N" or "N-1".

    Clips reconstructed without any error have an infinite PSNR; they are left out of its mean and counted beside it.
    """
    means = {"clips": len(rows["index"])}
    for name in METRICS:
        if name in rows:
            values = rows[name].double()
            finite = values[values.isfinite()]
            means[name] = finite.mean().item() if len(finite) else math.inf
            if len(finite) < len(values):
                means[f"{name}_infinite"] = len(values) - len(finite)
    if "real" in rows:
        for name, value in fvd.report(rows["real"], rows["fake"], divisor).items():
            means[f"r{name}" if name.startswith(("fvd", "kvd")) else name] = value
    return means
