"""The output of sample.py: the folder of samples, which shards and resumed runs share, the thread that writes to it,
and the table of results."""
import csv
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from common.cli import config_diff
from common.console import print_main
from common.errors import REMAKE, DamagedFile, read_json, reading
from common.files import atomic_write, claim, release, remove_partials
from data.video import write_video
from eval.pictures import strip_indices
from eval.report import read_record, write_record

NUM_PREVIEWS = 16  # samples on the contact sheet

NUM_WRITERS = 4  # videos that are encoded at once


class SampleStore:
    """The folder of one set of samples 0 .. total - 1, filled by any number of shards in any order.

    Each batch becomes one file in chunks/, written atomically after its videos. It holds arrays by name with one row a
    sample, among them `index` (n,), and `left_out`, the samples that could not be made. A killed shard resumes after
    its last complete batch. The shard that finishes last writes the report. All shards must have equal `settings`
    (plain JSON values), which settings.json holds.
    """

    def __init__(self, folder: str | Path, settings: dict, total: int):
        self.folder, self.total = Path(folder), total
        self.settings = json.loads(json.dumps({**settings, "num_samples_total": total}))
        self.run = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        self.videos, self.chunks = self.folder / "sampled_videos", self.folder / "chunks"
        self.given = self.folder / "gt"
        self.report = self.folder / "report.json"
        self.chunks.mkdir(parents=True, exist_ok=True)
        self.videos.mkdir(exist_ok=True)
        self.lock = FileLock(self.folder / ".lock")

    def open(self, indices: Sequence[int], replace: bool) -> list[int]:
        """Start making samples `indices`. Returns those that are not made yet, or all with `replace`, which also
        removes samples of other settings. Raises ValueError if the folder holds samples of other settings, or if
        another process is making some of these."""
        path = self.folder / "settings.json"
        with self.lock:
            there = self.settings
            if path.exists():
                try:
                    there = read_json(path, "settings of samples", "choose another --output_dir, or --replace them")
                except DamagedFile:
                    if not replace:
                        raise
                    there = {}
            if there != self.settings and not replace:
                raise ValueError(f"{self.folder} holds samples of other settings: {config_diff(there, self.settings)}; "
                                 "choose another --output_dir, or --replace them")
            self.claim(range(self.total) if there != self.settings else indices, indices)
            with atomic_write(path, "w") as file:
                file.write(json.dumps(self.settings, indent=1) + "\n")
            for folder in (self.folder, self.chunks):
                remove_partials(folder)
            for part in (*self.videos.glob(".*.part.*"), *self.given.glob(".*.part.*")):  # .000012.PID.part.mp4
                if (number := part.name.split(".")[1]).isdecimal() and int(number) in indices:
                    part.unlink()
            if replace:
                self.drop(None if there != self.settings else set(indices))
            done = self.done()
        return [index for index in indices if index not in done]

    def claim(self, touched: Sequence[int], made: Sequence[int]) -> None:
        """Lock samples `made` for this process until it ends. Raises ValueError, naming the other process, if one has
        locked any of the samples `touched`, which this process will write or remove."""
        for path in self.folder.glob(".samples_*.lock"):
            first, last = map(int, path.stem.split("_")[1:])
            if first <= touched[-1] and touched[0] <= last:
                claim(path, f"samples {first} to {last} in {self.folder} are being made")
                release(path)  # its process has ended
        claim(self.folder / f".samples_{made[0]}_{made[-1]}.lock", f"{self.folder} is in use")

    def drop(self, indices: set[int] | None) -> None:
        """Remove the report and the chunks that hold any of `indices` (None: all), with all files of their samples:
        videos, real clips, previews. Damaged chunks are removed too."""
        self.report.unlink(missing_ok=True)
        (self.folder / "sheet.png").unlink(missing_ok=True)
        dropped = set() if indices is None else set(indices)
        for chunk in self.chunks.glob("*.npz"):
            try:
                held = set(chunk_indices(chunk))
            except ValueError:
                held = dropped
            if indices is None or held & indices or not held:
                chunk.unlink()
                dropped |= held
        for folder in (self.videos, self.given, self.chunks):
            for path in folder.glob("*"):
                number = re.fullmatch(r"(?:preview_(\d+)\.npy|(\d{6,})(?:\.mp4)?)", path.name)
                if number and (indices is None or int(number[1] or number[2]) in dropped):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def done(self) -> dict[int, Path]:
        """{index: path of its chunk}. Raises ValueError for a chunk of other settings, or a sample in two chunks."""
        found: dict[int, Path] = {}
        for path in sorted(self.chunks.glob("*.npz")):
            if path.name.split(".")[1] != self.run:
                raise ValueError(f"{path} is of a run with other settings: move it away")
            for index in chunk_indices(path):
                if index in found or not 0 <= index < self.total:
                    also = f"in {found[index]} too" if index in found else f"not one of 0 to {self.total - 1}"
                    raise ValueError(f"{path} holds sample {index}, which is {also}: move one away, and run again")
                found[index] = path
        return found

    def add(self, index: list[int], videos: Tensor, formats: Sequence[str], given: Tensor | None = None,
            left_out: Sequence[int] = (), **values: Tensor) -> None:
        """Write one batch; all tensors are on the CPU.

        videos: (B, 3, T, H, W) uint8. formats: "mp4" and "png" (a folder of frames, lossless), any of them. given: real
        clips to write too, shaped as `videos`. left_out: samples that could not be made. values: (B, ...) each.
        """
        shown = {self.videos: videos} if given is None else {self.given: given, self.videos: videos}

        def write(folder: Path, i: int, video: Tensor) -> None:
            if "mp4" in formats:
                write_video(folder / f"{i:06d}.mp4", video)
            if "png" in formats:
                write_frames(folder / f"{i:06d}", video)

        with ThreadPoolExecutor(NUM_WRITERS) as pool:  # a video's encoder is a process of its own
            for folder, clips in shown.items():
                folder.mkdir(exist_ok=True)
                list(pool.map(partial(write, folder), index, clips))  # list() raises the errors of the threads
        for i, *sides in zip(index, *shown.values()):
            if i < NUM_PREVIEWS:
                frames = strip_indices(sides[0].shape[1], 8)
                with atomic_write(self.chunks / f"preview_{i:02d}.npy") as file:
                    np.save(file, torch.stack(sides)[:, :, frames].numpy())
        for name in {"nll", "fake", "finite"} & values.keys():
            good = values.pop(name) if name == "finite" else values[name].isfinite()
            if bad := [i for i, row in zip(index, good) if not row.all()]:
                named = "" if name == "finite" else f" ({name})"
                raise FloatingPointError(f"samples {ranges(bad)} are not finite{named}: the weights are damaged, or "
                                         "too large for --dtype; try float32")
        first, last = min([*index, *left_out]), max([*index, *left_out])
        path = self.chunks / f"{first:07d}-{last:07d}.{self.run}.npz"
        arrays: dict[str, Any] = {name: (value.float() if value.is_floating_point() else value).numpy()
                                  for name, value in values.items()}
        with atomic_write(path) as file:
            np.savez(file, index=np.array(index, int), left_out=np.array(left_out, int), **arrays)

    def previews(self) -> dict[int, list[Tensor]]:
        """Up to eight frames (3, t, H, W) in [0, 1] of each of the first samples, by index. If real clips were written,
        the sample's real clip comes first in its list."""
        paths = {i: self.chunks / f"preview_{i:02d}.npy" for i in range(min(NUM_PREVIEWS, self.total))}
        return {i: list(torch.from_numpy(load_array(path)) / 255) for i, path in paths.items() if path.exists()}

    def collect(self) -> dict[str, np.ndarray]:
        """All arrays, their rows in the order of the indices."""
        chunks = [load_chunk(path) for path in sorted(set(self.done().values()))]
        left_out = sum(len(chunk.pop("left_out")) for chunk in chunks)
        chunks = [chunk for chunk in chunks if len(chunk["index"])]
        if not chunks:
            raise ValueError(f"none of {left_out} samples could be made: see the quarantine list in {self.folder}")
        rows = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        order = rows["index"].argsort()
        return {name: values[order] for name, values in rows.items()}

    def finish(self, make_report: Callable[[dict[str, np.ndarray]], tuple[dict, dict, dict | None]],
               table: Path) -> tuple[dict, dict] | None:
        """If all samples are made, and not reported yet, write the report and return (record, results). Otherwise print
        what is missing or reported, and return None.

        make_report: the arrays of `collect` -> (record, results, row of the table or None). report.json is written
        last, so that an interrupted report is made again.
        """
        with self.lock:
            done = self.done()
            if missing := [index for index in range(self.total) if index not in done]:
                print_main(f"{len(done)} of {self.total} samples are in {self.folder}; no report while some are "
                           f"missing: {ranges(missing)}")
                return None
            if self.report.exists():
                try:
                    read_record(self.report)
                except ValueError as error:
                    print_main(f"{error}; it is made again")
                else:
                    print_main(f"all {self.total} samples are in {self.folder}, and reported in {self.report}")
                    return None
            record, results, row = make_report(self.collect())
            if row is not None:
                append_report(table, {**row, "report": str(self.report)})
            write_record(self.report, record, results)
        return record, results


