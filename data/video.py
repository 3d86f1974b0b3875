"""Video files to tensors: decode, resize, crop, write.

decord decodes, with its faults worked around: every file is read from its first frame, GIF is read by Pillow and the
files that decord refuses by ffmpeg, damaged frames are errors, and a decoder that hangs is abandoned after a time
limit.
"""
import errno
import logging
import os
import re
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # the built-in one from Python 3.11 on
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import decord
import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageSequence
from torch import Tensor

from common.errors import MendableError, shown
from common.files import of_system

TIMEOUT = 60.0  # seconds for one file: ten seconds of 1080p take two on a busy core
PATIENCE = 60.0  # seconds for which reading a file is retried while the system refuses it
NULL = "null:"  # prefix of the paths of random clips, which have no files: for trying a training loop
NULL_SHAPE = (256, 128, 128, 3)
QUICKTIME = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # first atoms of an mp4 or mov file
CHUNK = 2**26  # values resized at a time: 256 MiB in floating point

# decord raises the first four, Pillow and the file system the others.
DECODER_ERRORS = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError, OSError, EOFError)

# decord's errors for good files that it refuses: files of a codec that it lacks (AV1), and videos less than 94 pixels
# wide, whose padded lines it takes for lines of four channels.
LACKS_CODEC, PADDED_LINES = "cannot find video stream", "from_size == to_size"

decord.logging.set_level(decord.logging.QUIET)
log = logging.getLogger(__name__)


class VideoError(MendableError):
    """A video that cannot be read; its text is one line, "PATH: reason"."""


class FrameError(VideoError):
    """A video that opens, but these frames cannot be decoded, or are missing though its index lists them. Other frames
    may be good."""


class StorageError(OSError):
    """The system cannot read a file: a disk is missing or busy, or permission, memory or descriptors are lacking. It
    does not mean that the video is damaged."""


class VideoInfo(NamedTuple):
    """num_frames: packets in the file, whatever its header says, without those that an edit list hides. height, width:
    after rotation."""

    num_frames: int
    height: int
    width: int
    fps: float


class _Source(NamedTuple):
    num_frames: int
    fps: float
    read: Callable[[np.ndarray], Tensor]


def probe(path: str, timeout: float = TIMEOUT) -> VideoInfo:
    """Length and size of a video. Decodes its first frame. Raises VideoError, or StorageError."""

    def look() -> VideoInfo:
        source = _open(path)
        height, width = _frames(path, source, np.zeros(1, np.int64)).shape[1:3]
        return VideoInfo(source.num_frames, height, width, source.fps)

    return _bounded(look, path, timeout)


def read_frames(path: str, indices: Sequence[int], timeout: float = TIMEOUT) -> Tensor:
    """The frames at `indices`: (T, H, W, 3) uint8 RGB, upright. Raises VideoError, or StorageError."""
    return read_chosen(path, lambda num_frames: indices, timeout)[0]


def read_chosen(
    path: str, choose: Callable[[int], Sequence[int] | np.ndarray], timeout: float = TIMEOUT
) -> tuple[Tensor, np.ndarray]:
    """`read_frames` of indices `choose(num_frames)`, opening the file once. Returns the frames and their indices."""

    def read() -> tuple[Tensor, np.ndarray]:
        source = _open(path)
        indices = np.asarray(choose(source.num_frames), dtype=np.int64)
        if not len(indices) or indices.min() < 0 or indices.max() >= source.num_frames:
            raise FrameError(f"{path}: it has {source.num_frames} frames, not those asked for")
        return _frames(path, source, indices), indices

    return _bounded(read, path, timeout)


def _frames(path: str, source: _Source, indices: np.ndarray) -> Tensor:
    try:
        return source.read(indices)
    except DECODER_ERRORS as error:
        if of_system(error):
            raise
        raise FrameError(f"{path}: {_reason(error)}") from None


