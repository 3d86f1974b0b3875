"""Lists of videos, clips drawn from them, and the order in which a run sees them.

Everything random is a pure function of (seed, position), position being the number of the sample in the run. So a clip
does not depend on the number of workers, processes, or accumulation steps, and a resumed run sees what it would have.
"""
import atexit
import contextlib
import csv
import fcntl
import itertools
import logging
import multiprocessing
import os
import re
import resource
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from common.errors import reading, shown
from data.cache import ClipCache
from data.files import write_whole
from data.metadata import VIDEO_SUFFIXES, walk_videos
from data.points import random_frames, random_patches
from data.shipping import ship
from data.video import NULL, TIMEOUT, FrameError, VideoError, probe, read_chosen, resize_crop, resize_crop_8bit

REPOSITORY = Path(__file__).parents[1]
METADATA = REPOSITORY / "data" / "metadata"
UCF_NAME = re.compile(r"v_(\w+)_g\d+_c\d+")

MAX_ATTEMPTS = 100  # clips tried in place of a damaged one before a data set of damaged videos is given up

log = logging.getLogger(__name__)


# --- lists of videos ---

class VideoFile(NamedTuple):
    path: str
    label: int = -1  # -1: unknown


def list_folder(root: str | Path) -> list[VideoFile]:
    """The videos in ROOT and ROOT/CLASS, sorted by path; hidden files and folders are left out (`walk_videos`).

    Classes are those that have videos, numbered in byte order. A UCF-101 name (v_CLASS_gGG_cCC) says its class itself:
    folder HandstandPushups holds v_HandStandPushups files. Other videos take their folder's, and those directly in ROOT
    have none (-1).
    """
    root = Path(root)
    paths = sorted(map(str, walk_videos(root, depth=2))) if root.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"no videos under {root.absolute()}: looked there and in its class folders for "
                                f"{', '.join(VIDEO_SUFFIXES)} files (--data_root, --video_name)")
    names = [_class_name(Path(path), root) for path in paths]
    labels = {name: label for label, name in enumerate(sorted(set(names) - {None}))}
    return [VideoFile(path, labels.get(name, -1)) for path, name in zip(paths, names)]


def _class_name(path: Path, root: Path) -> str | None:
    ucf = UCF_NAME.fullmatch(path.stem)
    if ucf:
        return ucf[1]
    return path.parent.name if path.parent != root else None


def list_csv(names: str, want_labels: bool = False) -> list[VideoFile]:
    """The videos of "a.csv+b.csv", sorted by path.

    A list is a file, or the name of one in data/metadata, with columns id, path, action, label; relative paths start at
    the repository. Labels are those of a single list whose name starts with "ucf", or of any single list if
    `want_labels`; otherwise they are -1. "null128...", "null...": 128 or 224,000 random clips without files.
    """
    if names.startswith("null"):
        count = 128 if names.startswith("null128") else 224_000
        return [VideoFile(f"{NULL}{i:06d}", i % 101) for i in range(count)]
    lists = find_lists(names)
    labelled = len(lists) == 1 and (want_labels or lists[0].name.startswith("ucf"))
    column = "label" if labelled else None
    return sorted(file for path in lists for file in _read_csv(path, column))


def find_lists(names: str) -> list[Path]:
    """The lists of "a.csv+b.csv", each a file or the name of one in data/metadata, which may have a + in its path."""
    parts, found = names.split("+"), []
    while parts:
        for count in range(len(parts), 0, -1):
            name = "+".join(parts[:count])
            if path := next((path for path in (Path(name), METADATA / name) if path.is_file()), None):
                break
        else:
            raise FileNotFoundError(f"no list {parts[0]}, neither here nor in {METADATA} (scripts/set_datasets.sh "
                                    "makes the lists)")
        found.append(path)
        parts = parts[count:]
    return found


def _read_csv(path: Path, label_column: str | None) -> list[VideoFile]:
    with (reading(path, "a list of videos", "expected columns id, path, action, label: make it anew "
                  "(scripts/set_datasets.sh), or mend the line"),
          path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file):
        reader = csv.DictReader(file, strict=True)
        columns = reader.fieldnames or []
        if lacking := {"path", label_column} - {None, *columns}:
            raise ValueError(f"it has columns {', '.join(columns) or 'none'}, without {' and '.join(sorted(lacking))}")
        files = []
        for row in reader:
            label = row[label_column] if label_column else "-1"
            if not row["path"] or not re.fullmatch(r"-?\d+", label or ""):
                raise ValueError(f"line {reader.line_num} has path {row['path']!r} and label {label!r}")
            files.append(VideoFile(str(REPOSITORY / row["path"]), int(label)))
        if not files:
            raise ValueError("it has no rows")
    return files


