import csv
from pathlib import Path

import pytest
import torch

from data import clips
from data.clips import ClipDataset, ClipKey
from data.lists import VideoFile, find_lists, list_csv, list_folder, list_videos
from data.metadata import find_videos, write_list


def test_labels_of_ucf_names_are_in_byte_order(tmp_path, capsys):
    for name in ("HammerThrow/v_HammerThrow_g01_c01", "Hammering/v_Hammering_g01_c02", "JumpRope/v_JumpRope_g01_c01",
                 "JumpingJack/v_JumpingJack_g02_c01", "HandstandPushups/v_HandStandPushups_g01_c01"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.avi").touch()
    (tmp_path / "HammerThrow" / "notes.txt").touch()
    files = list_folder(tmp_path)
    assert [file.path for file in files] == sorted(file.path for file in files)
    assert not capsys.readouterr().out  # UCF-101's own folders differ in capitals
    labels = {Path(file.path).stem.split("_")[1]: file.label for file in files}
    assert labels == {"HammerThrow": 0, "Hammering": 1, "HandStandPushups": 2, "JumpRope": 3, "JumpingJack": 4}


def test_a_class_from_a_name_is_said_once(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    for name in ("v_Theirs_g01_c01.avi", "v_Theirs_g01_c02.avi"):
        (tmp_path / "mine" / name).touch()
    list_folder(tmp_path)
    list_folder(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("c01.avi is named as in UCF-101: its class is Theirs, of its name, and not its folder's")


def test_an_empty_folder_names_only_flags_that_are_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="files$"):
        list_videos(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="files .--data_root, --video_name.$"):
        list_folder(tmp_path)


def test_other_folders(tmp_path, folder):
    assert [file.label for file in list_folder(folder)] == [-1, -1, -1]
    for name in ("b/x.MP4", "a/y.gif"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert list_folder(tmp_path) == [VideoFile(str(tmp_path / "a/y.gif"), 0), VideoFile(str(tmp_path / "b/x.MP4"), 1)]
    (tmp_path / "c").mkdir()
    with pytest.raises(FileNotFoundError, match="no videos under .*looked there"):
        list_folder(tmp_path / "c")


def test_hidden_and_partial_files_are_neither_videos_nor_classes(tmp_path):
    """As notebooks, macOS, downloaders and killed writers leave them; class folders without videos do not count."""
    for name in (".ipynb_checkpoints/x-checkpoint.mp4", "__MACOSX/._x.mp4", "a/._x.mp4", "a/x.mp4", "b/y.avi",
                 "b/.000000.part.mp4", "b/z.part.mp4", "b/z.mp4.part", "aa/notes.txt", ".b/q.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "ab").mkdir()
    paths = [tmp_path / "a/x.mp4", tmp_path / "b/y.avi"]
    assert list_folder(tmp_path) == [VideoFile(str(path), label) for label, path in enumerate(paths)]
    assert find_videos(tmp_path) == paths
    (tmp_path / "b" / "deep").mkdir()
    (tmp_path / "b" / "deep" / "w.mp4").touch()
    assert len(list_folder(tmp_path)) == 2 and len(find_videos(tmp_path)) == 3


def write_csv(path: Path, rows: list[tuple]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "path", "action", "label"), *rows])
    return str(path)


def test_csv_lists(tmp_path):
    ucf = write_csv(tmp_path / "ucf101_x.csv", [(0, "data/ucf101/b.avi", "B", 1), (1, "data/ucf101/a.avi", "A", 0)])
    k600 = write_csv(tmp_path / "k600_x.csv", [(0, "/abs/c.mp4", "C", 7)])
    root = f"{Path(clips.__file__).parents[1]}/data/ucf101"
    assert list_csv(ucf) == [VideoFile(f"{root}/a.avi", 0), VideoFile(f"{root}/b.avi", 1)]
    assert list_csv(k600) == [VideoFile("/abs/c.mp4", -1)]
    assert list_csv(k600, want_labels=True) == [VideoFile("/abs/c.mp4", 7)]
    joined = list_csv(f"{ucf}+{k600}", want_labels=True)
    assert [file.path for file in joined] == ["/abs/c.mp4", f"{root}/a.avi", f"{root}/b.avi"] and joined[1].label == -1
    with pytest.raises(FileNotFoundError, match="no list nothing.csv"):
        list_csv("nothing.csv")
    (tmp_path / "other.csv").write_text("name\nx\n")
    with pytest.raises(ValueError, match="expected columns id, path, action, label"):
        list_csv(str(tmp_path / "other.csv"))


def test_lists_of_any_names(tmp_path):
    folder = tmp_path / "a+b"
    folder.mkdir()
    names = ["/x/\udcff.mp4", "/x/new\nline.mp4", "/x/tab\t.mp4", "/x/\u2028.mp4"]
    labels = {"": 0}
    write_list(folder / "ucf.csv", {Path(name): "" for name in names}, labels)
    (folder / "marked.csv").write_bytes(b"\xef\xbb\xbfpath\n/y.mp4\n")
    assert list_csv(str(folder / "ucf.csv")) == [VideoFile(name, 0) for name in sorted(names)]
    assert list_csv(f"{folder / 'marked.csv'}+{folder / 'ucf.csv'}")[-1] == VideoFile("/y.mp4", -1)
    assert find_lists(f"{folder / 'marked.csv'}+{folder / 'ucf.csv'}") == [folder / "marked.csv", folder / "ucf.csv"]


def test_null_lists_need_no_files():
    files = list_csv("null128_any.csv")
    assert len(files) == 128 and len(list_csv("null.csv")) == 224_000 and files[102].label == 1
    data = ClipDataset(files, 4, 16, "larp")
    one, two = data[ClipKey(0, 0, 5)], data[ClipKey(9, 0, 5)]
    assert one["frames"].shape == (4, 16, 16, 3) and torch.equal(one["frames"], two["frames"])
    assert not torch.equal(one["frames"], data[ClipKey(0, 1, 5)]["frames"])