def file_size(path: str) -> int:
    """Size in bytes. Raises VideoError where there is no such file, StorageError where the system cannot tell."""
    return persist(lambda: os.path.getsize(path), path)


def persist(function: Callable, path: str):
    """Return function(), retried for PATIENCE seconds while it raises errors of the system; then StorageError.

    A file that is missing from an existing folder is a VideoError.
    """
    start, wait = None, 0.5
    while True:
        try:
            return function()
        except Exception as error:
            if not of_system(error):
                raise
            if isinstance(error, FileNotFoundError) and _is_missing(path):
                raise VideoError(f"{path}: {_reason(error)}") from None
            if start is None:
                start = time.monotonic()
                log.warning("%s: %s; trying again for %g s", path, _reason(error), PATIENCE)
            if time.monotonic() - start >= PATIENCE:
                raise StorageError(f"{path} cannot be read: {_reason(error)}, for {PATIENCE:g} s. It does not count as "
                                   "damaged: check the disk, permissions, limits and memory, and run again") from None
        time.sleep(wait)
        wait = min(2 * wait, 8)


def _is_missing(path: str) -> bool:
    """Whether the file is missing from a folder that holds others. An empty folder may be that of an unmounted disk."""
    try:
        with os.scandir(os.path.dirname(os.path.realpath(path))) as others:
            return any(others) and not os.path.exists(path)
    except OSError:
        return False


def _bounded(function: Callable, path: str, timeout: float):
    """Return function(), run within `timeout` seconds. After a failure the whole file is read: if that succeeds and the
    function fails again, the video is damaged (VideoError); if not, the storage is at fault (StorageError)."""

    def attempt():
        try:
            return _limited(function, path, timeout)
        except VideoError:
            if not path.startswith(NULL) and os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
                raise  # a pipe cannot be read twice
        try:
            _limited(lambda: _read_through(path), path, timeout)
        except VideoError:
            raise TimeoutError(errno.ETIMEDOUT, f"it was not read in {timeout:g} s") from None
        return _limited(function, path, timeout)

    return persist(attempt, path)


def _read_through(path: str) -> None:
    """Read a whole file. Raises OSError where a part of it cannot be read."""
    if not path.startswith(NULL):
        with open(path, "rb") as file:
            while file.read(2**20):
                pass


def _limited(function: Callable, path: str, timeout: float):
    """Return function(), run in its own thread and abandoned after `timeout` seconds. Its errors become VideoError,
    except those of the system.

    decord releases the interpreter lock, so the caller can go on when decord hangs, and a daemon thread does not keep
    the process from ending.
    """
    future: Future = Future()

    def work(future: Future) -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # result() raises it again
            future.set_exception(error)
        finally:
            del future  # see below

    Thread(target=work, args=(future,), daemon=True, name=f"decode {path}").start()
    try:
        return future.result(timeout)
    except VideoError as error:
        if path.isprintable():
            raise
        raise type(error)(str(error).replace(path, shown(path))) from None
    except FutureTimeout:
        if future.done():  # function() itself raised it
            raise
        raise VideoError(f"{shown(path)}: the decoder was still busy after {timeout:g} s") from None
    except DECODER_ERRORS as error:
        if of_system(error):
            raise
        raise VideoError(f"{shown(path)}: {_reason(error)}") from None
    finally:
        # Breaks a reference cycle of the error and its frame, which would keep the decoder alive. In a loader worker
        # forked meanwhile, the decoder has lost its threads, and hangs or crashes the process when it is freed.
        del future


def _reason(error: Exception) -> str:
    """The reason as one line. decord's text has several, each with a time and a place in its source."""
    text = getattr(error, "strerror", None) or re.sub(r"\[[\d:]+\] \S+?:\d+: ", "", str(error))
    return shown(text.strip().split("\n")[0]) or type(error).__name__