def class_names(files: Sequence[VideoFile]) -> list[str]:
    """The folder of each label's first video, by label ("" where there is none); empty where a video has no label."""
    names = {file.label: Path(file.path).parent.name for file in reversed(files)}
    return [] if -1 in names else [names.get(label, "") for label in range(max(names) + 1)]


# --- damaged videos ---

class Quarantine:
    """The damaged videos of a run, one line "path<TAB>reason" each, in a file that all its processes share.

    A video is `in` it, and not to be opened again, unless its reason starts with PARTIAL: then only some of its frames
    were bad. It is named all the same, but used where its frames are good, as whether a clip is delivered must not
    depend on the clips that were tried before.
    path: the list's file, kept from run to run; None keeps the list in this process's memory.
    """

    PARTIAL = "in part: "

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path) if path else None
        self._reasons: dict[str, str] = {}
        self._version = None

    def __contains__(self, video: str) -> bool:
        return not self.read().get(video, self.PARTIAL).startswith(self.PARTIAL)

    def __len__(self) -> int:
        return len(self.read())

    def read(self) -> dict[str, str]:
        """path -> reason. The file is read again only where its time or size has changed."""
        if self.path and self.path.exists():
            stat = self.path.stat()
            if self._version != (stat.st_mtime_ns, stat.st_size):
                self._version = (stat.st_mtime_ns, stat.st_size)
                lines = self.path.read_text(errors="surrogateescape").split("\n")
                fields = [line.partition("\t") for line in lines if "\t" in line]  # without: cut short by a kill
                self._reasons = {unescaped(video): reason for video, _, reason in fields}
        return self._reasons

    def review(self, timeout: float = TIMEOUT) -> None:
        """Look again at the videos not to be opened, whose files may have been mended: those that open now are taken
        off. For one process, before others use the list. Raises StorageError."""

        def opens(video: str) -> bool:
            try:
                probe(video, timeout)
            except VideoError:
                return False
            return True

        shunned = [video for video in self.read() if video in self]
        with ThreadPoolExecutor(8) as pool:  # decoding runs outside the interpreter lock
            mended = {video for video, good in zip(shunned, pool.map(opens, shunned)) if good}
        if mended:
            log.warning("%d of %d videos in %s can be read again", len(mended), len(shunned), self.path)
            with write_whole(self.path, "w", errors="surrogateescape") as file:
                file.write("".join(f"{escaped(video)}\t{reason}\n" for video, reason in self.read().items()
                                   if video not in mended))

    def add(self, video: str, reason: str) -> None:
        """Names the video in the log and the list, unless one of the processes has done so before (or found it less
        damaged than now)."""
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
                    file.write(line if file.read() in (b"", b"\n") else b"\n" + line)  # after one that a kill cut short

    def add_error(self, video: str, error: VideoError) -> str:
        """`add` for what decoding raised. Returns the reason."""
        partial = self.PARTIAL if isinstance(error, FrameError) else ""
        reason = partial + str(error).removeprefix(f"{shown(video)}: ")
        self.add(video, reason)
        return reason


def escaped(name: str) -> str:
    """A name as one field of one line: \\, tabs and ends of lines are written as \\\\, \\t, \\n and \\r."""
    return name.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def unescaped(field: str) -> str:
    """The inverse of `escaped`."""
    return re.sub(r"\\([\\tnr])", lambda found: {"t": "\t", "n": "\n", "r": "\r"}.get(found[1], "\\"), field)


# --- clips ---

class ClipKey(NamedTuple):
    """position: the sample's number in the run, which seeds its draws. index: which video; None draws one uniformly.
    start: its first frame; None leaves that to the data set's window rule."""

    position: int
    index: int | None = None
    start: int | None = None


class PointRule(NamedTuple):
    """Which patches to decode: `num` single "patches", or those of whole "frames", of a clip of `grid` (t, h, w)."""

    kind: str
    num: int
    grid: tuple[int, int, int]
    patch_t: int


