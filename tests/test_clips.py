import copy
import fcntl
import logging
import multiprocessing
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import dataset, equal

from data.clips import ClipDataset, ClipKey, Quarantine, num_starts, window_frames
from data.lists import files_sha256, list_folder
from data.loader import collate, make_loader
from data.video import StorageError, VideoError
from eval import reconstruction
from training.clip_cache import WholeVideos


def test_the_quarantine_takes_any_names(tmp_path):
    names = ["\udcff.mp4", "new\nline.mp4", "tab\t.mp4", "back\\nslash.mp4", "a\rb.mp4", "\u2028.mp4"]
    quarantine = Quarantine(tmp_path / "bad.txt")
    for name in names:
        quarantine.add(name, "a\treason")
    with open(quarantine.path, "ab") as file:
        file.write(b"cut sho")
    again = Quarantine(quarantine.path)
    assert list(again.read()) == names and all(name in again for name in names) and "cut sho" not in again
    assert len(quarantine.path.read_bytes().split(b"\n")) == len(names) + 1


@pytest.mark.parametrize(("num_frames", "length", "stride", "starts"), [
    (20, 8, 1, 13), (8, 8, 1, 1), (5, 8, 1, 1), (20, 8, 2, 6), (15, 8, 2, 1), (1, 1, 1, 1)])