def chunk_indices(path: Path) -> list[int]:
    """The samples in a chunk, made or left out; an empty list for other files."""
    if path.suffix != ".npz":
        return []
    chunk = load_chunk(path)
    return [*chunk["index"].tolist(), *chunk["left_out"].tolist()]


def load_chunk(path: Path) -> dict[str, np.ndarray]:
    """A chunk's arrays by name. Raises DamagedFile if it is damaged; as a zip file it holds checksums."""
    with reading(path, "a chunk of samples", REMAKE), np.load(path) as file:
        chunk = dict(file)
        for name in ("index", "left_out"):
            if chunk[name].ndim != 1 or chunk[name].dtype.kind != "i":
                raise ValueError(f"its {name} is {chunk[name].shape} {chunk[name].dtype}")
        if any(len(values) != len(chunk["index"]) for name, values in chunk.items() if name != "left_out"):
            raise ValueError("its values are of different lengths")
    return chunk


def load_array(path: Path) -> np.ndarray:
    with reading(path, "frames of a sample", REMAKE):
        return np.load(path)


def write_frames(folder: Path, video: Tensor) -> None:
    """Write a video (3, T, H, W) uint8 as folder/000.png, ..."""
    folder.mkdir(exist_ok=True)
    for i, frame in enumerate(video.permute(1, 2, 3, 0).numpy()):
        with atomic_write(folder / f"{i:03d}.png") as file:
            Image.fromarray(frame).save(file, format="PNG")


