"""The naming rules and csv lists: data/metadata.py."""
import csv
import subprocess
import sys
from pathlib import Path

import pytest

from data.metadata import (
    REPOSITORY,
    UCF101_COUNTS,
    VideoName,
    class_labels,
    find_ucf,
    find_videos,
    in_train,
    list_path,
    parse_name,
)

# Classes as in the file names of UCF-101, in the order of its authors' classInd.txt.
UCF101 = """
ApplyEyeMakeup ApplyLipstick Archery BabyCrawling BalanceBeam BandMarching BaseballPitch Basketball BasketballDunk
BenchPress Biking Billiards BlowDryHair BlowingCandles BodyWeightSquats Bowling BoxingPunchingBag BoxingSpeedBag
BreastStroke BrushingTeeth CleanAndJerk CliffDiving CricketBowling CricketShot CuttingInKitchen Diving Drumming Fencing
FieldHockeyPenalty FloorGymnastics FrisbeeCatch FrontCrawl GolfSwing Haircut Hammering HammerThrow HandStandPushups
HandstandWalking HeadMassage HighJump HorseRace HorseRiding HulaHoop IceDancing JavelinThrow JugglingBalls JumpingJack
JumpRope Kayaking Knitting LongJump Lunges MilitaryParade Mixing MoppingFloor Nunchucks ParallelBars PizzaTossing
PlayingCello PlayingDaf PlayingDhol PlayingFlute PlayingGuitar PlayingPiano PlayingSitar PlayingTabla PlayingViolin
PoleVault PommelHorse PullUps Punch PushUps Rafting RockClimbingIndoor RopeClimbing Rowing SalsaSpin ShavingBeard
Shotput SkateBoarding Skiing Skijet SkyDiving SoccerJuggling SoccerPenalty StillRings SumoWrestling Surfing Swing
TableTennisShot TaiChi TennisSwing ThrowDiscus TrampolineJumping Typing UnevenBars VolleyballSpiking WalkingWithDog
WallPushups WritingOnBoard YoYo
""".split()  # noqa: SIM905 (a list would take 101 lines)


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def run(*args, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True)


