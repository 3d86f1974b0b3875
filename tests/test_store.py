"""sampling/store.py and sampling/real_clips.py."""
import csv
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from common.cli import config_diff
from data.clips import ClipDataset, ClipKey
from data.lists import VideoFile
from sampling.real_clips import drawn_clips, real_batches, segments
from sampling.store import BackgroundWriter, SampleStore, append_report, ranges


def fill(store, indices):
    videos = torch.randint(256, (len(indices), 3, 4, 8, 8), dtype=torch.uint8)
    store.add(indices, videos, [], value=torch.tensor(indices) * 2.0)


def report(rows):
    """(record, results, row) that say how often they were made."""
    return {}, {"sum": float(rows["value"].sum())}, {"num_samples": len(rows["value"]), "fvd": 1.5}


def test_a_store_keeps_batches_and_knows_what_is_missing(tmp_path):
    store = SampleStore(tmp_path, {"seed": 0}, 6)
    assert store.open(range(6), False) == list(range(6))
    fill(store, [4, 5])
    fill(store, [0, 2])
    again = SampleStore(tmp_path, {"seed": 0}, 6)
    assert again.open(range(6), False) == [1, 3]
    assert again.finish(report, tmp_path / "table.csv") is None
    fill(again, [1, 3])
    rows = again.collect()
    assert rows["index"].tolist() == list(range(6))
    assert rows["value"].tolist() == [0, 2, 4, 6, 8, 10]
    assert list(again.previews()) == list(range(6))
    assert again.previews()[0][0].shape == (3, 4, 8, 8)


def test_shards_that_overlap_or_are_foreign_are_named(tmp_path):
    store = SampleStore(tmp_path / "a", {"seed": 0}, 4)
    fill(store, [0, 1])
    fill(store, [1, 2])
    with pytest.raises(ValueError, match=r"0000001-0000002.* holds sample 1, which is in .*0000000-0000001.* too"):
        store.open(range(4), False)
    store = SampleStore(tmp_path / "b", {"seed": 0}, 4)
    fill(store, [3, 4])
    with pytest.raises(ValueError, match="holds sample 4, which is not one of 0 to 3"):
        store.done()
    store, other = (SampleStore(tmp_path / name, {"seed": seed}, 4) for seed, name in enumerate("cd"))
    fill(other, [0])
    (chunk,) = other.chunks.glob("*.npz")
    chunk.rename(store.chunks / chunk.name)
    with pytest.raises(ValueError, match="is of a run with other settings"):
        store.done()


def test_replace_makes_a_shards_own_samples_anew(tmp_path):
    store = SampleStore(tmp_path, {"seed": 0}, 4)
    store.open(range(4), False)
    fill(store, [0, 1])
    fill(store, [2, 3])
    assert store.finish(report, tmp_path / "table.csv")
    assert store.open(range(2), True) == [0, 1]
    assert store.done().keys() == {2, 3}
    assert not store.report.exists()
    other = SampleStore(tmp_path, {"seed": 1}, 4)
    with pytest.raises(ValueError, match="seed 0 there, 1 here"):
        other.open(range(4), False)
    assert other.open(range(2), True) == [0, 1]
    assert other.done() == {}, "samples of other settings are dropped"


def written(store) -> set[str]:
    """What there is of samples, as folder/name."""
    return {f"{path.parent.name}/{path.name}" for folder in (store.videos, store.given) if folder.exists()
            for path in folder.iterdir()} | {path.name for path in store.chunks.glob("preview*")}


@pytest.mark.parametrize("seed", [0, 1], ids=["same_settings", "other_settings"])
def test_replace_leaves_nothing_of_what_it_replaces(tmp_path, seed):
    """Samples 0 to 5 of one model, then 0 and 1, or 0 to 3, of another: nothing of the first may stand beside them."""
    store = SampleStore(tmp_path, {"seed": 0}, 6)
    store.open(range(6), False)
    clips = torch.zeros(2, 3, 4, 16, 16, dtype=torch.uint8)
    for start in (0, 2, 4):
        store.add([start, start + 1], clips, ["mp4", "png"], clips)
    (tmp_path / "sheet.png").touch()
    (store.videos / "notes.txt").touch()
    store = SampleStore(tmp_path, {"seed": seed}, 6 - 2 * seed)
    missing = store.open(range(2), True)
    assert missing == [0, 1]
    left = range(2, 6) if seed == 0 else ()  # those of other chunks of the same settings are as good as before
    named = {f"{folder}/{i:06d}" for i in left for folder in ("sampled_videos", "gt")}
    kept = {*named, *(f"{name}.mp4" for name in named), *(f"preview_{i:02d}.npy" for i in left)}
    assert written(store) == {"sampled_videos/notes.txt", *kept}
    assert not (tmp_path / "sheet.png").exists()


