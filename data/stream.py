"""Videos of any length, frame by frame in constant memory: read, cut into windows over time, blended, and written."""
import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import imageio_ffmpeg
import numpy as np
import torch
from torch import Tensor

from common.console import print_main
from common.errors import shown
from data.video import VideoError

IN_MP4 = {"aac", "ac3", "alac", "dts", "eac3", "flac", "mp2", "mp3", "opus", "vorbis"}  # audio codecs
NTSC = [Fraction(1000 * rate, 1001) for rate in (24, 30, 48, 60, 120)]  # ffmpeg prints two decimals of a rate


class StreamInfo(NamedTuple):
    """What the header of a video file says."""

    fps: Fraction  # frames a second; of a variable rate that at which they are read
    constant: bool  # whether all frames last equally long
    seconds: float  # 0 where unknown
    audio: str | None  # codec of the first audio stream
    offset: float  # seconds from the first frame to the first sound; negative where the sound starts first
    sar: str  # width of a pixel over its height, upright: "1/1" where they are square, or nothing is said


def look(path: str | Path) -> StreamInfo:
    """Raises FileNotFoundError, and VideoError where ffmpeg finds no video in the file."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{shown(path)}: no such file")
    done = subprocess.run(_ffmpeg("-i", f"file:{path}", level="info"), capture_output=True, stdin=subprocess.DEVNULL)
    text = done.stderr.decode(errors="replace")
    video = re.search(r"Stream #.*?: Video: (?!.*\(attached pic\)).*", text)
    if not video:
        streams = ", ".join(re.findall(r"Stream #.*?: (\w+: \w+)", text))
        reason = f"it holds {streams}" if streams else text.strip().split("\n")[-1].strip()
        raise VideoError(f"{shown(path)}: ffmpeg finds no video in it ({reason})")
    rates = [re.search(rf"([\d.]+)(k?) {unit}\b", video[0]) for unit in ("fps", "tbr")]
    fps, base = (float(rate[1]) * (1000 if rate[2] else 1) if rate else None for rate in rates)
    fps, base = fps or base or 25.0, base or fps or 25.0
    constant = abs(fps - base) < 0.01 * base
    rate = base if constant or base <= 3 * fps else fps  # at its base rate no frame of a variable video is dropped
    exact = next((each for each in NTSC if abs(rate - each) < 0.006), Fraction(rate).limit_denominator(1000))
    length = re.search(r"Duration: (\d+):(\d+):([\d.]+)", text)
    seconds = int(length[1]) * 3600 + int(length[2]) * 60 + float(length[3]) if length else 0.0
    audio = re.search(r"Stream #.*?: Audio: (\w+)", text)
    begin, sar = _begin(path, "V")
    sound = _begin(path, "a")[0] if audio else None
    offset = 0.0 if begin is None or sound is None else sound - begin
    return StreamInfo(exact, constant, seconds, audio[1] if audio else None, offset, sar)


def _begin(path: str | Path, kind: str) -> tuple[float | None, str]:
    """When the first stream of a kind (V, a) begins, in seconds, None where unknown; and the shape of its pixels."""
    command = _ffmpeg("-copyts", "-i", f"file:{path}", "-map", f"0:{kind}:0", "-fps_mode", "passthrough",
                      "-enc_time_base", "1:1000000", "-frames", "1", "-f", "framecrc", "-")
    text = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).stdout.decode(errors="replace")
    first, sar = re.search(r"^0, *-?\d+, *(-?\d+)", text, re.MULTILINE), re.search(r"#sar 0: ([1-9]\d*/[1-9]\d*)", text)
    return int(first[1]) / 1e6 if first else None, sar[1] if sar else "1/1"


def read_stream(path: str | Path, info: StreamInfo) -> Iterator[Tensor]:
    """The frames of a file, upright, in order, (H, W, 3) uint8 each, all in one buffer: the next overwrites the last.
    Those of a variable rate are repeated or dropped to `info.fps`. Where the file is damaged they end with a message.
    Raises VideoError where there is none before that."""
    steady = [] if info.constant else ["-vf", f"fps={info.fps}"]
    command = _ffmpeg("-xerror", "-threads", "1", "-i", f"file:{path}", "-map", "0:V:0", *steady, "-fps_mode",
                      "passthrough", "-f", "image2pipe", "-c:v", "ppm", "-")
    count, buffer = 0, np.empty(0, np.uint8)
    with tempfile.TemporaryFile() as errors, subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
    ) as ffmpeg:
        pixels = cast(BufferedReader, ffmpeg.stdout)
        try:
            while header := pixels.readline():  # P6, width and height, 255: a line each
                width, height = map(int, pixels.readline().split())
                pixels.readline()
                if buffer.size != 3 * width * height:
                    buffer = np.empty(3 * width * height, np.uint8)
                if not header.startswith(b"P6") or pixels.readinto(buffer.data) < buffer.size:
                    break
                yield torch.from_numpy(buffer).view(height, width, 3)
                count += 1
            code = ffmpeg.wait()
        finally:
            ffmpeg.kill()
        errors.seek(0)
        reason = errors.read().decode(errors="replace").strip().split("\n")[0]
    if not count:
        raise VideoError(f"{shown(path)}: ffmpeg cannot decode it ({reason or 'no frames'})")
    missing = info.seconds - count / float(info.fps)
    if code or missing > max(1.0, 0.05 * info.seconds):
        reason = reason or f"{missing:.1f} s are missing"
        print_main(f"{shown(path)} is damaged after frame {count - 1} ({reason}): the rest is left out")


def extract_audio(path: str | Path, info: StreamInfo, target: str | Path) -> bool:
    """Write the first audio stream as it is (a codec that mp4 files do not hold, such as PCM, as AAC) to a Matroska
    file. Returns whether there is any."""
    if info.audio is None:
        return False
    codec = "copy" if info.audio in IN_MP4 else "aac"
    command = _ffmpeg("-y", "-i", f"file:{path}", "-map", "0:a:0", "-c:a", codec, "-f", "matroska", f"file:{target}")
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().split("\n")[0]
        print_main(f"{shown(path)}: its audio cannot be read ({reason}): it is left out")
    return not done.returncode


class StreamWriter:
    """Writes an mp4 (H.264) frame by frame; a context manager. The file appears under its name when the block ends
    without an error. Raises OSError.

    size: (H, W). sar: shape of the pixels. crf: of x264, 0 is lossless. audio: a file whose audio is copied, from
    `offset` seconds after the first frame to the end of the last; where that fails it is left out, with a message.
    """

    def __init__(self, path: str | Path, size: tuple[int, int], fps: Fraction, crf: int = 5,
                 audio: str | Path | None = None, offset: float = 0.0, sar: str = "1/1"):
        self.path, (height, width) = Path(path), size
        self.fps, self.audio, self.offset, self.count = fps, audio, offset, 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        absolute = self.path.absolute()
        self.part, self.whole = (absolute.with_name(f".{absolute.stem}.{os.getpid()}.{name}.mp4")
                                 for name in ("part", "whole"))
        self.command = _ffmpeg(
            "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-",
            "-vf", f"setsar={sar}", "-c:v", "libx264", "-crf", str(crf),
            "-pix_fmt", "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p", f"file:{self.part}", stdin=True,
        )

    def __enter__(self) -> "StreamWriter":
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self.ffmpeg = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                       stderr=self.errors, start_new_session=True)
        return self

    def write(self, frames: Tensor) -> None:
        """frames: (T, H, W, 3) uint8 on the CPU."""
        self.count += len(frames)
        with contextlib.suppress(BrokenPipeError):  # __exit__ says why
            cast(BinaryIO, self.ffmpeg.stdin).write(frames.contiguous().numpy().data)

    def __exit__(self, kind, *_) -> None:
        with contextlib.suppress(BrokenPipeError):
            cast(BinaryIO, self.ffmpeg.stdin).close()
        if kind is not None:
            self.ffmpeg.kill()
        code = self.ffmpeg.wait()
        self.errors.seek(0)
        reason = self.errors.read().decode(errors="replace").strip().split("\n")[0]
        self.errors.close()
        try:
            if kind is None and not code:
                os.replace(self.part if self.audio is None else self._with_sound(), self.path)
                return
        finally:
            self.part.unlink(missing_ok=True)
            self.whole.unlink(missing_ok=True)
        if kind is None:
            raise OSError(f"{self.path} cannot be written: {reason or f'ffmpeg ended with status {code}'}")

    def _with_sound(self) -> Path:
        """The file with the audio in it, or that without where there is none to add."""
        seconds = float(self.count / self.fps)
        if seconds <= self.offset:
            return self.part
        begin = ["-itsoffset", f"{self.offset:.6f}"] if self.offset > 0 else ["-ss", f"{-self.offset:.6f}"]
        done = subprocess.run(
            _ffmpeg("-y", "-i", f"file:{self.part}", *begin, "-i", f"file:{self.audio}", "-map", "0:v:0", "-map",
                    "1:a:0", "-c", "copy", "-t", f"{seconds:.6f}", f"file:{self.whole}"),
            capture_output=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip().split("\n")[0]
            print_main(f"{self.path}: the audio cannot be added ({reason}): it is left out")
        return self.part if done.returncode else self.whole


def _ffmpeg(*arguments: str, level: str = "error", stdin: bool = False) -> list[str]:
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", *([] if stdin else ["-nostdin"]), "-v", level, *arguments]


# --- windows over time, tiles over space ---
def starts(length: int, window: int, overlap: int) -> list[int]:
    """Where windows start that cover 0, ..., length - 1: each `overlap` into the one before, and the last further so
    that it ends at the end. One at 0 where the length is at most a window."""
    if length <= window:
        return [0]
    regular = list(range(0, length - window, window - overlap))
    return [*regular, length - window]


def windows(frames: Iterable[Tensor], window: int, overlap: int) -> Iterator[tuple[int, Tensor]]:
    """(start, frames (T, H, W, 3)) of the windows of `starts`, while the frames come; the latest `window` are kept."""
    ring, count, start, done = torch.empty(0), 0, 0, 0  # frame i is in place i % window

    def latest() -> Tensor:
        return ring[:count].clone() if count < window else ring.roll(-(count % window), 0)

    for frame in frames:
        if not count:
            ring = frame.new_empty(window, *frame.shape)
        ring[count % window] = frame
        count += 1
        if count == start + window:
            yield start, latest()
            start, done = start + window - overlap, count
    if count > done:
        yield max(count - window, 0), latest()


def blend(clips: Iterable[tuple[int, Tensor]], overlap: int) -> Iterator[Tensor]:
    """Clips (C, T, H, W) and their starts, in order, as one video: (C, t, H, W) pieces of it. Over the last `overlap`
    frames of a clip the next one fades in; all others are unchanged, bit for bit."""
    kept, origin = None, 0
    for start, clip in clips:
        if kept is not None:
            end = origin + kept.shape[1]
            common = min(overlap, end - start)
            yield kept[:, : kept.shape[1] - common]
            share = fade(common).view(-1, 1, 1).to(clip)
            before, after = kept[:, kept.shape[1] - common :], clip[:, end - common - start : end - start]
            clip, start = torch.cat([before + share * (after - before), clip[:, end - start :]], dim=1), end - common
        kept, origin = clip, start
    if kept is not None:
        yield kept


def fade(length: int) -> Tensor:
    """(length,) shares of what fades in, evenly spaced between 0 and 1, neither included."""
    return torch.arange(1, length + 1) / (length + 1)


def join_tiles(tiles: Tensor, tops: list[int], lefts: list[int], overlap: int) -> Tensor:
    """tiles: (rows * columns, C, T, h, w) in row order, at `tops` and `lefts`. Returns (C, T, H, W), faded as `blend`
    does in time."""
    rows = tiles.unflatten(0, (len(tops), len(lefts)))

    def joined(parts: Iterable[Tensor], places: list[int], dim: int) -> Tensor:
        moved = ((place, part.movedim(dim, 1)) for place, part in zip(places, parts))  # (C, size, T, other)
        return torch.cat(list(blend(moved, overlap)), dim=1).movedim(1, dim)

    return joined((joined(row, lefts, 3) for row in rows), tops, 2)
