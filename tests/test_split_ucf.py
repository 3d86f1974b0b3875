"""The two folders of a split: data/split_ucf.py."""
import subprocess
import sys
from pathlib import Path

import pytest

from data.split_ucf import split_ucf

REPOSITORY = Path(__file__).parents[1]
VIDEOS = ["HandstandPushups/v_HandStandPushups_g07_c01.avi", "HandstandPushups/v_HandStandPushups_g08_c01.avi",
          "YoYo/v_YoYo_g01_c01.avi", "YoYo/v_YoYo_g14_c01.avi", "YoYo/v_YoYo_g25_c02.avi"]
TRAIN, TEST = [VIDEOS[1], VIDEOS[3], VIDEOS[4]], [VIDEOS[0], VIDEOS[2]]  # of split 1


@pytest.fixture
def root(tmp_path) -> Path:
    for video in VIDEOS:
        path = tmp_path / "datasets/UCF-101" / video
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(video)
    return tmp_path / "datasets"


def run(script: str, *args, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, script, *map(str, args)], cwd=cwd, capture_output=True, text=True)


def made(root: Path, part: str) -> list[str]:
    """Files of one part, each readable as the video it is named after."""
    folder = root / f"UCF-101_{part}"
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())
    assert [(folder / file).read_text() for file in files] == files
    return files


@pytest.mark.parametrize("folder, script", [("data", "split_ucf.py"), (".", "data/split_ucf.py")])
def test_command(root, folder, script):
    done = run(script, "--data_root", root, "--data_name", "UCF-101", cwd=REPOSITORY / folder)
    assert done.returncode == 0, done.stderr
    assert made(root, "train") == TRAIN
    assert made(root, "test") == TEST
    assert "UCF-101_train: 3 videos" in done.stdout and "UCF-101_test: 2 videos" in done.stdout
    assert done.stderr.count("\n") == 1 and "split 1 of it has 101 classes, 9,537 train and 3,783 test" in done.stderr


def test_links_are_relative_and_the_data_can_move(root):
    split_ucf(root, "UCF-101")
    assert all((root / "UCF-101_train" / video).is_symlink() for video in TRAIN)
    root.rename(root.with_name("moved"))
    assert made(root.with_name("moved"), "train") == TRAIN


def test_links_through_a_linked_root_and_a_linked_data_set(root):
    """As on clusters: the data set is a link to shared storage, and DATA_ROOT is a link too."""
    store = root.parent / "far/away"
    store.mkdir(parents=True)
    (root / "UCF-101").rename(store / "videos")
    (root / "UCF-101").symlink_to(store / "videos")
    (root.parent / "deep/er").mkdir(parents=True)
    (root.parent / "deep/er/link").symlink_to(root)
    split_ucf(root.parent / "deep/er/link", "UCF-101")
    assert (root / "UCF-101_test" / TEST[0]).readlink() == Path("../../UCF-101") / TEST[0]
    assert (made(root, "train"), made(root, "test")) == (TRAIN, TEST)


def test_copies_outlive_the_source(root):
    split_ucf(root, "UCF-101", copy=True)
    for video in VIDEOS:
        (root / "UCF-101" / video).unlink()
    assert (made(root, "train"), made(root, "test")) == (TRAIN, TEST)


def test_other_splits(root):
    split_ucf(root, "UCF-101", split=2)
    assert made(root, "test") == [VIDEOS[1], VIDEOS[3]]


def test_again_keeps_what_is_right_and_adds_what_is_missing(root, capsys):
    split_ucf(root, "UCF-101")
    gone, kept = (root / "UCF-101_train" / video for video in TRAIN[:2])
    before = kept.lstat().st_ino
    gone.unlink()
    capsys.readouterr()
    split_ucf(root, "UCF-101")
    assert made(root, "train") == TRAIN
    assert kept.lstat().st_ino == before
    assert "5 videos in all, 4 of them were there before" in capsys.readouterr().out


def test_what_another_call_left_is_an_error_and_nothing_is_written(root):
    """Split 2 over split 1 would put test videos into training; a link is no copy; a dead link is no video."""
    split_ucf(root, "UCF-101")
    with pytest.raises(ValueError, match=r"4 files are not links that split 2 .*; delete .*UCF-101_train and "):
        split_ucf(root, "UCF-101", split=2)
    with pytest.raises(ValueError, match="5 files are not copies"):
        split_ucf(root, "UCF-101", copy=True)
    (root / "UCF-101_test" / TEST[0]).unlink()
    (root / "UCF-101_test" / TEST[0]).symlink_to("nowhere.avi")
    with pytest.raises(ValueError, match="^1 files .*v_HandStandPushups_g07_c01.avi"):
        split_ucf(root, "UCF-101")
    assert made(root, "train") == TRAIN


def test_half_a_copy_is_an_error(root):
    split_ucf(root, "UCF-101", copy=True)
    (root / "UCF-101_test" / TEST[0]).write_text("half")
    with pytest.raises(ValueError, match="^1 files are not copies"):
        split_ucf(root, "UCF-101", copy=True)


@pytest.mark.parametrize("lines, message", [
    (TRAIN, None),
    ([*TRAIN, "YoYo/v_YoYo_g20_c01.avi"], None),  # listed and not in the data: an incomplete copy, only noted
    ([*TRAIN, TEST[0]], "trains on 1 test videos of split 1: v_HandStandPushups_g07_c01.avi"),
    (TRAIN[1:], "lacks 1 training videos of split 1: v_HandStandPushups_g08_c01.avi"),
])
def test_a_given_list_is_checked(root, capsys, lines, message):
    file = root / "trainlist01.txt"
    file.write_text("".join(f"{line} 7\r\n" for line in lines))
    if message is None:
        split_ucf(root, "UCF-101", train_list=file)
        assert made(root, "train") == TRAIN
        assert ("1 of the 4 videos" in capsys.readouterr().err) == (len(lines) == 4)
    else:
        with pytest.raises(ValueError, match=message):
            split_ucf(root, "UCF-101", train_list=file)
        assert not (root / "UCF-101_train").exists()


def test_errors_are_one_line(root):
    def error(*args) -> str:
        done = run("data/split_ucf.py", "--data_root", root, *args, cwd=REPOSITORY)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        return done.stderr

    assert f"no folder {root}/UCF101; folders in {root}: UCF-101" in error()  # the released script's default name
    (root / "empty").mkdir()
    assert "no videos" in error("--data_name", "empty")
    assert "No such file" in error("--data_name", "UCF-101", "--list", root / "none.txt")
    (root / "UCF-101/YoYo/holiday.avi").touch()
    assert "1 files" in (line := error("--data_name", "UCF-101")) and "YoYo/holiday.avi" in line
