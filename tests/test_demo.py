"""The demo data set: data/demo.py."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from data import demo
from data.demo import MOTIONS, PHOTOS, DemoConfig, load_photo, make_demo, render_clip
from data.metadata import find_ucf, in_train

REPOSITORY = Path(__file__).parents[1]
TINY = DemoConfig(classes=("PanLeft", "ZoomIn"), groups=(1, 8), clips=1, size=(64, 48), min_frames=4, max_frames=6)


def run(script: str, *args, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, script, *map(str, args)], cwd=cwd, capture_output=True, text=True)


def frames(action: str, config: DemoConfig = TINY, group: int = 1, clip: int = 1) -> np.ndarray:
    return np.stack(list(render_clip(config, action, group, clip)))


def test_layout_split_and_content(tmp_path):
    folder = make_demo(tmp_path, TINY)
    names = find_ucf(folder)
    assert folder == tmp_path / "UCF-101"
    assert sorted(str(p.relative_to(folder)) for p in names) == [
        f"{action}/v_{action}_g{group}_c01.avi" for action in TINY.classes for group in ("01", "08")]
    assert [in_train(name.group) for name in names.values()] == [False, True] * 2

    decord = pytest.importorskip("decord")
    for path, name in names.items():
        reader = decord.VideoReader(str(path), num_threads=1)
        rendered = frames(name.action, group=name.group)
        decoded = np.stack([reader[i].asnumpy() for i in range(len(reader))])
        assert decoded.shape == rendered.shape
        assert 4 <= len(decoded) <= 6
        assert reader.get_avg_fps() == 25
        error = ((decoded.astype(float) - rendered) ** 2).mean()
        assert 10 * np.log10(255**2 / error) > 25  # dB: the pixels came through mpeg4 and 4:2:0 colours


def test_same_seed_same_files(tmp_path):
    a, b = (make_demo(tmp_path / name, TINY) for name in "ab")
    for path in find_ucf(a):
        assert path.read_bytes() == (b / path.relative_to(a)).read_bytes()
    assert not np.array_equal(frames("PanLeft")[0], frames("PanLeft", replace(TINY, seed=1))[0])


def test_clips_differ():
    config = replace(TINY, min_frames=5, max_frames=5)
    middles = [frames("PanLeft", config, group, clip)[2].tobytes() for group in (1, 8) for clip in (1, 2, 3)]
    assert len(set(middles)) == 6


@pytest.mark.parametrize("action, axis, sign", [
    ("PanLeft", 0, -1), ("PanRight", 0, 1), ("TiltUp", 1, -1), ("TiltDown", 1, 1),
    ("ZoomOut", 2, -1), ("ZoomIn", 2, 1), ("RotateLeft", 3, -1), ("RotateRight", 3, 1)])
def test_motion_is_what_the_class_says(action, axis, sign):
    """Reads the motion back from the pixels: features matched between two frames, and a similarity fitted to them."""
    config = DemoConfig(size=(320, 240), min_frames=9, max_frames=9)
    first, last = frames(action, config)[[3, 5]]  # a quarter of the whole way apart
    orb = cv2.ORB_create(2000)
    (points1, features1), (points2, features2) = (orb.detectAndCompute(image, None) for image in (first, last))
    matches = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True).match(features1, features2)
    similarity, _ = cv2.estimateAffinePartial2D(np.float32([points1[m.queryIdx].pt for m in matches]),
                                                np.float32([points2[m.trainIdx].pt for m in matches]))
    right, down = (similarity @ (160, 120, 1) - (160, 120)) / (320, 240)
    zoom, angle = np.hypot(*similarity[:, 0]), np.arctan2(similarity[1, 0], similarity[0, 0])

    # What is seen moves against the camera, and ZOOM times as far. REACH is half of the longest way.
    camera = np.array([-right, -down, np.log(zoom), -angle]) / (demo.REACH / 2 * (demo.ZOOM, demo.ZOOM, 1, 1))
    assert 0.75 < camera[axis] * sign < 1.05  # every way is at least 0.8 of the longest
    assert (abs(np.delete(camera, axis)) < 0.05).all()


def test_no_corner_leaves_the_photo():
    """The furthest centre and the longest way, for each motion, on the least photo that MARGIN allows."""
    for width, height in (320, 240), (128, 128):
        corners = np.array([[x, y] for x in (-width / 2, width / 2) for y in (-height / 2, height / 2)])
        for direction in MOTIONS.values():
            right, down, log_zoom, angle = abs(demo.REACH * direction)
            zoom = demo.ZOOM * np.exp(-log_zoom)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            reach = abs(corners @ turn / zoom).max(0) / (width, height) + (right, down) + demo.CENTRE
            assert (reach <= demo.MARGIN / 2).all()


def test_photos_ship_with_scikit_image(monkeypatch):
    def offline(*_, **__):
        raise AssertionError("a photo would be downloaded")

    monkeypatch.setattr("socket.socket", offline)
    load_photo.cache_clear()
    names = PHOTOS
    assert len(set(names)) == len(names)
    for name in names:
        photo = load_photo(name, (64, 48))
        assert photo.dtype == np.uint8 and photo.shape[2] == 3
        assert photo.shape[0] >= demo.MARGIN * 48 and photo.shape[1] >= demo.MARGIN * 64
        assert photo.std() > 10  # moon, the plainest, has 13


def test_command_finds_the_finished_set_and_replaces_only_demo_sets(tmp_path):
    settings = "--classes TiltUp --groups 7 8 --clips 1 --size 32x32 --max_frames 2 --min_frames=2".split()
    first = run("data/demo.py", "--root", tmp_path, *settings)
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{tmp_path}/UCF-101: 2 videos of 1 classes\n"
    video = tmp_path / "UCF-101/TiltUp/v_TiltUp_g07_c01.avi"
    written = video.stat().st_mtime_ns

    again = run("demo.py", "--root", tmp_path, *settings, cwd=REPOSITORY / "data")
    assert again.returncode == 0, again.stderr
    assert video.stat().st_mtime_ns == written

    other = run("data/demo.py", "--root", tmp_path, *settings, "--seed", "1")
    assert other.returncode == 1 and other.stderr.count("\n") == 1
    assert "seed 0 there, 1 asked" in other.stderr and "--replace" in other.stderr
    done = run("data/demo.py", "--root", tmp_path, *settings, "--seed", "1", "--replace")
    assert done.returncode == 0 and json.loads((tmp_path / "UCF-101/demo.json").read_text())["seed"] == 1

    (tmp_path / "UCF-101/demo.json").unlink()  # now it could be the real UCF-101
    with pytest.raises(FileExistsError, match="no demo data set"):
        make_demo(tmp_path, TINY, replace=True)
    assert video.is_file()


def test_an_interrupted_set_is_no_set(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "write_clip", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_demo(tmp_path, TINY)
    assert not (tmp_path / "UCF-101").exists()
    monkeypatch.undo()
    assert len(find_ucf(make_demo(tmp_path, TINY))) == 4


@pytest.mark.parametrize("wrong, message", [
    ({"classes": ("PanLeft", "Jump")}, "--classes has Jump; there are PanLeft"),
    ({"groups": (0, 1)}, "--groups"),
    ({"clips": 0}, "--clips is 0"),
    ({"size": (320, 241)}, "--size is 320x241"),
    ({"min_frames": 9, "max_frames": 8}, "--min_frames 9 --max_frames 8"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        DemoConfig(**wrong)


def test_wrong_size_on_the_command_line(tmp_path):
    done = run("data/demo.py", "--root", tmp_path, "--size", "big")
    assert done.returncode == 1 and done.stderr == "error: --size is big; expected WIDTHxHEIGHT, such as 320x240\n"
