"""Makes the csv lists of UCF-101 and Kinetics-600. Also the rules of which files are videos and of UCF-101's names.

    python data/metadata.py ucf101 --root data/ucf101
    python data/metadata.py k600 --annotations train.csv val.csv --root data/k600

writes data/metadata/{ucf101,k600}_{train,val}.csv with columns id, path, action, label, rows sorted by path. Paths
under the repository are written relative to it, so that a list stays right when the repository moves; others absolute.
"""
import argparse
import csv
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # runs from any folder, data/ included
from common.errors import ArgumentParser, reading  # noqa: E402

VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".webm", ".mov", ".gif")
UCF_NAME = re.compile(r"v_(\w+)_g(\d\d)_c(\d\d)\.\w+")  # class, group, clip
UCF101_CLASSES = 101
UCF101_COUNTS = {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}  # split: (train, test), 13,320 in all
K600_SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val"}  # releases spell it differently


class VideoName(NamedTuple):
    action: str
    group: int
    clip: int


def parse_name(path: str | os.PathLike) -> VideoName:
    """(class, group, clip) of a file named v_CLASS_gGG_cCC.avi (any suffix, with or without folders).

    The class is the one in the file name: folder HandstandPushups of UCF-101 holds v_HandStandPushups files.
    Raises ValueError for any other name.
    """
    name = os.path.basename(path)
    match = UCF_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name}: the name is not v_CLASS_gGG_cCC.avi, as in UCF-101")
    return VideoName(match[1], int(match[2]), int(match[3]))


def class_labels(actions: Iterable[str]) -> dict[str, int]:
    """Label of each class: its place among the distinct names in byte order (capitals before small letters)."""
    return {action: label for label, action in enumerate(sorted(set(actions)))}


def in_train(group: int, split: int = 1) -> bool:
    """Whether a group of UCF-101 is in the training set: split 1 tests on groups 1 to 7, split 2 on 8 to 14, split 3 on
    15 to 21."""
    if split not in UCF101_COUNTS:
        raise ValueError(f"split is {split}; UCF-101 has 1, 2 and 3")
    return (group - 1) // 7 != split - 1


def first_few(items: Sequence, count: int = 3) -> str:
    """The first items, as text for a one-line message."""
    return ", ".join(map(str, items[:count])) + (", ..." if len(items) > count else "")


def is_hidden(name: str) -> bool:
    """Whether to skip a file or folder: it is hidden, an archiver's, or only partly written."""
    return name.startswith(".") or name == "__MACOSX" or Path(name).suffixes[-2:-1] == [".part"]


def walk_videos(root: Path, depth: int | None = None) -> Iterator[Path]:
    """The video files under root. All listings of videos use this one. Links are followed; files and folders that
    `is_hidden` names are left out.

    depth: how many levels of folders to search; 1 is root alone, None all. Raises OSError for a folder that cannot
    be read.
    """

    def fail(error: OSError) -> None:
        raise error

    # os.walk, as Path.rglob does not enter linked folders.
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        level = len(Path(folder).relative_to(root).parts) + 1
        folders[:] = [] if level == depth else [name for name in folders if not is_hidden(name)]
        yield from (Path(folder, name) for name in names
                    if Path(name).suffix.lower() in VIDEO_SUFFIXES and not is_hidden(name))


def find_videos(root: Path, empty_ok: bool = False) -> list[Path]:
    """All video files at any depth under root, sorted; see `walk_videos`.

    Raises FileNotFoundError if the folder does not exist, or holds no video unless `empty_ok`.
    """
    if not root.is_dir():
        there = sorted(p.name for p in root.parent.iterdir() if p.is_dir()) if root.parent.is_dir() else []
        raise FileNotFoundError(f"no folder {root}; folders in {root.parent}: {first_few(there, 10) or 'none'}")
    videos = sorted(walk_videos(root))
    if not videos and not empty_ok:
        raise FileNotFoundError(f"no videos ({' '.join(VIDEO_SUFFIXES)}) under {root}")
    return videos


def find_ucf(root: Path) -> dict[Path, VideoName]:
    """All videos under a folder in UCF-101's layout, with their parsed names.

    Raises ValueError if a name does not follow v_CLASS_gGG_cCC.avi, or is there twice (two copies under one root).
    """
    videos, wrong = {}, []
    for path in find_videos(root):
        try:
            videos[path] = parse_name(path)
        except ValueError:
            wrong.append(path.relative_to(root))
    if wrong:
        raise ValueError(f"{len(wrong)} files under {root} are not named v_CLASS_gGG_cCC.avi: {first_few(wrong)}")
    twice = [name for name, count in Counter(path.name for path in videos).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} files are there twice under {root}: {first_few(twice)}; name one copy's folder")
    return videos


def ucf_note(names: Iterable[VideoName], split: int) -> str | None:
    """One line on how these videos differ from the full UCF-101; None if they do not."""
    names = list(names)
    train = sum(in_train(name.group, split) for name in names)
    found = len({name.action for name in names}), train, len(names) - train
    full = UCF101_CLASSES, *UCF101_COUNTS[split]
    if found == full:
        return None
    text = "{} classes, {:,} train and {:,} test videos"
    return f"note: not the full UCF-101: {text.format(*found)}, where split {split} of it has {text.format(*full)}"