def num_starts(num_frames: int, length: int, stride: int) -> int:
    """How many windows of `length` frames, `stride` apart, a video has; a short one has one."""
    return max(num_frames - (length - 1) * stride, 1)


def window_frames(num_frames: int, start: int, length: int, stride: int) -> np.ndarray:
    """Frames start, start + stride, ... of a window: `length` of them, or fewer where the video ends."""
    return np.arange(start, num_frames, stride)[:length]


class ClipDataset(Dataset):
    """Windows of videos, ready for training.

    files: the videos. num_frames, stride: length and step of a window. seed: of all draws.
    size, rule: as in `resize_crop`. resize: "worker" ships frames of `size` (uint8, or float32 in [0, 1] under rule
        "larp", whose results are not 8-bit); "device" ships native uint8 frames, for `to_video` to resize in batch.
    window: where it starts, "random" (uniform), "start" or "center" of the video; a key's own start goes before.
    short: a video shorter than the window is continued by zeros ("pad") or by its last frame ("repeat").
    damaged: a video that cannot be decoded is quarantined and, by "replace", another one is drawn in its place; by
        "skip", the sample says so and `collate` leaves it out (for evaluation, where nothing may be put in its place).
    points: a PointRule adds patch indices to each sample. timeout: seconds for one video.
    cache: ready uint8 frames of `files` by `size` and `rule`. A video that is not in it is read from its file, resized
        in the worker to the same kind of frames.
    """

    def __init__(
        self, files: Sequence[VideoFile], num_frames: int, size: int, rule: str, *, seed: int = 0, stride: int = 1,
        resize: str = "worker", window: str = "random", short: str = "pad", damaged: str = "replace",
        points: PointRule | tuple | None = None, quarantine: Quarantine | None = None, timeout: float = TIMEOUT,
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
        self.points = PointRule(*points) if points else None
        self.quarantine = Quarantine() if quarantine is None else quarantine
        self.timeout, self.cache = timeout, cache

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: ClipKey) -> dict:
        """frames (T, h, w, 3), n_frames (how many are real), label, path, start, position, and with points index
        (N, 3) int64; or path, position and error. Raises StorageError, and VideoError where no video is left."""
        key = ClipKey(*key)
        for attempt in itertools.count():
            # Each attempt has a stream of its own, so that the outcome is the same whether a damaged video was opened
            # or already known.
            rng = np.random.default_rng((self.seed, key.position, attempt, 1))
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

    def _sample(self, index: int, position: int, start: int | None, rng: np.random.Generator) -> dict:
        file = self.files[index]

        def choose(available: int) -> np.ndarray:
            starts = num_starts(available, self.num_frames, self.stride)
            by_rule = {"random": int(rng.integers(starts)), "start": 0, "center": (starts - 1) // 2}[self.window]
            return window_frames(available, by_rule if start is None else start, self.num_frames, self.stride)

        length = self.cache.length(index) if self.cache else 0
        indices = choose(length) if length else ()
        if len(indices):
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


def collate(samples: list[dict]) -> dict:
    """A batch: frames (B, T, h, w, 3), or a list of clips where sizes differ; n_frames, label, position (B,) long;
    path, start lists; index (B, N, 3) long where there are points; skipped: (path, reason) of samples left out."""
    good = [sample for sample in samples if "error" not in sample]
    frames = [sample["frames"] for sample in good]
    batch = {name: torch.tensor([sample[name] for sample in good], dtype=torch.long)
             for name in ("n_frames", "label", "position")}
    batch |= {name: [sample[name] for sample in good] for name in ("path", "start")}
    if good and "index" in good[0]:
        batch["index"] = torch.stack([sample["index"] for sample in good])
    batch["skipped"] = [(sample["path"], sample["error"]) for sample in samples if "error" in sample]
    return deliver(batch, frames, alike=len({clip.shape for clip in frames}) == 1)


def deliver(batch: dict, frames: list[torch.Tensor], alike: bool) -> dict:
    """The batch with its frames, stacked where they are `alike` in shape; from a worker through shared memory."""
    if get_worker_info() and hasattr(os, "memfd_create"):  # Linux has it
        return ship(batch, frames, alike)
    return {**batch, "frames": torch.stack(frames) if alike else frames}


# --- order ---

def check_shares(global_batch: int, world_size: int, accum: int) -> None:
    """ValueError where a batch cannot be shared equally."""
    if global_batch < 1 or global_batch % (world_size * accum):
        raise ValueError(f"a global batch of {global_batch} cannot be shared by {world_size} processes x {accum} "
                         f"accumulation steps: give a multiple of {world_size * accum}")


class GlobalBatchSampler(Sampler):
    """The keys of one process's micro-batches, step after step; the global batch does not depend on the process count.

    Sample `slot` of step `step` has position step * global_batch + slot. Rank r of W takes the r-th W-th of the slots,
    in `accum` micro-batches. order "replacement": each sample draws its video. "epoch": each epoch is a permutation of
    the videos, whose last partial batch is dropped.
    """

    def __init__(self, num_files: int, global_batch: int, num_steps: int, rank: int = 0, world_size: int = 1,
                 accum: int = 1, seed: int = 0, start_step: int = 0, order: str = "replacement"):
        check_shares(global_batch, world_size, accum)
        if order not in ("replacement", "epoch"):
            raise ValueError(f"order={order!r} is neither 'replacement' nor 'epoch'")
        if order == "epoch" and num_files < global_batch:
            raise ValueError(f"{num_files} videos do not fill one batch of {global_batch}: lower the batch size")
        self.num_files, self.global_batch, self.num_steps = num_files, global_batch, num_steps
        self.rank, self.world_size, self.accum = rank, world_size, accum
        self.seed, self.start_step, self.order = seed, start_step, order

    @property
    def steps_per_epoch(self) -> int:
        return self.num_files // self.global_batch

    def __len__(self) -> int:
        return (self.num_steps - self.start_step) * self.accum

    def __iter__(self) -> Iterator[list[ClipKey]]:
        micro = self.global_batch // self.world_size // self.accum
        epoch = None
        for step in range(self.start_step, self.num_steps):
            if self.order == "epoch" and step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                permutation = np.random.default_rng((self.seed, epoch, 0, 2)).permutation(self.num_files)
            for part in range(self.rank * self.accum, (self.rank + 1) * self.accum):
                slots = range(part * micro, (part + 1) * micro)
                if self.order == "epoch":
                    offset = step % self.steps_per_epoch * self.global_batch
                    yield [ClipKey(step * self.global_batch + slot, int(permutation[offset + slot])) for slot in slots]
                else:
                    yield [ClipKey(step * self.global_batch + slot) for slot in slots]


class Loader(DataLoader):
    """A DataLoader whose failures are an OSError of one line. Its workers start when it is first iterated over."""

    def __iter__(self) -> Iterator:
        raise_file_limit()
        batches = reason = None
        # torch's iterator, left half-made, complains when it is freed: Ctrl-C waits until it is whole, and an error of
        # the system, which would keep it until the process ends, is raised anew.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            batches = super().__iter__()
        except OSError as error:
            reason = error.strerror
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if batches is None:
            raise OSError(f"{self.num_workers} loader workers cannot start: {reason}: lower --num_workers, or look at "
                          "`df /dev/shm`, `ulimit -n`, `ulimit -u` and the memory")

        def in_one_line() -> Iterator:
            try:
                yield from batches
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker (pid"):
                    raise
                raise ChildProcessError(f"{str(error).splitlines()[0].strip()} Lower --num_workers if memory is short; "
                                        "a run goes on with --resume auto") from error

        return in_one_line()


def raise_file_limit(wanted: int = 2**16) -> None:
    """Let this process and those it starts have more files open, as far as the system lets anyone: the usual limit of
    1,024 is low for a loader of many workers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if resource.RLIM_INFINITY != soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def make_loader(dataset: ClipDataset, batches: Sampler, num_workers: int, prefetch_factor: int = 2,
                pin_memory: bool = False) -> Loader:
    """Loads the batches of keys that `batches` yields, in worker processes of one thread each."""
    return Loader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=num_workers, worker_init_fn=init_worker,
        prefetch_factor=prefetch_factor if num_workers else None, persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else every pass over the loader would draw from the global generator
    )


def init_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Schedulers send SIGTERM to all processes of a job, and terminals send Ctrl-C: the training process saves and then
    # ends its workers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """End the workers that an error has left. multiprocessing, whose turn at exit comes after this, would send them
    SIGTERM, which they ignore, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch would report their end as an error
    for process in multiprocessing.active_children():
        if process.daemon:  # as loader workers are
            process.kill()