class BackgroundWriter:
    """Runs one job at a time on a background thread. The next `run`, or leaving the block, waits for it and re-raises
    its error.

    seconds: the time that all jobs took.
    """

    def __init__(self, device: torch.device):
        self.device, self.pool, self.seconds = device, ThreadPoolExecutor(1), 0.0
        self.last: Future | None = None

    def __enter__(self) -> "BackgroundWriter":
        return self

    def run(self, function: Callable, *args, **kwargs) -> None:
        """Run function(*args, **kwargs) on the thread, with tensors copied to the CPU. The thread waits for the copies;
        the caller does not."""

        def to_host(value):
            return value.to("cpu", non_blocking=True) if isinstance(value, Tensor) else value  # into pinned memory

        args = tuple(to_host(value) for value in args)
        kwargs = {name: to_host(value) for name, value in kwargs.items()}
        copied = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None

        def work() -> None:
            if copied:
                copied.synchronize()
            start = time.perf_counter()
            function(*args, **kwargs)
            self.seconds += time.perf_counter() - start

        if self.last:
            self.last.result()
        self.last = self.pool.submit(work)

    def __exit__(self, kind, *_) -> None:
        self.pool.shutdown()
        if self.last and kind is None:
            self.last.result()


# First the columns of LARP's own fvd_report.csv, then ours. Other columns follow them.
COLUMNS = ("ar_model", "tokenizer", "num_samples", "cfg_scale", "temperature", "top_k", "top_p", "dtype", "NLL_sampled",
           "fvd", "protocol", "report")


def append_report(path: Path, row: dict) -> None:
    """Add a row to a csv table, unless it is there already. Several processes may do so at once. Rows are sorted by
    num_samples (most first), then by fvd (lowest first). The table keeps the columns of all its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {name: "" if value is None else str(value) for name, value in row.items()}

    def as_text(cell: str) -> str:
        """The cell, with an apostrophe before what a spreadsheet would run as a formula."""
        try:
            float(cell)
        except ValueError:
            return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
        return cell

    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = []
        if path.exists():
            rows = read_report(path)
        used = dict.fromkeys(name for each in (*rows, row) for name in each)
        names = [*(name for name in COLUMNS if name in used), *(name for name in used if name not in COLUMNS)]
        rows = [{name: as_text(each.get(name) or "") for name in names} for each in (*rows, row)]
        rows = [each for i, each in enumerate(rows) if each not in rows[:i]]
        rows.sort(key=lambda each: (-int(each["num_samples"] or 0), float(each["fvd"] or "inf")))
        with atomic_write(path, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


def read_report(path: Path) -> list[dict]:
    """The rows of a csv table of results, also of one that a spreadsheet has saved. Raises DamagedFile."""
    with (reading(path, "a table of results", "mend it, move it away, or name another with --report"),
          open(path, newline="", encoding="utf-8-sig") as file):
        reader = csv.DictReader(file, strict=True)
        if lacking := {"num_samples", "fvd"} - {*(reader.fieldnames or ())}:
            raise ValueError(f"it has no column {' and '.join(sorted(lacking))}")
        rows = list(reader)
        for number, row in enumerate(rows, 1):
            if None in row or None in row.values():
                raise ValueError(f"row {number} has not as many values as there are columns")
            if not re.fullmatch(r"\d*", row["num_samples"]):
                raise ValueError(f"row {number} has num_samples {row['num_samples']!r}")
            float(row["fvd"] or 0)
    return rows


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as text: "3 to 5, 9"."""
    runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{span[0]} to {span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)
