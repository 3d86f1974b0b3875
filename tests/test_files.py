import hashlib
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, mistake

import train_coordtok
import train_larp_tokenizer
from common.files import atomic_write, claim, git_revision, manifest_sha256, release, remove_partials
from data.cache import RowCache
from data.video import write_video
from eval.pictures import contact_sheet
from eval.report import write_record
from sampling.store import SampleStore, append_report
from training import checkpoint


@pytest.fixture
def small_files():
    """No file may grow beyond 4 kB, which a full disk looks like but for the cause."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def add_samples(folder):
    store = SampleStore(folder, {}, 9)
    store.add([0], torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8), [], fake=torch.zeros(1, 9000))


def fill_cache(folder):
    cache = RowCache(folder, "x", {}, 1, (9000,), "float32")
    cache.write(0, np.zeros((1, 9000), "float32"))


WRITERS = {
    "checkpoint": lambda folder: checkpoint.save(folder, 2, {"model": {"w": torch.rand(9000)}}),
    "export": lambda folder: checkpoint.export({"config": {}, "model": {"w": torch.rand(9000)}}, folder),
    "cache": fill_cache,
    "samples": add_samples,
    "record": lambda folder: write_record(folder / "report.json", {"a": "x" * 9000}, {}),
    "table": lambda folder: append_report(folder / "t.csv", {"num_samples": 1, "fvd": 2, "long": "x" * 9000}),
    "sheet": lambda folder: contact_sheet(folder / "sheet.png", [[torch.rand(3, 4, 96, 96)] * 2]),
    "video": lambda folder: write_video(folder / "v.mp4", torch.rand(3, 8, 64, 64)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, small_files, name):
    with pytest.raises(OSError, match=f"^{tmp_path}/.* cannot be written: (File too large|ffmpeg ended)") as error:
        WRITERS[name](tmp_path)
    assert "\n" not in str(error.value)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    assert [name for name in left if "part" in name or path_size(tmp_path, name) > 4000] == []


def path_size(folder, name: str) -> int:
    return next(folder.rglob(name)).stat().st_size


def test_what_was_there_stays_where_writing_fails(tmp_path, small_files):
    (tmp_path / "index.html").write_text("old")
    with pytest.raises(OSError, match="index.html cannot be written: File too large"), \
            atomic_write(tmp_path / "index.html", "w") as file:
        file.write("x" * 9000)
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "index.html", "w") as file:
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["index.html"] and (tmp_path / "index.html").read_text() == "old"


def other(code: str) -> subprocess.Popen:
    """A process that runs `code`, says so, and waits."""
    line = f"from pathlib import Path; from common.files import *; {code}; print(1, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", line], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    lock = tmp_path / ".lock"
    process = other(f"claim(Path({str(lock)!r}), 'x')")
    with pytest.raises(ValueError, match=rf"run is in use by process {process.pid} on .*, since 2.*: wait until it en"):
        claim(lock, "run is in use")
    process.kill()
    process.communicate()
    claim(lock, "run is in use")
    claim(lock, "run is in use")  # its own
    release(lock)
    assert not lock.exists()


@pytest.mark.parametrize("script", [train_coordtok, train_larp_tokenizer], ids=lambda script: script.__name__)
def test_a_second_run_in_one_folder_names_the_first(tmp_path, monkeypatch, capsys, script):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("of the first\n")
    process = other(f"claim(Path({str(tmp_path / 'run' / '.lock')!r}), 'x')")
    line = mistake(monkeypatch, capsys, script, "--save_dir", tmp_path, "--exp_name", "run", "--resume", "auto")
    process.kill()
    process.communicate()
    assert line.startswith(f"error: {tmp_path}/run is in use by process {process.pid} on ")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "of the first\n"


def test_partial_files_of_killed_writers_are_removed_but_not_those_being_written(tmp_path):
    write = f"w = atomic_write(Path({str(tmp_path)!r}) / 'a'); w.__enter__()"
    killed, writing = other(write), other(write)
    killed.kill()
    killed.communicate()
    assert len(os.listdir(tmp_path)) == 2
    remove_partials(tmp_path)
    assert [f".{writing.pid}." in name for name in os.listdir(tmp_path)] == [True]
    writing.kill()
    writing.communicate()


def test_the_next_fill_removes_what_a_killed_one_left(tmp_path):
    cache = RowCache(tmp_path, "x", {}, 1, (1,), "float32")
    (cache.folder / ".shard_000000.npy.host.1.partial").touch()
    RowCache(tmp_path, "x", {}, 1, (1,), "float32")
    assert os.listdir(cache.folder) == ["key.json"]


def test_shards_that_meet_name_each_other(tmp_path):
    """Two on one range; others go side by side."""
    store = SampleStore(tmp_path, {}, 9)
    process = other(f"from sampling.store import SampleStore; SampleStore({str(tmp_path)!r}, {{}}, 9).open("
                    "range(0, 4), False)")
    with pytest.raises(ValueError, match=f"samples 0 to 3 in {tmp_path} are being made by process {process.pid} on "):
        store.open(range(3, 6), False)
    with pytest.raises(ValueError, match="samples 0 to 3 .* are being made by"):
        SampleStore(tmp_path, {"seed": 2}, 9).open(range(6, 9), True)  # would drop all
    assert store.open(range(4, 9), False) == [4, 5, 6, 7, 8]
    process.kill()
    process.communicate()
    (store.videos / ".000002.77.part.mp4").touch()
    assert store.open(range(3), False) == [0, 1, 2]
    assert list(store.videos.iterdir()) == []


def test_manifest_by_hand():
    expected = hashlib.sha256(b"A/a.avi\nB/b.avi\n").hexdigest()
    assert manifest_sha256(["A/a.avi", "B/b.avi"]) == expected
    assert manifest_sha256(["/x/A/a.avi", "/x/B/b.avi"], root="/x") == expected
    assert manifest_sha256(["B/b.avi", "A/a.avi"]) != expected


def test_git_revision_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_revision() == "unknown"