def test_a_damaged_chunk_is_named(tmp_path):
    store = SampleStore(tmp_path, {}, 40)
    store.open(range(40), False)
    fill(store, list(range(40)))
    (chunk,) = store.chunks.glob("*.npz")
    whole = chunk.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(torch.arange(40).double().mul(2).float().numpy().tobytes()) + 40] ^= 4
    for content in (b"", whole[:100], whole[:-100], bytes(flipped)):
        chunk.write_bytes(content)
        with pytest.raises(ValueError, match=f"{chunk.name} cannot be read .*delete it, and it is made again"):
            store.finish(report, tmp_path / "table.csv")
    assert not store.report.exists()
    assert store.open(range(2), True) == [0, 1] and store.done() == {}, "--replace removes it"
    preview = store.chunks / "preview_05.npy"
    preview.write_bytes(b"")
    with pytest.raises(ValueError, match="preview_05.npy cannot be read as frames of a sample"):
        store.previews()


def test_chunks_outlast_a_power_cut(tmp_path, monkeypatch):
    """What they hold is on the disk before they have their name."""
    store, calls = SampleStore(tmp_path, {}, 4), []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda old, new: calls.append(new.name) or replace(old, new))
    fill(store, [0, 1])
    (chunk,) = store.chunks.glob("*.npz")
    assert calls[-2:] == [chunk.stat().st_size, chunk.name]
    assert not [path for path in store.chunks.iterdir() if path.suffix not in (".npz", ".npy")]


def test_a_damaged_report_is_made_again(tmp_path, capsys):
    store = SampleStore(tmp_path, {}, 2)
    fill(store, [0, 1])
    assert store.finish(report, tmp_path / "table.csv")
    assert store.finish(report, tmp_path / "table.csv") is None, "it is there"
    whole = store.report.read_text()
    for text in ("garbage", whole.replace("2.0", "3.0"), ""):
        store.report.write_text(text)
        assert store.finish(report, tmp_path / "table.csv")
        assert "report.json is damaged" in capsys.readouterr().out
        assert store.report.read_text() == whole
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 2


def test_cells_of_the_table_are_no_formulas(tmp_path):
    path, row = tmp_path / "table.csv", {"num_samples": 2, "fvd": 1.5, "cfg_interval": -1, "top_p": "-1e-3"}
    for _ in range(2):
        for name in ("=HYPERLINK(1)", "+1+1", "-2+3", "@SUM(1)", "\tx", "a=b"):
            append_report(path, {**row, "ar_model": name})
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["'=HYPERLINK(1)", "'+1+1", "'-2+3", "'@SUM(1)", "'\tx", "a=b"]
    assert [each["ar_model"] for each in rows] == names, "each is there once"
    assert {(each["cfg_interval"], each["top_p"]) for each in rows} == {("-1", "-1e-3")}


def test_black_videos_are_an_error(tmp_path):
    """As of weights that are not finite, with no number to tell it by."""
    store = SampleStore(tmp_path, {}, 4)
    with pytest.raises(FloatingPointError, match="samples 2 are not finite: the weights are damaged"):
        store.add([1, 2], torch.zeros(2, 3, 2, 8, 8, dtype=torch.uint8), [], finite=torch.tensor([True, False]))
    store.add([1, 2], torch.zeros(2, 3, 2, 8, 8, dtype=torch.uint8), [], finite=torch.tensor([True, True]))
    assert store.collect().keys() == {"index"}


@pytest.mark.parametrize("name", ["nll", "fake"])
def test_samples_of_no_finite_value_are_an_error(tmp_path, name):
    store = SampleStore(tmp_path, {}, 4)
    values = torch.tensor([1.0, torch.nan, torch.inf])
    with pytest.raises(FloatingPointError, match=rf"samples 2 to 3 are not finite \({name}\)"):
        store.add([1, 2, 3], torch.zeros(3, 3, 2, 8, 8, dtype=torch.uint8), [], **{name: values})
    assert store.done() == {}