def _open(path: str) -> _Source:
    if path.startswith(NULL):
        return _Source(NULL_SHAPE[0], 25.0, lambda indices: _random_frames(int(path[len(NULL):]), indices))
    with open(path, "rb") as file:
        head = file.read(12)
    if not head:
        raise VideoError(f"{path}: the file is empty")
    if head.startswith(b"GIF8"):
        return _open_gif(path)
    # decord replaces frames that it cannot decode by their neighbours, up to a tolerance; beyond it raises. In AVI one
    # is tolerated, as an XviD stream with packed B-frames ends on an empty packet. A tolerance below 1 allows none.
    quicktime = head[4:8] in QUICKTIME
    try:
        reader = _open_decord(path, num_threads=1, fault_tol=1e-9 if quicktime else 1)
    except decord.DECORDError as error:
        if LACKS_CODEC not in str(error):
            raise
        return _open_ffmpeg(path)
    num_frames = len(reader)
    if quicktime:
        # Packets before the start of the edit list have negative times: they are decoded, but never shown. A clip cut
        # without re-encoding starts with such packets, from the keyframe before the cut.
        num_frames = int((reader.get_frame_timestamp(range(num_frames))[:, 0] >= 0).sum())
        if not num_frames:
            raise VideoError(f"{shown(path)}: its edit list shows none of its frames")
    return _Source(num_frames, reader.get_avg_fps(), lambda indices: _read_narrow(path, reader, indices))


def _open_decord(path: str, **options) -> decord.VideoReader:
    """A reader of a file. The path is made absolute, since FFmpeg reads "c:d/x.mp4" as protocol c. decord does not take
    names that are not UTF-8: such files are opened here and passed as descriptors."""
    try:
        path.encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            return decord.VideoReader(f"/proc/self/fd/{file.fileno()}", **options)
    return decord.VideoReader(os.path.abspath(path), **options)


def _read_narrow(path: str, reader: decord.VideoReader, indices: np.ndarray) -> Tensor:
    try:
        return _read(reader, indices)
    except decord.DECORDError as error:
        if PADDED_LINES not in str(error):
            raise
        return _read_ffmpeg(path, indices)


def _read(reader: decord.VideoReader, indices: np.ndarray) -> Tensor:
    """Decode from the first frame on, since decord's seeking and skipping are not exact. Compared with decoding from
    the start, and with OpenCV, they are off by whole GOPs in AVI with B-frames (UCF-101), by the leading B-frames after
    an open-GOP keyframe, and everywhere in an mp4 cut without re-encoding. Videos last seconds, so this costs
    little."""
    first, last = indices.min(), indices.max()
    for _ in range(first):
        reader.next()
    frames = torch.from_dlpack(reader.get_batch(range(first, last + 1)).to_dlpack())  # asnumpy() would copy them
    return frames if np.array_equal(indices, range(first, last + 1)) else frames[indices - first]


def _open_ffmpeg(path: str) -> _Source:
    """A source whose frames are counted by decoding them all, so that every index is a frame. Damage anywhere makes the
    file damaged."""
    done = _ffmpeg(path, "-f", "null", "-stats", "-", level="info")
    text = done.stderr.decode(errors="replace")
    count, rate = re.findall(r"frame= *(\d+)", text), re.search(r"Video: .*?([\d.]+) fps", text)
    if done.returncode or not count or not int(count[-1]):
        raise VideoError(f"{path}: neither decord nor ffmpeg can decode it")
    return _Source(int(count[-1]), float(rate[1]) if rate else 25.0, lambda indices: _read_ffmpeg(path, indices))


