"""Contact sheets, a few clips as rows of frames in one picture, and clips side by side as video."""
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from common.files import atomic_write
from data.video import write_video

MARGIN = 4
TEXT = 14  # height of a line of text
SMALLEST = 96  # frames less high than this are enlarged
OUTLINE = (1.0, 0.55, 0.0)  # of frames that a model was given


def strip_indices(length: int, num_frames: int) -> Tensor:
    """Indices, (n,) long, of `num_frames` evenly spaced frames of `length`, first and last among them; all of fewer."""
    return torch.linspace(0, length - 1, min(num_frames, length)).round().long()


def outline(video: Tensor, num_frames: int) -> Tensor:
    """A copy of a video (3, T, H, W), float in [0, 1], whose first `num_frames` frames have a border: the model that
    made the others was given them."""
    video = video.clone()
    given, width = video[:, :num_frames], max(2, min(video.shape[2:]) // 32)  # 2: mp4 halves the colours
    colour = torch.tensor(OUTLINE, dtype=video.dtype, device=video.device).view(3, 1, 1, 1)
    for side in (given[:, :, :width], given[:, :, -width:], given[..., :width], given[..., -width:]):
        side[:] = colour
    return video


def write_clips(folder: Path, clips: Sequence[Sequence[Tensor]], num_clips: int = 4) -> None:
    """Write folder/000000.mp4, ...: the videos of each of the first `num_clips` clips side by side, as (input,
    reconstruction). clips: as `contact_sheet` takes them. What was in the folder before is removed."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for i, clip in enumerate(clips[:num_clips]):
        write_video(folder / f"{i:06d}.mp4", torch.cat(list(clip), dim=3).clamp(0, 1))


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
    frames = video[:, strip_indices(video.shape[1], num_frames)]
    scale = -(-SMALLEST // frames.shape[2])
    frames = frames.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    frames = torch.nn.functional.pad(frames.detach().float().cpu().clamp(0, 1), (0, MARGIN), value=1)
    pixels = rearrange(frames, "c t h w -> h (t w) c")[:, :-MARGIN]
    return Image.fromarray((pixels * 255).round().byte().numpy())
