import copy
import csv
import errno
import fcntl
import logging
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT

from data import clips
from data.clips import ClipDataset, ClipKey, Quarantine, num_starts, window_frames
from data.lists import VideoFile, files_sha256, find_lists, list_csv, list_folder
from data.loader import GlobalBatchSampler, collate, make_loader
from data.metadata import find_videos, write_list
from data.video import StorageError, VideoError, write_video
from eval import reconstruction
from training.clip_cache import WholeVideos

LENGTHS = (20, 9, 14)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three videos, of 20, 9 and 14 frames and two sizes; frame t of video i is grey 10 t + 3 i."""
    root = tmp_path_factory.mktemp("videos")
    for i, length in enumerate(LENGTHS):
        grey = (torch.arange(length) * 10 + 3 * i).view(1, length, 1, 1) / 255
        write_video(root / f"{i}.mp4", grey.expand(3, length, 32, 32 + 8 * (i // 2)))
    return root


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    """The same three, and two that cannot be opened."""
    shutil.copytree(folder, tmp_path / "root")
    (tmp_path / "root" / "a.avi").write_text("not a video")
    (tmp_path / "root" / "b.avi").touch()
    return tmp_path / "root"


def dataset(root: Path, **options) -> ClipDataset:
    return ClipDataset(list_folder(root), **{"num_frames": 8, "size": 16, "rule": "coordtok", **options})


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


# --- lists ---

def test_labels_of_ucf_names_are_in_byte_order(tmp_path):
    for name in ("HammerThrow/v_HammerThrow_g01_c01", "Hammering/v_Hammering_g01_c02", "JumpRope/v_JumpRope_g01_c01",
                 "JumpingJack/v_JumpingJack_g02_c01", "HandstandPushups/v_HandStandPushups_g01_c01"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.avi").touch()
    (tmp_path / "HammerThrow" / "notes.txt").touch()
    files = list_folder(tmp_path)
    assert [file.path for file in files] == sorted(file.path for file in files)
    labels = {Path(file.path).stem.split("_")[1]: file.label for file in files}
    assert labels == {"HammerThrow": 0, "Hammering": 1, "HandStandPushups": 2, "JumpRope": 3, "JumpingJack": 4}


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


def test_null_lists_need_no_files():
    files = list_csv("null128_any.csv")
    assert len(files) == 128 and len(list_csv("null.csv")) == 224_000 and files[102].label == 1
    data = ClipDataset(files, 4, 16, "larp")
    one, two = data[ClipKey(0, 0, 5)], data[ClipKey(9, 0, 5)]
    assert one["frames"].shape == (4, 16, 16, 3) and torch.equal(one["frames"], two["frames"])
    assert not torch.equal(one["frames"], data[ClipKey(0, 1, 5)]["frames"])


# --- windows ---

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


def test_larp_frames_from_the_worker_are_exact(folder):
    shipped = collate([dataset(folder, rule="larp")[ClipKey(0, 2, 0)]])["frames"]
    native = collate([dataset(folder, rule="larp", resize="device")[ClipKey(0, 2, 0)]])["frames"]
    from data.video import to_video
    assert torch.equal(to_video(shipped, 16, "larp", "cpu"), to_video(native, 16, "larp", "cpu"))


def test_batches(folder):
    data = dataset(folder, resize="device", points=("patches", 5, (8, 2, 2), 1))
    mixed = collate([data[ClipKey(i, i)] for i in range(3)])
    assert [clip.shape for clip in mixed["frames"]] == [(8, 32, 32, 3), (8, 32, 32, 3), (8, 32, 40, 3)]
    alike = collate([data[ClipKey(i, i)] for i in range(2)])
    assert alike["frames"].shape == (2, 8, 32, 32, 3) and alike["index"].shape == (2, 5, 3)
    assert alike["n_frames"].tolist() == [8, 8] and alike["label"].dtype == torch.long and alike["skipped"] == []


def test_unknown_options_are_errors(folder):
    with pytest.raises(ValueError, match="short='loop' is none of pad, repeat"):
        dataset(folder, short="loop")
    with pytest.raises(ValueError, match="list of videos is empty"):
        ClipDataset([], 8, 16, "larp")


# --- damaged videos ---

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


# --- order ---

@pytest.mark.parametrize("order", ["replacement", "epoch"])
def test_the_global_batch_is_the_same_however_it_is_shared(order):
    def batches(world_size: int, accum: int, start: int = 0) -> list[list[ClipKey]]:
        ranks = [list(GlobalBatchSampler(30, 8, 10, rank, world_size, accum, start_step=start, order=order))
                 for rank in range(world_size)]
        assert {len(keys) for keys in ranks} == {(10 - start) * accum}
        return [sum((keys for rank in ranks for keys in rank[step * accum:(step + 1) * accum]), [])
                for step in range(10 - start)]

    whole = batches(1, 1)
    assert [key.position for batch in whole for key in batch] == list(range(80))
    assert batches(2, 1) == batches(1, 4) == batches(2, 2) == batches(4, 2) == whole
    assert batches(2, 2, start=7) == whole[7:]


def test_epochs_are_permutations():
    sampler = GlobalBatchSampler(11, 4, 4, order="epoch")
    assert sampler.steps_per_epoch == 2
    index = [key.index for keys in sampler for key in keys]
    assert len(set(index[:8])) == len(set(index[8:])) == 8 and index[:8] != index[8:]
    assert index != [key.index for keys in GlobalBatchSampler(11, 4, 4, seed=1, order="epoch") for key in keys]


def test_batches_that_cannot_be_shared_are_errors():
    with pytest.raises(ValueError, match="give a multiple of 6"):
        GlobalBatchSampler(30, 8, 10, world_size=3, accum=2)
    with pytest.raises(ValueError, match="lower the batch size"):
        GlobalBatchSampler(3, 8, 10, order="epoch")


@pytest.mark.parametrize("options", [{}, {"rule": "larp"}, {"resize": "device"}])
def test_workers_change_nothing_and_leave_the_global_generator_alone(damaged, tmp_path, options):
    """However many of their batches are kept."""
    def batches(workers: int) -> list[dict]:
        quarantine = Quarantine(tmp_path / f"{workers}.txt")
        data = dataset(damaged, points=("patches", 6, (8, 2, 2), 1), quarantine=quarantine, **options)
        return list(make_loader(data, GlobalBatchSampler(5, 4, 8), workers))

    state = torch.get_rng_state()
    for one, two in zip(batches(0), batches(2), strict=True):
        assert type(one["frames"]) is type(two["frames"])
        frames = [list(batch.pop("frames")) for batch in (one, two)]
        assert all(map(torch.equal, *frames)) and equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)


def test_unlike_clips_need_few_descriptors(folder):
    """As shipped for the device to resize; each clip had three descriptors, and the loader hung at the limit."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from data.clips import ClipDataset