def list_path(path: Path) -> str:
    """The path as written in a list. Links are not resolved: data/ucf101 is usually one."""
    path = Path(os.path.abspath(path))
    return (path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path).as_posix()


def write_list(file: Path, actions: dict[Path, str], labels: dict[str, int]) -> None:
    """Write one list: `actions` maps the path of each video to its class, `labels` each class to its label."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = sorted((list_path(path), action) for path, action in actions.items())
    with open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["id", "path", "action", "label"])
        writer.writerows((i, path, action, labels[action]) for i, (path, action) in enumerate(rows))
    print(f"{file}: {len(rows):,} videos, {len({action for _, action in rows})} classes")


def ucf101(root: Path, out: Path, split: int = 1) -> None:
    """Write ucf101_train.csv and ucf101_val.csv (the test groups of the split)."""
    videos = find_ucf(root)
    # Labels number the classes of both lists together, so a copy that lacks a class shifts the labels after it.
    labels = class_labels(name.action for name in videos.values())
    for part, train in ("train", True), ("val", False):
        actions = {path: name.action for path, name in videos.items() if in_train(name.group, split) == train}
        write_list(out / f"ucf101_{part}.csv", actions, labels)
    if note := ucf_note(videos.values(), split):
        print(note, file=sys.stderr)
    if len(labels) != UCF101_CLASSES:
        print(f"warning: labels count the {len(labels)} classes found, so they are not those of models trained on all "
              f"{UCF101_CLASSES}", file=sys.stderr)


def read_annotations(files: Iterable[Path]) -> tuple[dict[str, dict[str, str]], Counter]:
    """Kinetics annotations as {"train": {file name: action}, "val": {...}}; rows of other splits are only counted."""
    actions: dict[str, dict[str, str]] = {"train": {}, "val": {}}
    others: Counter = Counter()
    for file in files:
        # -sig: some copies begin with a byte order mark
        with (reading(file, "annotations of Kinetics", "give the csv files as Kinetics-600 ships them"),
              open(file, newline="", encoding="utf-8-sig") as f):
            reader = csv.DictReader(f)
            lacking = {"label", "youtube_id", "time_start", "time_end", "split"} - set(reader.fieldnames or ())
            if lacking:
                raise ValueError(f"it lacks the columns {', '.join(sorted(lacking))}; it has {reader.fieldnames}")
            for row in reader:
                if row["split"] not in K600_SPLITS:
                    others[row["split"]] += 1
                    continue
                start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
                name = f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4"
                actions[K600_SPLITS[row["split"]]][name] = row["label"]
    return actions, others


def k600(annotations: Sequence[Path], root: Path, out: Path) -> None:
    """Write k600_train.csv and k600_val.csv from the annotations and the files on disk (ID_ssssss_eeeeee.mp4)."""
    actions, others = read_annotations(annotations)
    on_disk = defaultdict(list)
    for path in find_videos(root):
        on_disk[path.name].append(path)

    both = sorted(actions["train"].keys() & actions["val"].keys())
    for name in both:  # kept in validation only: no test video may be trained on
        del actions["train"][name]
    labels = class_labels([*actions["train"].values(), *actions["val"].values()])
    if not any(name in on_disk for split in actions.values() for name in split):
        raise ValueError(f"none of the annotated files is under {root}; expected names like "
                         f"{first_few([*actions['train'], *actions['val']], 1)}, found {first_few(sorted(on_disk), 1)}")
    for split, names in actions.items():
        if not names:
            print(f"no {split} rows in the annotations: k600_{split}.csv is not written", file=sys.stderr)
            continue
        # Where several folders hold a file of this name, the folder named as the split wins.
        chosen = {next((p for p in on_disk[name] if split in p.parts), on_disk[name][0]): action
                  for name, action in names.items() if name in on_disk}
        write_list(out / f"k600_{split}.csv", chosen, labels)
        if missing := sorted(names.keys() - on_disk.keys()):
            print(f"{split}: {len(missing):,} of {len(names):,} annotated files are missing: {first_few(missing)}")
    if both:
        print(f"{len(both):,} files are listed in train and val, and kept in val only: {first_few(both)}")
    for split, count in others.items():
        print(f"{count:,} rows of split {split!r} are left out")
    if unlisted := sorted(on_disk.keys() - actions["train"].keys() - actions["val"].keys()):
        print(f"{len(unlisted):,} files on disk are in neither list: {first_few(unlisted)}")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    ucf = commands.add_parser("ucf101", help="lists from the files of UCF-101")
    ucf.add_argument("--split", type=int, choices=UCF101_COUNTS, default=1)
    kinetics = commands.add_parser("k600", help="lists from the annotations of Kinetics-600 and the files on disk")
    kinetics.add_argument("--annotations", type=Path, nargs="+", required=True, help="csv files, one or several")
    for command, root in (ucf, "ucf101"), (kinetics, "k600"):
        command.add_argument("--root", type=Path, default=REPOSITORY / "data" / root, help="folder of the videos")
        command.add_argument("--out", type=Path, default=REPOSITORY / "data/metadata", help="folder of the lists")
    args = vars(parser.parse_args())
    try:
        (ucf101 if args.pop("command") == "ucf101" else k600)(**args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
