"""Clips: windows of videos, as samples for training and evaluation; and the quarantine of damaged videos.

A clip is a pure function of (seed, position), where position is the number of the sample in the run: see
data/loader.py.
"""
import contextlib
import fcntl
import itertools
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common import distributed
from common.errors import shown
from common.files import atomic_write
from common.rng import Stream, generator
from data.cache import ClipCache
from data.lists import VideoFile
from data.patch_sampling import random_frames, random_patches
from data.video import TIMEOUT, FrameError, VideoError, probe, read_chosen, resize_crop, resize_crop_8bit, to_video

MAX_ATTEMPTS = 100  # clips tried in place of a damaged one before giving up, if all videos are known to be damaged

log = logging.getLogger(__name__)


# --- damaged videos ---
class Quarantine:
    """The damaged videos of a run, one line "path<TAB>reason" each, in a file that all its processes share.

    A video that is `in` the quarantine is not opened again. Where the reason starts with PARTIAL only some frames were
    bad, and the video is not `in` it: it stays listed, but its readable frames are still used, so that which clips are
    delivered does not depend on the order of reads.
    path: the list's file, kept from run to run; None keeps the list in this process's memory.
    """

    PARTIAL = "in part: "

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path) if path else None
        self._reasons: dict[str, str] = {}
        self._version: tuple[int, int] | None = None

    def __contains__(self, video: str) -> bool:
        return not self.read().get(video, self.PARTIAL).startswith(self.PARTIAL)

    def __len__(self) -> int:
        return len(self.read())

    def read(self) -> dict[str, str]:
        """path -> reason. The file is read again only if its time or size has changed."""
        if self.path and self.path.exists():
            stat = self.path.stat()
            if self._version != (stat.st_mtime_ns, stat.st_size):
                self._version = (stat.st_mtime_ns, stat.st_size)
                lines = self.path.read_text(errors="surrogateescape").split("\n")
                fields = [line.partition("\t") for line in lines if "\t" in line]  # others were cut short by a kill
                self._reasons = {unescaped(video): reason for video, _, reason in fields}
        return self._reasons

    def review(self, timeout: float = TIMEOUT) -> None:
        """Try the videos in quarantine again, as their files may have been repaired, and remove those that open. Call
        it in one process, before others use the list. Raises StorageError."""

        def opens(video: str) -> bool:
            try:
                probe(video, timeout)
            except VideoError:
                return False
            return True

        avoided = [video for video in self.read() if video in self]
        with ThreadPoolExecutor(8) as pool:  # decoding runs outside the interpreter lock
            mended = {video for video, good in zip(avoided, pool.map(opens, avoided)) if good}
        if mended and self.path:
            log.warning("%d of %d videos in %s can be read again", len(mended), len(avoided), self.path)
            with atomic_write(self.path, "w", errors="surrogateescape") as file:
                file.write("".join(f"{escaped(video)}\t{reason}\n" for video, reason in self.read().items()
                                   if video not in mended))

    def add(self, video: str, reason: str) -> None:
        """Add a video to the list and warn in the log, unless a process has listed it already. A video that was listed
        as damaged in part is added again where the new reason is worse."""
        with contextlib.ExitStack() as stack:
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(self.path.open("ab+"))
                fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            worse = video not in self and not reason.startswith(self.PARTIAL)
            if worse or video not in self.read():
                log.warning("damaged video: %s: %s", shown(video), reason)
                self._reasons[video] = reason
                if self.path:
                    line = f"{escaped(video)}\t{escaped(reason)}\n".encode(errors="surrogateescape")
                    file.seek(max(file.tell() - 1, 0))
                    file.write(line if file.read() in (b"", b"\n") else b"\n" + line)  # after one cut short by a kill

    def add_error(self, video: str, error: VideoError) -> str:
        """`add` a video for an error of its decoding. Returns the reason."""
        partial = self.PARTIAL if isinstance(error, FrameError) else ""
        reason = partial + str(error).removeprefix(f"{shown(video)}: ")
        self.add(video, reason)
        return reason


def escaped(name: str) -> str:
    """A name as one field of one line: \\, tab, line feed and carriage return become \\\\, \\t, \\n and \\r."""
    return name.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def unescaped(field: str) -> str:
    """The inverse of `escaped`."""
    return re.sub(r"\\([\\tnr])", lambda found: {"t": "\t", "n": "\n", "r": "\r"}.get(found[1], "\\"), field)


# --- clips ---
class ClipKey(NamedTuple):
    """position: the sample's number in the run, which seeds its draws. index: which video; None draws one uniformly.
    start: the first frame; None leaves it to the data set's window rule."""

    position: int
    index: int | None = None  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    start: int | None = None


class PatchSampling(NamedTuple):
    """Which patches of a clip to decode. kind: "patches" draws `num` single patches, "frames" the `num` patches of
    whole frames. grid: patches of the clip along t, h, w. patch_t: frames in a patch."""

    kind: str
    num: int
    grid: tuple[int, int, int]
    patch_t: int


def num_starts(num_frames: int, length: int, stride: int) -> int:
    """The number of windows of `length` frames, `stride` apart, in a video. A video shorter than that has one."""
    return max(num_frames - (length - 1) * stride, 1)


def window_frames(num_frames: int, start: int, length: int, stride: int) -> np.ndarray:
    """Frames start, start + stride, ... of a window: `length` of them, or fewer where the video ends."""
    return np.arange(start, num_frames, stride)[:length]