def test_whoever_finishes_last_reports_once(tmp_path):
    """Eight shards end at the same time."""
    SampleStore(tmp_path / "out", {}, 16).open(range(16), False)
    together, made = threading.Barrier(8), []

    def shard(number):
        store = SampleStore(tmp_path / "out", {}, 16)
        fill(store, [2 * number, 2 * number + 1])
        together.wait()
        return store.finish(lambda rows: made.append(number) or report(rows), tmp_path / "table.csv")

    with ThreadPoolExecutor(8) as pool:
        reports = list(pool.map(shard, range(8)))
    assert len(made) == 1
    assert [each for each in reports if each] == [({}, {"sum": 240.0})]
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "out" / "report.json").read_text())["results"]["sum"] == 240


def test_a_report_that_was_killed_is_made_again(tmp_path):
    store = SampleStore(tmp_path, {}, 2)
    fill(store, [0, 1])

    def dies(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.finish(dies, tmp_path / "table.csv")
    append_report(tmp_path / "table.csv", {**report(store.collect())[2], "report": str(store.report)})
    assert store.finish(report, tmp_path / "table.csv"), "killed after the row was written, say"
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 2


def test_the_table_has_the_published_columns_first(tmp_path):
    path = tmp_path / "table.csv"
    append_report(path, {"mode": "SDE", "tokenizer": "t", "num_samples": 2, "fvd": 1.0, "report": "a"})
    append_report(path, {"fvd": 2.0, "seed": 0, "dtype": "bfloat16", "ar_model": "m", "num_samples": 2})
    assert path.read_text().splitlines() == [
        "ar_model,tokenizer,num_samples,dtype,fvd,report,mode,seed", ",t,2,,1.0,a,SDE,", "m,,2,bfloat16,2.0,,,0"]


def test_the_table_is_sorted_and_survives_concurrent_writers(tmp_path):
    path = tmp_path / "table.csv"
    rows = [{"num_samples": 10 + i % 3, "fvd": float(i), "note": None, f"own{i % 2}": i} for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda row: append_report(path, row), rows))
    with open(path, newline="") as file:
        table = list(csv.DictReader(file))
    assert [(int(row["num_samples"]), float(row["fvd"])) for row in table] == [
        (12, 2), (12, 5), (12, 8), (12, 11), (11, 1), (11, 4), (11, 7), (11, 10), (10, 0), (10, 3), (10, 6), (10, 9)]
    assert {row["own0"] for row in table} == {"", "0", "2", "4", "6", "8", "10"}


def test_samples_that_cannot_be_made_are_left_out(tmp_path):
    store = SampleStore(tmp_path, {}, 5)
    fill(store, [0])
    store.add([], torch.empty(0), ["mp4"], left_out=[1, 2])
    store.add([4], torch.zeros(1, 3, 4, 8, 8, dtype=torch.uint8), [], left_out=[3], value=torch.tensor([8.0]))
    assert store.open(range(5), False) == [], "nor are they tried again"
    assert store.collect()["index"].tolist() == [0, 4]
    assert list(store.previews()) == [0, 4]
    empty = SampleStore(tmp_path / "empty", {}, 2)
    empty.add([], torch.empty(0), [], left_out=[0, 1])
    with pytest.raises(ValueError, match="none of 2 samples could be made"):
        empty.collect()