def read(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


def test_labels_of_ucf101_follow_byte_order():
    labels = class_labels(reversed(UCF101))
    assert len(labels) == 101
    assert sorted(labels.values()) == list(range(101))
    known = {"ApplyEyeMakeup": 0, "HammerThrow": 34, "Hammering": 35, "HandStandPushups": 36, "HandstandWalking": 37,
             "JumpRope": 46, "JumpingJack": 47, "YoYo": 100}
    assert {name: labels[name] for name in known} == known


def test_parse_name():
    assert parse_name("HandstandPushups/v_HandStandPushups_g01_c07.avi") == VideoName("HandStandPushups", 1, 7)
    assert parse_name(Path("v_YoYo_g25_c02.mp4")) == ("YoYo", 25, 2)


@pytest.mark.parametrize("name", ["YoYo_g01_c01.avi", "v_YoYo_g1_c01.avi", "v_YoYo_g01.avi", "v_YoYo_g01_c01"])
def test_parse_name_names_what_does_not_follow(name):
    with pytest.raises(ValueError, match=f"^{name}: .*v_CLASS_gGG_cCC.avi"):
        parse_name(name)


@pytest.mark.parametrize("split, test", [(1, range(1, 8)), (2, range(8, 15)), (3, range(15, 22))])
def test_in_train(split, test):
    assert [group for group in range(1, 26) if not in_train(group, split)] == list(test)
    assert sum(UCF101_COUNTS[split]) == 13320


def test_unknown_split():
    with pytest.raises(ValueError, match="split is 4"):
        in_train(1, 4)


def test_find_videos_follows_links_and_skips_hidden_and_other_files(tmp_path):
    touch(tmp_path / "real", "b.AVI", "a.mp4", ".hidden.avi", "notes.txt")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(tmp_path / "real")
    assert find_videos(tmp_path / "data") == [tmp_path / "data/linked/a.mp4", tmp_path / "data/linked/b.AVI"]


def test_find_ucf_names_misnamed_and_doubled_files(tmp_path):
    touch(tmp_path, "A/v_A_g01_c01.avi", "A/clip.avi", "B/v_B_g1_c1.avi")
    with pytest.raises(ValueError, match="^2 files under .*: A/clip.avi, B/v_B_g1_c1.avi$"):
        find_ucf(tmp_path)
    touch(tmp_path / "two", "x/v_A_g01_c01.avi", "y/v_A_g01_c01.avi", "y/v_A_g01_c02.avi")
    with pytest.raises(ValueError, match="^1 files are there twice .*v_A_g01_c01.avi"):
        find_ucf(tmp_path / "two")


def test_list_path_keeps_links_and_is_relative_to_the_repository(tmp_path):
    assert list_path(REPOSITORY / "data/ucf101/A/v_A_g01_c01.avi") == "data/ucf101/A/v_A_g01_c01.avi"
    assert list_path(tmp_path / "a.avi") == f"{tmp_path}/a.avi"


def test_ucf101_command(tmp_path):
    """Labels count the classes of both lists, by the name of the file; rows are sorted by path."""
    touch(tmp_path / "ucf", "HandstandPushups/v_HandStandPushups_g08_c01.avi", "Hammering/v_Hammering_g09_c01.avi",
          "HammerThrow/v_HammerThrow_g07_c01.avi", "HammerThrow/v_HammerThrow_g25_c02.avi")
    done = run("data/metadata.py", "ucf101", "--root", tmp_path / "ucf", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    train, val = read(tmp_path / "ucf101_train.csv"), read(tmp_path / "ucf101_val.csv")
    assert list(train[0]) == ["id", "path", "action", "label"]
    assert [(r["id"], Path(r["path"]).name, r["action"], r["label"]) for r in train] == [
        ("0", "v_HammerThrow_g25_c02.avi", "HammerThrow", "0"),
        ("1", "v_Hammering_g09_c01.avi", "Hammering", "1"),
        ("2", "v_HandStandPushups_g08_c01.avi", "HandStandPushups", "2"),
    ]
    assert [r["path"] for r in val] == [f"{tmp_path}/ucf/HammerThrow/v_HammerThrow_g07_c01.avi"]
    assert "3 classes found" in done.stderr and "13,320" not in done.stderr
    assert "3 classes, 3 train and 1 test videos" in done.stderr

    done = run("metadata.py", "ucf101", "--root", tmp_path / "ucf", "--out", tmp_path, "--split", 2,
               cwd=REPOSITORY / "data")
    assert done.returncode == 0, done.stderr
    assert [Path(r["path"]).name[2:-4] for r in read(tmp_path / "ucf101_val.csv")] == [
        "Hammering_g09_c01", "HandStandPushups_g08_c01"]


def test_missing_folder_names_its_neighbours(tmp_path):
    touch(tmp_path, "UCF-101/A/v_A_g01_c01.avi")
    done = run("data/metadata.py", "ucf101", "--root", tmp_path / "UCF101", "--out", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: no folder {tmp_path}/UCF101; folders in {tmp_path}: UCF-101"


@pytest.fixture
def kinetics(tmp_path) -> Path:
    """Annotations of five videos, of which one is missing and one is in both splits, and one file too many."""
    header = "label,youtube_id,time_start,time_end,split\n"
    (tmp_path / "train.csv").write_text(header + '"waxing, legs",---0dWlqevI,19,29,train\nabseiling,bbb,3,13,train\n'
                                        "abseiling,gone,0,10,train\n,ttt,1,11,test\n")
    (tmp_path / "validate.csv").write_text("\ufeff" + header + "abseiling,bbb,3,13,validate\nzumba,vvv,7,17,val\n")
    touch(tmp_path / "k600", "train/waxing/---0dWlqevI_000019_000029.mp4", "train/bbb_000003_000013.mp4",
          "val/bbb_000003_000013.mp4", "val/a/b/vvv_000007_000017.mp4", "val/other_000000_000010.mp4")
    return tmp_path


def test_k600_command(kinetics):
    done = run("data/metadata.py", "k600", "--annotations", kinetics / "train.csv", kinetics / "validate.csv",
               "--root", kinetics / "k600", "--out", kinetics)
    assert done.returncode == 0, done.stderr
    rows = {part: [(r["path"], r["action"], r["label"]) for r in read(kinetics / f"k600_{part}.csv")]
            for part in ("train", "val")}
    root = f"{kinetics}/k600"
    assert rows["train"] == [(f"{root}/train/waxing/---0dWlqevI_000019_000029.mp4", "waxing, legs", "1")]
    assert rows["val"] == [(f"{root}/val/a/b/vvv_000007_000017.mp4", "zumba", "2"),
                           (f"{root}/val/bbb_000003_000013.mp4", "abseiling", "0")]
    assert "train: 1 of 2 annotated files are missing: gone_000000_000010.mp4" in done.stdout
    assert "1 files are listed in train and val, and kept in val only: bbb_000003_000013.mp4" in done.stdout
    assert "1 rows of split 'test' are left out" in done.stdout
    assert "1 files on disk are in neither list: other_000000_000010.mp4" in done.stdout


def test_k600_writes_no_empty_list_and_stops_when_nothing_fits(kinetics):
    done = run("data/metadata.py", "k600", "--annotations", kinetics / "train.csv", "--root", kinetics / "k600",
               "--out", kinetics / "out")
    assert done.returncode == 0 and "k600_val.csv is not written" in done.stderr
    assert [p.name for p in (kinetics / "out").iterdir()] == ["k600_train.csv"]

    touch(kinetics / "raw", "xyz.mp4")
    done = run("data/metadata.py", "k600", "--annotations", kinetics / "train.csv", "--root", kinetics / "raw",
               "--out", kinetics / "none")
    assert done.returncode == 1 and done.stderr.startswith("error: none of the annotated files") \
        and done.stderr.count("\n") == 1
    assert not (kinetics / "none").exists()


def test_annotations_without_the_columns(tmp_path):
    (tmp_path / "bad.csv").write_text("label,youtube_id\na,b\n")
    done = run("data/metadata.py", "k600", "--annotations", tmp_path / "bad.csv", "--root", tmp_path)
    assert done.returncode == 1 and "lacks the columns split, time_end, time_start" in done.stderr