def _read_ffmpeg(path: str, indices: np.ndarray) -> Tensor:
    """Frames, bit for bit equal to decord's where it can read the file. PPM headers hold the size of each."""
    first, last = int(indices.min()), int(indices.max())
    done = _ffmpeg(path, "-vf", f"select=between(n\\,{first}\\,{last})", "-frames:v", str(last - first + 1),
                   "-f", "image2pipe", "-c:v", "ppm", "-")
    frames, data = [], memoryview(done.stdout)
    while header := re.match(rb"P6\s(\d+)\s(\d+)\s255\s", data):
        width, height = int(header[1]), int(header[2])
        end = header.end() + 3 * width * height
        frames.append(np.frombuffer(data[header.end() : end], np.uint8).reshape(height, width, 3))
        data = data[end:]
    if done.returncode or len(frames) != last - first + 1:
        reason = done.stderr.decode(errors="replace").strip().split("\n")[0]
        raise FrameError(f"{path}: ffmpeg decodes {len(frames)} of the frames {first} to {last}: {reason}")
    return torch.from_numpy(np.stack(frames)[indices - first])


def _ffmpeg(path: str, *output: str, level: str = "error") -> subprocess.CompletedProcess:
    """Run ffmpeg on a file's video stream: it outputs every decoded frame once, and ends at the first error."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-v", level, "-xerror", "-threads", "1",
               "-i", f"file:{path}", "-an", "-sn", "-dn", "-fps_mode", "passthrough", *output]
    try:
        return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise VideoError(f"{path}: the decoder was still busy after {TIMEOUT:g} s") from None


def _open_gif(path: str) -> _Source:
    """A source read by Pillow: decord refuses GIF, whose header holds no duration."""
    try:
        with Image.open(path) as image:
            frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
            fps = 1000 / image.info["duration"] if image.info.get("duration") else 10.0  # browsers play 10 fps then
    except (ValueError, SyntaxError, IndexError, KeyError, struct.error) as error:  # Pillow's, of damage
        raise VideoError(f"{path}: {_reason(error)}") from None
    return _Source(len(frames), fps, lambda indices: torch.from_numpy(frames[indices]))


def _random_frames(seed: int, indices: np.ndarray) -> Tensor:
    rngs = [np.random.default_rng((seed, index)) for index in indices]
    return torch.from_numpy(np.stack([rng.integers(256, size=NULL_SHAPE[1:], dtype=np.uint8) for rng in rngs]))


def resize_crop(frames: Tensor, size: int, rule: str) -> Tensor:
    """Shorter side to `size`, then the central square.

    frames: (..., H, W, 3) uint8, on the CPU or a GPU.
    rule "coordtok": bicubic with antialias on 8-bit images, as Pillow does it -> (..., size, size, 3) uint8.
    rule "larp": bilinear with antialias in floating point -> (..., size, size, 3) float32 in [0, 1].
    """
    if rule not in ("coordtok", "larp"):
        raise ValueError(f"resize rule {rule!r} is neither 'coordtok' nor 'larp'")
    height, width = frames.shape[-3:-1]
    # torchvision's Resize(size) and CenterCrop(size): the long side is truncated, the offset rounded half to even.
    new_height = size if height <= width else int(size * height / width)
    new_width = size if width <= height else int(size * width / height)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    # A channels-last view: torch's vectorised path for 8-bit images.
    images = frames.reshape(-1, height, width, 3).permute(0, 3, 1, 2)
    bicubic = _bicubic_8bit if frames.device.type == "cpu" else _bicubic_two_pass
    resize = bicubic if rule == "coordtok" else _bilinear
    pieces = [
        resize(piece, new_height, new_width)[..., top:top + size, left:left + size].permute(0, 2, 3, 1)
        for piece in images.split(max(1, CHUNK // (height * width * 3)))
    ]
    return torch.cat(pieces).view(*frames.shape[:-3], size, size, 3)


def resize_frames(frames: Tensor, size: tuple[int, int], rule: str) -> Tensor:
    """Frames (T, H, W, 3) uint8 to `size`, (height, width), whatever the aspect ratio; rule and dtype as for
    `resize_crop`."""
    bicubic = _bicubic_8bit if frames.device.type == "cpu" else _bicubic_two_pass
    resize = bicubic if rule == "coordtok" else _bilinear
    return resize(frames.permute(0, 3, 1, 2), *size).permute(0, 2, 3, 1)


def resize_crop_8bit(frames: Tensor, size: int, rule: str) -> Tensor:
    """`resize_crop`, rounded to 8 bits where its rule does not do so itself: (..., size, size, 3) uint8."""
    frames = resize_crop(frames, size, rule)
    return frames if frames.dtype == torch.uint8 else frames.mul_(255).round_().to(torch.uint8)


def _bilinear(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images.float().div_(255), (height, width), mode="bilinear", antialias=True)


def _bicubic_8bit(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True)


def _bicubic_two_pass(images: Tensor, height: int, width: int) -> Tensor:
    """`_bicubic_8bit` for devices that interpolate floating point only. Two passes, as Pillow does it: it resizes the
    width first and rounds to 8 bits between the passes."""
    images = F.interpolate(images.float(), (images.shape[2], width), mode="bicubic", antialias=True)
    images = F.interpolate(images.round_().clamp_(0, 255), (height, width), mode="bicubic", antialias=True)
    return images.round_().clamp_(0, 255).to(torch.uint8)


def to_video(frames: Tensor | list[Tensor], size: int, rule: str, device: torch.device | str) -> Tensor:
    """A batch of clips as the models take it: (B, 3, T, size, size) float32 in [0, 1] on `device`.

    frames: (B, T, H, W, 3) uint8, or a list of (T, H, W, 3) of different sizes; native frames are resized on `device`
    by `resize_crop`. Frames that the loader has resized are scaled (uint8) or kept as they are (float32).
    """
    if isinstance(frames, list):
        return torch.cat([to_video(clip[None], size, rule, device) for clip in frames])
    frames = frames.to(device, non_blocking=True)
    if frames.dtype == torch.uint8 and (rule == "larp" or frames.shape[2:4] != (size, size)):
        frames = resize_crop(frames, size, rule)
    video = rearrange(frames, "b t h w c -> b c t h w").contiguous()
    return video.float().div_(255) if video.dtype == torch.uint8 else video


def to_bytes(video: Tensor) -> Tensor:
    """Float, clamped to [0, 1], to rounded uint8."""
    return video.clamp(0, 1).mul(255).round().to(torch.uint8)


def run_ffmpeg(arguments: Sequence, data: bytes) -> bytes:
    """What ffmpeg writes to stdout when it reads `data` from stdin. Raises OSError with the first line of its errors.

    ffmpeg is called directly: imageio forks the whole process for it, 20 to 90 ms with the interpreter lock held, and
    accepts a file that ffmpeg could not finish. In its own session ffmpeg does not get Ctrl-C.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *map(str, arguments)]
    done = subprocess.run(command, input=data, capture_output=True, start_new_session=True)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().split("\n")[0]
        raise OSError(reason or f"ffmpeg ended with status {done.returncode}")
    return done.stdout


def write_video(path: str | Path, video: Tensor, fps: float = 25, crf: int = 5) -> None:
    """Write an mp4 (H.264) atomically. video: (3, T, H, W) float in [0, 1] (see `to_bytes`), or uint8. crf: how much
    may be lost, from 0, which loses only what YUV loses; ffmpeg's default is 23. Raises OSError.
    """
    path = Path(path)
    video = video if video.dtype == torch.uint8 else to_bytes(video.detach())
    frames = rearrange(video, "c t h w -> t h w c").cpu().numpy()
    height, width = frames.shape[1:3]
    pixels = "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"  # yuv420p halves the colour planes
    part = path.absolute()  # ffmpeg reads "c:d/x" as protocol c
    part = part.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        run_ffmpeg(["-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", fps, "-i", "-",
                    "-vcodec", "libx264", "-crf", crf, "-pix_fmt", pixels, part], frames.tobytes())
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from None
    os.replace(part, path)