def test_real_clips_are_kept_beside_the_samples(tmp_path):
    store = SampleStore(tmp_path, {}, 2)
    real = torch.zeros(2, 3, 4, 8, 8, dtype=torch.uint8)
    videos = real + 255
    store.add([0, 1], videos, ["mp4"], real)
    for folder in ("gt", "sampled_videos"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["000000.mp4", "000001.mp4"]
    assert [clip.mean() for clip in store.previews()[1]] == [0, 1]


def test_real_clips_are_drawn_without_replacement_and_long_enough():
    files = [VideoFile(f"null:{i}") for i in range(5)]
    clips = ClipDataset(files, 4, 16, "coordtok", seed=3, damaged="skip")
    keys = drawn_clips(clips, 9)
    assert sorted(keys) == [ClipKey(i, i) for i in range(5)]
    assert drawn_clips(clips, 3) == keys[:3]
    batches = list(real_batches(clips, keys, [[0, 1, 2], [4, 5], [7]], 0, torch.device("cpu")))
    assert [places for places, _ in batches] == [[0, 1, 2], [0], []]
    assert batches[2][1] is None
    alone = list(real_batches(clips, keys, [[i] for i in range(5)], 0, torch.device("cpu")))
    assert torch.equal(batches[0][1], torch.cat([video for _, video in alone[:3]]))
    with pytest.raises(ValueError, match="none of 5 videos has 300 frames"):
        drawn_clips(ClipDataset(files, 300, 16, "coordtok", damaged="skip"), 1)


def test_segments(tmp_path, monkeypatch):
    """Of videos of 37, 0 (damaged), 3 and 20 frames: 3 + 0 + 1 + 2 segments of ten frames."""
    frames = {"a": 37, "b": 0, "c": 3, "d": 20}
    monkeypatch.setattr("sampling.real_clips.length", lambda file, quarantine, timeout: frames[file.path])
    clips = ClipDataset([VideoFile(name) for name in frames], 10, 16, "larp", short="repeat", damaged="skip")
    known = [(0, 0), (0, 10), (0, 20), (2, 0), (3, 0), (3, 10)]
    drawn = [5, 0, 4, 2, 1, 3]  # random.Random(42).sample(range(6), 6)
    assert segments(clips, 6, 42, tmp_path) == [ClipKey(i, *known[k]) for i, k in enumerate(drawn)]
    monkeypatch.setattr("sampling.real_clips.length", None)  # lengths are kept: shards must agree on them
    eight = segments(clips, 8, 42, tmp_path)
    assert eight[:6] == segments(clips, 6, 42, tmp_path)
    assert [key[1:] for key in eight[6:]] == [key[1:] for key in eight[:2]], "they come round again"
    assert [key.position for key in eight] == list(range(8))
    assert segments(clips, 6, 0, tmp_path) != eight[:6]

    monkeypatch.setattr("sampling.real_clips.length", lambda file, quarantine, timeout: 2000)
    clips = ClipDataset([VideoFile("long")], 10, 16, "larp", damaged="skip")
    drawn = [key.start // 10 for key in segments(clips, 5, 42, tmp_path)]
    assert drawn == [163, 28, 6, 189, 70]  # random.Random(42).sample(range(200), 5)


def test_what_is_behind_ends_in_order_and_one_at_a_time():
    done, free, cpu = [], threading.Event(), torch.device("cpu")

    def job(number, wait=False):
        if wait:
            free.wait()
        done.append(number)

    with BackgroundWriter(cpu) as behind:
        behind.run(job, 0, wait=True)
        assert done == [], "the caller goes on meanwhile"
        threading.Timer(0.1, free.set).start()
        behind.run(job, 1)  # waits for the one before
        assert done[0] == 0
        behind.run(time.sleep, 0.05)
        behind.run(job, 2)
    assert done == [0, 1, 2]
    assert behind.seconds >= 0.05


def test_errors_behind_are_raised_and_errors_before_lose_nothing():
    done, cpu = [], torch.device("cpu")

    def full(disk):
        raise OSError(f"{disk} is full")

    with pytest.raises(OSError, match="a is full"), BackgroundWriter(cpu) as behind:
        behind.run(full, "a")
        behind.run(done.append, "not begun")
    with pytest.raises(OSError, match="b is full"), BackgroundWriter(cpu) as behind:
        behind.run(full, "b")
    assert done == []
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(cpu) as behind:
        behind.run(time.sleep, 0.1)
        behind.run(done.append, "whole")
        raise KeyboardInterrupt
    assert done == ["whole"]


def test_a_batch_is_kept_only_with_all_its_videos(tmp_path):
    store = SampleStore(tmp_path, {}, 9)
    (store.videos / "000005.mp4").mkdir()  # where a file should go
    with pytest.raises(IsADirectoryError):
        store.add(list(range(9)), torch.zeros(9, 3, 4, 16, 16, dtype=torch.uint8), ["mp4"])
    assert store.done() == {}


def test_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7 to 8"


def test_differences():
    assert config_diff({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}) == "b 2 there, 3 here"