def test_windows(num_frames, length, stride, starts):
    assert num_starts(num_frames, length, stride) == starts
    last = window_frames(num_frames, starts - 1, length, stride)
    assert last[-1] < num_frames and (np.diff(last) == stride).all()
    assert len(last) == min(length, -(-num_frames // stride))


@pytest.mark.parametrize("resize", ["worker", "device"])
def test_samples_are_the_frames_they_name(folder, resize):
    data = dataset(folder, resize=resize, stride=2, num_frames=4)
    for key, start in ((ClipKey(0, 0, 3), 3), (ClipKey(0, 2, 0), 0)):
        sample = data[key]
        assert sample["start"] == start and sample["n_frames"] == 4 and sample["position"] == 0
        size = (16, 16) if resize == "worker" else (32, 32 + 8 * (key.index // 2))
        assert sample["frames"].shape == (4, *size, 3) and sample["frames"].dtype == torch.uint8
        grey = sample["frames"].float().mean((1, 2, 3))
        torch.testing.assert_close(grey, (start + torch.arange(4.0) * 2) * 10 + 3 * key.index, atol=2, rtol=0)


def test_short_videos(folder):
    for resize in ("worker", "device"):
        padded = dataset(folder, num_frames=12, resize=resize)[ClipKey(0, 1)]
        repeated = dataset(folder, num_frames=12, resize=resize, short="repeat")[ClipKey(0, 1)]
        assert padded["n_frames"] == repeated["n_frames"] == 9
        assert (padded["frames"][9:] == 0).all() and len(padded["frames"]) == 12
        assert torch.equal(repeated["frames"][8:], repeated["frames"][8:9].expand(4, -1, -1, -1))


def test_where_windows_start(folder):
    starts = {dataset(folder)[ClipKey(position, 0)]["start"] for position in range(60)}
    assert starts == set(range(13))
    assert dataset(folder, window="start")[ClipKey(3, 0)]["start"] == 0
    assert dataset(folder, window="center")[ClipKey(3, 0)]["start"] == 6


def test_a_sample_depends_on_seed_and_key_alone(folder):
    points = ("patches", 32, (8, 2, 2), 1)
    data, other = dataset(folder, points=points), dataset(folder, points=points, seed=1)
    keys = [ClipKey(position) for position in range(12)]
    samples = [data[key] for key in keys]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(data)))
    assert all(equal(copied[key], sample) for key, sample in reversed(list(zip(keys, samples))))
    assert len({sample["path"] for sample in samples}) == 3  # no index: files are drawn
    assert any(not equal(other[key], sample) for key, sample in zip(keys, samples))
    assert samples[0]["index"].shape == (32, 3) and samples[0]["index"].dtype == torch.int64


def test_points_lie_in_real_frames(folder):
    for kind in ("patches", "frames"):
        sample = dataset(folder, num_frames=16, points=(kind, 48, (16, 2, 2), 1))[ClipKey(0, 1)]
        assert sample["n_frames"] == 9 and sample["index"][:, 0].max() == 8


def test_unknown_options_are_errors(folder):
    with pytest.raises(ValueError, match="short='loop' is none of pad, repeat"):
        dataset(folder, short="loop")
    with pytest.raises(ValueError, match="list of videos is empty"):
        ClipDataset([], 8, 16, "larp")


def test_damaged_videos_are_replaced_and_named_once(damaged, tmp_path, caplog):
    files = list_folder(damaged)
    bad = [i for i, file in enumerate(files) if file.path.endswith(".avi")]
    data = dataset(damaged, quarantine=Quarantine(tmp_path / "bad.txt"))
    keys = [ClipKey(position, index) for position in range(6) for index in (None, *bad)]
    with caplog.at_level(logging.WARNING):
        samples = [data[key] for key in keys]
    lines = (tmp_path / "bad.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == sorted(files[i].path for i in bad)
    assert f"{damaged}/b.avi\tthe file is empty" in lines and len(caplog.records) == 2
    # The same whether the quarantine was empty or full, in one order or the other.
    assert all(equal(data[key], sample) for key, sample in zip(keys, samples))
    fresh = dataset(damaged)
    assert all(equal(fresh[key], sample) for key, sample in reversed(list(zip(keys, samples))))


def test_partly_damaged_videos_are_used_where_good(folder, tmp_path):
    """Else what a key gives would depend on whether another key has met the damage before."""
    quarantine = Quarantine(tmp_path / "bad.txt")
    data = dataset(folder, quarantine=quarantine)
    sample = data[ClipKey(0, 0, 2)]
    assert data[ClipKey(1, 0, 30)]["path"]  # beyond the end
    assert list(quarantine.read().values())[0].startswith("in part: ") and data.files[0].path not in quarantine
    assert equal(data[ClipKey(0, 0, 2)], sample)
    quarantine.add(data.files[0].path, "the decoder hangs")
    quarantine.add(data.files[0].path, "in part: again")
    assert data.files[0].path in quarantine and len(quarantine) == 1


def test_evaluation_skips_and_counts(damaged):
    data = dataset(damaged, damaged="skip", window="start")
    batch = collate([data[ClipKey(i, i)] for i in range(5)])
    assert batch["position"].tolist() == [0, 1, 2] and len(batch["frames"]) == 3
    assert batch["skipped"][1] == (f"{damaged}/b.avi", "the file is empty")
    none = collate([data[ClipKey(i, i)] for i in (3, 4)])
    assert len(none["frames"]) == len(none["path"]) == len(none["label"]) == 0 and len(none["skipped"]) == 2


def test_nothing_left_is_an_error(damaged, tmp_path):
    for path in damaged.glob("*.mp4"):
        path.write_bytes(b"also not a video")
    data = dataset(damaged, quarantine=Quarantine(tmp_path / "bad.txt"))
    with pytest.raises(VideoError, match=f"no readable video left of 5 under {damaged} .see {tmp_path}/bad.txt"):
        data[ClipKey(0)]


def test_a_disk_that_is_away_quarantines_nothing(folder, tmp_path, monkeypatch):
    """Nor does it where evaluation looks for lengths, or a cache is filled."""
    monkeypatch.setattr("data.video.PATIENCE", 0)
    root, away = tmp_path / "root" / "a", tmp_path / "away"
    shutil.copytree(folder, root)
    quarantine = Quarantine(tmp_path / "bad.txt")
    data = dataset(root, quarantine=quarantine)
    expected = data[ClipKey(0)]
    root.rename(away)
    whole = WholeVideos(data.files, 16, "coordtok", quarantine, 60)
    for read in (lambda: data[ClipKey(0)], lambda: reconstruction.length(data.files[0], quarantine, 60),
                 lambda: whole[0], lambda: files_sha256(data.files),
                 lambda: next(iter(make_loader(data, [[ClipKey(0)]], 1)))):
        with pytest.raises(StorageError, match="[012].mp4 cannot be read: No such file or directory"):
            read()
    assert len(quarantine) == 0
    away.rename(root)
    assert equal(data[ClipKey(0)], expected)


def test_quarantined_videos_are_looked_at_again(folder, damaged, tmp_path):
    """By a run that goes on: a file may have been written anew since."""
    quarantine = Quarantine(tmp_path / "bad.txt")
    data = dataset(damaged, quarantine=quarantine)
    for index in (3, 4):
        data[ClipKey(0, index)]
    quarantine.add(data.files[0].path, "in part: frame 9")
    shutil.copy(folder / "1.mp4", data.files[3].path)
    again = Quarantine(tmp_path / "bad.txt")
    again.review()
    assert [Path(path).name for path in Quarantine(tmp_path / "bad.txt").read()] == ["b.avi", "0.mp4"]
    assert dataset(damaged, quarantine=again)[ClipKey(0, 3)]["path"] == data.files[3].path


def report_damage(path: str) -> None:
    quarantine = Quarantine(path)
    for i in range(50):
        quarantine.add(f"/{i}.avi", "broken")


def test_a_quarantine_shared_by_processes_holds_each_video_once(tmp_path):
    path = str(tmp_path / "runs" / "bad.txt")
    watcher = Quarantine(path)
    assert "/7.avi" not in watcher and len(watcher) == 0
    processes = [multiprocessing.get_context("fork").Process(target=report_damage, args=(path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(Path(path).read_text().splitlines()) == 50
    assert "/7.avi" in watcher and len(watcher) == 50


def test_a_quarantine_waits_for_the_process_that_writes(tmp_path):
    quarantine = Quarantine(tmp_path / "bad.txt")
    with (tmp_path / "bad.txt").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        other = threading.Thread(target=quarantine.add, args=("/0.avi", "broken"))
        other.start()
        other.join(timeout=0.2)
        file.write("/0.avi\tbroken\n")
    other.join()
    assert (tmp_path / "bad.txt").read_text() == "/0.avi\tbroken\n"