from data.lists import list_folder
from data.loader import GlobalBatchSampler, make_loader
clips = ClipDataset(list_folder({str(folder)!r}), 8, 16, "coordtok", resize="device")
print(sum(len(batch["frames"]) for batch in make_loader(clips, GlobalBatchSampler(3, 48, 4), 2)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{48 * 4}\n", done.stderr


def test_a_batch_that_cannot_be_sent_is_an_error(folder, monkeypatch):
    """It was one of a thread that nobody listens to, and the batch was waited for for ever."""

    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("data.shared_memory.DupFd", refuse)
    with pytest.raises(OSError, match="a batch cannot be handed over in shared memory: Too many open files: lower"):
        next(iter(make_loader(dataset(folder), [[ClipKey(0)]], 1)))


def test_workers_that_cannot_start_are_one_line(folder, monkeypatch):
    def refuse(*_, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)  # as a full /dev/shm does
    with pytest.raises(OSError, match="1 loader workers cannot start: No space left on device: .*df /dev/shm"):
        iter(make_loader(dataset(folder), [[ClipKey(0)]], 1))


def test_the_limit_of_open_files_is_raised():
    code = """
import resource
from data.loader import raise_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 500))
raise_file_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "(500, 500)\n", done.stderr


def test_ctrl_c_while_workers_start_leaves_nothing_half_made(folder):
    """What torch says of a half-made loader would follow the one line."""
    code = f"""
import os, signal, threading, time
from data import loader
from data.clips import ClipDataset, ClipKey
from data.lists import list_folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs this behind it
threading.Thread(target=time.sleep, args=(5,), daemon=True).start()  # may be the one that gets the signal
real = loader.DataLoader._get_iterator
loader.DataLoader._get_iterator = lambda self: (os.kill(os.getpid(), signal.SIGINT), real(self))[1]
files = list_folder({str(folder)!r})
try:
    iter(loader.make_loader(ClipDataset(files, 8, 16, "coordtok"), [[ClipKey(0)]], 1))
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "interrupted\n" and done.stderr == ""
