"""Which videos there are: folders, csv lists, classes and labels."""
import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import reading
from common.files import manifest_sha256
from data.metadata import REPOSITORY, VIDEO_SUFFIXES, walk_videos
from data.video import NULL, VideoError, file_size

METADATA = REPOSITORY / "data" / "metadata"

UCF_NAME = re.compile(r"v_(\w+)_g\d+_c\d+")


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


def is_broken_link(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def files_sha256(files: Sequence[VideoFile]) -> str:
    """SHA-256 of the videos' paths, relative to the folder they share, and sizes in bytes (0 for a random clip, which
    has no file, and one that is missing): what caches of them are found by."""
    root = os.path.commonpath([os.path.dirname(file.path) for file in files])
    if all(is_broken_link(file.path) for file in files):
        raise FileNotFoundError(f"all {len(files)} videos under {root} are links to nothing: is their disk there?")

    def size(path: str) -> int:
        try:
            return 0 if path.startswith(NULL) or is_broken_link(path) else file_size(path)
        except VideoError:
            return 0

    sizes = (size(file.path) for file in files)
    return manifest_sha256([f"{file.path} {size}" for file, size in zip(files, sizes)], root)


def check_labels(files: Sequence[VideoFile], num_classes: int, source: str) -> None:
    """ValueError where a label is too large, or no video has one."""
    largest = max(file.label for file in files)
    if largest >= num_classes:
        raise ValueError(f"--num_classes is {num_classes}, but {source} has label {largest}: give {largest + 1}")
    if largest < 0:
        raise ValueError(f"no video of {source} has a label: give a folder of class folders, or one list whose name "
                         "starts with ucf; or train with --frame_prediction, which needs none")


def check_classes(files: Sequence[VideoFile], val_files: Sequence[VideoFile], source: str, val_source: str) -> None:
    """Labels of folders number the classes found in each: ValueError where those differ."""
    if differ := (set(class_names(files)) ^ set(class_names(val_files))) - {""}:
        raise ValueError(f"{source} and {val_source} have different classes: {', '.join(sorted(differ))} is in one "
                         "alone; give both the same, or --num_val 0")
