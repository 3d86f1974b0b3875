"""Contact sheets: a few clips as rows of frames in one picture."""
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from common.files import atomic_write

MARGIN = 4
TEXT = 14  # height of a line of text
SMALLEST = 96  # frames less high than this are enlarged


def contact_sheet(
    path: str | Path,
    clips: Sequence[Sequence[Tensor]],
    captions: Sequence[str] | None = None,
    labels: Sequence[str] = ("input", "reconstruction"),
    num_clips: int = 4,
    num_frames: int = 8,
) -> None:
    """Write a PNG of the first `num_clips` clips, each as `num_frames` evenly spaced frames.

    clips: each a tuple of videos (3, T, H, W), float, clamped to [0, 1], of one shape, drawn one below the other:
        (input, reconstruction), or (sample,) alone.
    captions: a line above each clip, as its class or PSNR. labels: names of a tuple's videos, beside their rows.
    """
    clips = list(clips[:num_clips])
    captions = [f"clip {i}" for i in range(len(clips))] if captions is None else captions
    if not clips:
        raise ValueError("a contact sheet needs at least one clip")
    shapes = {tuple(video.shape) for clip in clips for video in clip}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4:
        raise ValueError(f"a contact sheet needs videos (3, T, H, W) of one shape, got {sorted(shapes)}")
    labels = labels[: len(clips[0])] if len(clips[0]) > 1 else [""]

    rows = [_strip(video, num_frames) for clip in clips for video in clip]
    draw = ImageDraw.Draw(rows[0])
    left = max(int(draw.textlength(label)) for label in labels) + 2 * MARGIN
    height = rows[0].height + MARGIN
    clip_height = TEXT + len(clips[0]) * height
    sheet = Image.new("RGB", (left + rows[0].width + MARGIN, len(clips) * clip_height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        clip, place = divmod(i, len(clips[0]))
        top = MARGIN + clip * clip_height
        if place == 0:
            draw.text((left, top - 1), captions[clip], fill="black")
        top += TEXT + place * height
        draw.text((MARGIN, top + row.height // 2 - TEXT // 2), labels[place], fill="black")
        sheet.paste(row, (left, top))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        sheet.save(file, format="PNG")


def _strip(video: Tensor, num_frames: int) -> Image.Image:
    """Evenly spaced frames of a video (3, T, H, W), first and last among them, side by side; all of a shorter one."""
    num_frames = min(num_frames, video.shape[1])
    frames = video[:, torch.linspace(0, video.shape[1] - 1, num_frames).round().long()]
    scale = -(-SMALLEST // frames.shape[2])
    frames = frames.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    frames = torch.nn.functional.pad(frames.detach().float().cpu().clamp(0, 1), (0, MARGIN), value=1)
    pixels = rearrange(frames, "c t h w -> h (t w) c")[:, :-MARGIN]
    return Image.fromarray((pixels * 255).round().byte().numpy())