class ClipDataset(Dataset):
    """Windows of videos, ready for training.

    files: the videos. num_frames, stride: length and step of a window. seed: of all draws.
    size, rule: as in `resize_crop`. resize: "worker" sends frames of `size` (uint8, or float32 in [0, 1] under rule
        "larp", whose results are not 8-bit); "device" sends native uint8 frames, which `to_video` resizes in batch.
    window: where it starts: "random" (uniform), "start" or "center" of the video. A key's `start` overrides it.
    short: a video shorter than the window is filled up with zeros ("pad") or with its last frame ("repeat").
    damaged: a video that cannot be decoded is quarantined. "replace" then draws another clip; "skip" returns a sample
        with an error, which `collate` leaves out (for evaluation, where no other clip may take its place).
    points: adds patch indices to each sample. timeout: seconds for one video.
    cache: decoded uint8 frames of `files`, resized by `size` and `rule`. A video that is not in it is read from its
        file, and resized in the worker to the same kind of frames.
    """

    def __init__(
        self, files: Sequence[VideoFile], num_frames: int, size: int, rule: str, *, seed: int = 0, stride: int = 1,
        resize: str = "worker", window: str = "random", short: str = "pad", damaged: str = "replace",
        points: PatchSampling | tuple | None = None, quarantine: Quarantine | None = None, timeout: float = TIMEOUT,
        cache: ClipCache | None = None,
    ):
        known = {"rule": ("coordtok", "larp"), "resize": ("worker", "device"), "window": ("random", "start", "center"),
                 "short": ("pad", "repeat"), "damaged": ("replace", "skip")}
        given = {"rule": rule, "resize": resize, "window": window, "short": short, "damaged": damaged}
        for name, values in known.items():
            if given[name] not in values:
                raise ValueError(f"{name}={given[name]!r} is none of {', '.join(values)}")
        if not files:
            raise ValueError("the list of videos is empty")
        self.files, self.num_frames, self.size, self.rule, self.seed = files, num_frames, size, rule, seed
        self.stride, self.resize, self.window, self.short, self.damaged = stride, resize, window, short, damaged
        self.points = PatchSampling(*points) if points else None
        self.quarantine = Quarantine() if quarantine is None else quarantine
        self.timeout, self.cache = timeout, cache

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: ClipKey) -> dict:
        """A sample: frames (T, h, w, 3), n_frames (how many are real), label, path, start, position, and with `points`
        index (N, 3) int64; or, where it is skipped, path, position and error. Raises StorageError, and VideoError
        where no video is left."""
        key = ClipKey(*key)
        for attempt in itertools.count():
            # Each attempt has its own random numbers, so that the result is the same whether a damaged video is found
            # now or was in quarantine before.
            rng = generator(self.seed, key.position, Stream.WINDOW, attempt)
            index, start = int(rng.integers(len(self.files))), None
            if attempt == 0:
                index, start = index if key.index is None else key.index, key.start
            file = self.files[index]
            if file.path in self.quarantine:
                reason = self.quarantine.read()[file.path]
            else:
                try:
                    return self._sample(index, key.position, start, rng)
                except VideoError as error:
                    reason = self.quarantine.add_error(file.path, error)
            if self.damaged == "skip":
                return {"path": file.path, "position": key.position, "error": reason}
            if attempt >= MAX_ATTEMPTS and all(other.path in self.quarantine.read() for other in self.files):
                break
        root = os.path.commonpath([os.path.dirname(file.path) for file in self.files])
        raise VideoError(f"no readable video left of {len(self.files)} under {root} "
                         f"(see {self.quarantine.path or 'the warnings above'})")

    def to_video(self, batch: dict, device: torch.device | str) -> Tensor:
        """The frames of a batch of this data set as the models take them: (B, 3, T, size, size) float32 in [0, 1] on
        `device`. See `data.video.to_video`."""
        return to_video(batch["frames"], self.size, self.rule, device)

    def _sample(self, index: int, position: int, start: int | None, rng: np.random.Generator) -> dict:
        file = self.files[index]

        def choose(available: int) -> np.ndarray:
            starts = num_starts(available, self.num_frames, self.stride)
            by_rule = {"random": int(rng.integers(starts)), "start": 0, "center": (starts - 1) // 2}[self.window]
            return window_frames(available, by_rule if start is None else start, self.num_frames, self.stride)

        length = self.cache.length(index) if self.cache else 0
        indices = choose(length) if length else np.empty(0, np.int64)
        if self.cache and len(indices):
            frames = torch.from_numpy(self.cache.read(index, indices))
        else:
            frames, indices = read_chosen(file.path, choose, self.timeout)
            if self.cache:
                frames = resize_crop_8bit(frames, self.size, self.rule)
            elif self.resize == "worker":
                frames = resize_crop(frames, self.size, self.rule)
        n_frames = len(frames)
        if n_frames < self.num_frames:
            tail = frames[-1:] if self.short == "repeat" else torch.zeros_like(frames[-1:])
            frames = torch.cat([frames, tail.expand(self.num_frames - n_frames, *frames.shape[1:])])
        sample = {"frames": frames, "n_frames": n_frames, "label": file.label, "path": file.path,
                  "start": int(indices[0]), "position": position}
        if self.points:
            kind, num, grid, patch_t = self.points
            draw = {"patches": random_patches, "frames": random_frames}[kind]
            sample["index"] = torch.from_numpy(draw(rng, num, grid, n_frames, patch_t))
        return sample


def open_quarantine(folder: Path, timeout: float) -> Quarantine:
    """The quarantine of a run's folder, on every process. The videos of an earlier run are tried again first."""
    quarantine = Quarantine(folder / "quarantine.txt")
    if distributed.is_main():
        quarantine.review(timeout)
    distributed.barrier()
    return quarantine
