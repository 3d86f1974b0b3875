"""Split UCF-101 into DATA_ROOT/DATA_NAME_train and DATA_ROOT/DATA_NAME_test, by links or copies.

    cd data && python split_ucf.py --data_root /datasets --data_name UCF-101

The official lists follow a rule, so none is needed: split 1 tests on groups 1 to 7 of each class and trains on 8 to 25,
split 2 tests on 8 to 14, split 3 on 15 to 21. A list given by --list is checked against the rule.
Run again, it keeps what is right and adds what is missing. Anything else in the two folders is an error, as videos left
over from another split would put test videos into training.
"""
import argparse
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder, data/ included
from common.errors import reading  # noqa: E402
from data.metadata import VideoName, find_ucf, find_videos, first_few, in_train, parse_name, ucf_note  # noqa: E402
from data.usage import ArgumentParser  # noqa: E402


def check_list(file: Path, videos: dict[Path, VideoName], split: int) -> None:
    """Raise ValueError if an official training list (lines "CLASS/v_CLASS_gGG_cCC.avi LABEL") breaks the rule."""
    with reading(file, "a training list of UCF-101", f"expected trainlist0{split}.txt"):
        listed = {line.split()[0].rsplit("/", 1)[-1] for line in file.read_text(encoding="utf-8").splitlines()
                  if line.strip()}
        not_train = sorted(name for name in listed if not in_train(parse_name(name).group, split))
    unlisted = sorted(path.name for path, name in videos.items()
                      if in_train(name.group, split) and path.name not in listed)
    if not_train:
        raise ValueError(f"{file} trains on {len(not_train):,} test videos of split {split}: {first_few(not_train)}; "
                         f"expected trainlist0{split}.txt")
    if unlisted:
        raise ValueError(f"{file} lacks {len(unlisted):,} training videos of split {split}: {first_few(unlisted)}; "
                         f"expected trainlist0{split}.txt")
    if absent := len(listed) - sum(in_train(name.group, split) for name in videos.values()):
        print(f"note: {absent:,} of the {len(listed):,} videos in {file} are not in the data", file=sys.stderr)


def is_right(target: Path, source: Path, copy: bool) -> bool:
    """Whether target is the wanted copy of source (same size) or link to it."""
    if copy:
        return not target.is_symlink() and target.stat().st_size == source.stat().st_size
    return target.is_symlink() and target.exists() and target.samefile(source)


def place(target: Path, source: Path, copy: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if copy:
        part = target.with_suffix(".part")  # renamed when whole, so that an interrupted copy is not taken for a video
        shutil.copy2(source, part)
        os.replace(part, target)
    else:  # relative, so that the data can be moved or mounted elsewhere
        os.symlink(os.path.relpath(source, target.parent.resolve()), target)


def split_ucf(data_root: Path, data_name: str, split: int = 1, copy: bool = False,
              train_list: Path | None = None) -> None:
    """Make the two folders, with the class folders and file names of DATA_ROOT/DATA_NAME.

    Raises FileNotFoundError for a missing or empty folder; ValueError for misnamed videos, a list that breaks the rule,
    or files in the two folders that this call would not have made. Nothing is written then.
    """
    source_root = data_root.resolve() / data_name
    videos = find_ucf(source_root)
    if train_list is not None:
        check_list(train_list, videos, split)

    folders = {True: source_root.with_name(f"{data_name}_train"), False: source_root.with_name(f"{data_name}_test")}
    targets = {folders[in_train(name.group, split)] / path.relative_to(source_root): path
               for path, name in videos.items()}
    there = [path for folder in folders.values() if folder.is_dir() for path in find_videos(folder, empty_ok=True)]
    wrong = [path for path in there if path not in targets or not is_right(path, targets[path], copy)]
    if wrong:
        raise ValueError(f"{len(wrong):,} files are not {'copies' if copy else 'links'} that split {split} of "
                         f"{source_root} makes: {first_few(wrong)}; delete {' and '.join(map(str, folders.values()))}")
    for target in targets.keys() - set(there):
        place(target, targets[target], copy)

    for train, folder in folders.items():
        count = sum(in_train(name.group, split) == train for name in videos.values())
        print(f"{folder}: {count:,} videos")
    print(f"{len(videos):,} videos in all, {len(there):,} of them were there before")
    if note := ucf_note(videos.values(), split):
        print(note, file=sys.stderr)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, default=Path("/data"), help="folder that holds DATA_NAME")
    parser.add_argument("--data_name", default="UCF101", help="folder with CLASS/v_CLASS_gGG_cCC.avi")
    parser.add_argument("--split", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--copy", action="store_true", help="copy the files; relative links otherwise")
    parser.add_argument("--list", type=Path, dest="train_list", metavar="trainlist01.txt",
                        help="official training list to check against the rule")
    try:
        split_ucf(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
