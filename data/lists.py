"""Lists of videos: from folders and csv files, with their classes and labels, and the checks of those.

Which files count as videos, and the naming rule of UCF-101, are in data/metadata.py, which needs no torch.
"""
import csv
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from common.console import print_main
from common.errors import reading, shown
from common.files import manifest_sha256
from data.metadata import REPOSITORY, UCF_NAME, VIDEO_SUFFIXES, walk_videos
from data.video import NULL, VideoError, file_size

METADATA = REPOSITORY / "data" / "metadata"


class VideoFile(NamedTuple):
    path: str
    label: int = -1  # -1: unknown


def list_folder(root: str | Path, flags: str = " (--data_root, --video_name)") -> list[VideoFile]:
    """The videos in ROOT and ROOT/CLASS, sorted by path; hidden files and folders are left out (`walk_videos`).

    Only classes that have videos count; they are numbered in byte order. A file named as in UCF-101 (v_CLASS_gGG_cCC)
    has the class in its name, since folder HandstandPushups holds v_HandStandPushups files; a line says so where it is
    another word. Another video has the class of its folder, and one directly in ROOT has none (-1). Raises
    FileNotFoundError where there are no videos.

    flags: those that name ROOT, for the message.
    """
    root = Path(root)
    paths = sorted(map(str, walk_videos(root, depth=2))) if root.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"no videos under {root.absolute()}: looked there and in its class folders for "
                                f"{', '.join(VIDEO_SUFFIXES)} files{flags}")
    names = [_class_name(Path(path), root) for path in paths]
    for path, name in zip(paths, names):
        folder = Path(path).parent
        if name and folder != root and folder.name.lower() != name.lower():  # UCF-101's differ in capitals
            _say_once(f"{shown(path)} is named as in UCF-101: its class is {name}, of its name, and not its folder's")
            break
    labels: dict[str | None, int] = {name: label for label, name in enumerate(sorted({name for name in names if name}))}
    return [VideoFile(path, labels.get(name, -1)) for path, name in zip(paths, names)]


@cache
def _say_once(line: str) -> None:
    print_main(line)


def _class_name(path: Path, root: Path) -> str | None:
    ucf = UCF_NAME.fullmatch(path.name)
    if ucf:
        return ucf[1]
    return path.parent.name if path.parent != root else None


def list_csv(names: str, want_labels: bool = False) -> list[VideoFile]:
    """The videos of "a.csv+b.csv", sorted by path.

    A list is a file, or the name of one in data/metadata, with columns id, path, action, label. Relative paths start at
    the repository. Labels are read from a single list whose name starts with "ucf", or from any single list if
    `want_labels`; otherwise they are -1. "null128..." is 128 random clips without files, other "null..." 224,000.
    """
    if names.startswith("null"):
        count = 128 if names.startswith("null128") else 224_000
        return [VideoFile(f"{NULL}{i:06d}", i % 101) for i in range(count)]
    lists = find_lists(names)
    labelled = len(lists) == 1 and (want_labels or lists[0].name.startswith("ucf"))
    column = "label" if labelled else None
    return sorted(file for path in lists for file in _read_csv(path, column))


def find_lists(names: str) -> list[Path]:
    """The lists of "a.csv+b.csv", each a file or the name of one in data/metadata. Their paths may hold a "+"."""
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
        if lacking := {"path", label_column or "path"} - {*columns}:
            raise ValueError(f"it has columns {', '.join(columns) or 'none'}, without {' and '.join(sorted(lacking))}")
        files = []
        for row in reader:
            label = row[label_column] if label_column else "-1"
            if not row["path"] or not re.fullmatch(r"-1|\d{1,6}", label or ""):  # names are kept by label
                raise ValueError(f"line {reader.line_num} has path {row['path']!r} and label {label!r}")
            files.append(VideoFile(str(REPOSITORY / row["path"]), int(label)))
        if not files:
            raise ValueError("it has no rows")
    return files


def list_videos(source: str) -> list[VideoFile]:
    """Videos of a folder, of a csv list, or of a text file with one path a line; sorted by path. Of an output folder of
    sample.py these are the samples alone, without the given clips beside them."""
    if (samples := Path(source, "sampled_videos")).is_dir():
        return list_folder(samples, flags="")
    if Path(source).is_dir():
        return list_folder(source, flags="")
    if source.endswith(".csv") or "+" in source and not Path(source).is_file():
        return list_csv(source)
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source}: no such folder or list of videos")
    text = Path(source).read_text(encoding="utf-8-sig", errors="surrogateescape")
    paths = sorted(line for line in text.split("\n") if line.strip())
    if not any(map(os.path.isfile, paths)):
        raise ValueError(f"{shown(source)} cannot be read as a list of videos: none of its {len(paths)} lines is the "
                         "path of a file; give a folder, a csv list, or a text file with one path a line")
    return [VideoFile(path) for path in paths]


def class_names(files: Sequence[VideoFile]) -> list[str]:
    """The folder name of each label's first video, by label ("" for a label without videos). Empty if a video has no
    label."""
    names = {file.label: Path(file.path).parent.name for file in reversed(files)}
    return [] if -1 in names else [names.get(label, "") for label in range(max(names) + 1)]


def is_broken_link(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def files_sha256(files: Sequence[VideoFile]) -> str:
    """SHA-256 that identifies a list of videos in the keys of caches: of their paths, relative to the folder they
    share, and sizes in bytes (0 for a random clip, which has no file, and for a missing file)."""
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


def check_labels(files: Sequence[VideoFile], num_classes: int, source: str, trained: bool = False) -> None:
    """ValueError where a label is not below the model's `num_classes`, or labels are missing.

    trained: the model is trained, so every video needs a label that it knows. To train one, some videos need a label.
    """
    labels = [file.label for file in files]
    if max(labels) >= num_classes:
        advice = "give one list like the one that it was trained on"
        if not trained:
            advice = f"give --num_classes {max(labels) + 1}"
        raise ValueError(f"{source} has label {max(labels)}, but the model has {num_classes} classes: {advice}")
    if max(labels) < 0 or trained and min(labels) < 0:
        which = "no video of {} has a label" if max(labels) < 0 else "{} has videos without a label"
        raise ValueError(f"{which.format(source)}: give a folder of class folders, or one list whose name starts with "
                         "ucf; a model for --frame_prediction needs none")


def check_num_classes(num_classes: int, names: Sequence[str], source: str) -> None:
    """ValueError where a model's `num_classes` is neither 1 nor the number of the classes `names` of `source`."""
    if num_classes not in (1, len(names)):
        raise ValueError(f"--num_classes is {num_classes}, but {source} has {len(names)} classes: give that, or 1 for "
                         "a model without classes")


def check_class_names(files: Sequence[VideoFile], known: Sequence[str], source: str) -> None:
    """ValueError where a label is another class in `files` than in a trained model, which knows it as known[label]."""
    for label, (here, there) in enumerate(zip(class_names(files), known)):
        if here and there and here != there:
            raise ValueError(f"label {label} is {here} in {source}, and {there} to the model: give a list with the "
                             "labels that it was trained on")


def check_classes(files: Sequence[VideoFile], val_files: Sequence[VideoFile], source: str, val_source: str) -> None:
    """ValueError where training and validation videos have different classes: each list numbers its own."""
    if differ := (set(class_names(files)) ^ set(class_names(val_files))) - {""}:
        raise ValueError(f"{source} and {val_source} have different classes: {', '.join(sorted(differ))} is in one "
                         "alone; give both the same, or --num_val 0")
