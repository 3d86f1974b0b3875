import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

import data.cache
from data.cache import ClipCache, RowCache


def cache(tmp_path, key=1):
    return RowCache(tmp_path, "latents", {"tokenizer": key}, 10, row_shape=(2, 3), dtype="float32", shard_rows=4)


def filled(tmp_path):
    rows = np.arange(60, dtype="float32").reshape(10, 2, 3)
    whole = cache(tmp_path)
    for shard in whole.missing():
        whole.write(shard, rows[whole.rows_of(shard)])
    return whole, rows


def test_reads_back_what_was_written(tmp_path):
    whole, rows = filled(tmp_path)
    assert [len(whole.rows_of(shard)) for shard in range(whole.num_shards)] == [4, 4, 2]
    order = np.array([9, 0, 4, 4, 3])
    assert np.array_equal(whole.read(order), rows[order])
    whole.verify()


def test_few_files_are_kept_open(tmp_path, monkeypatch):
    """A process may have about a thousand; a large cache has more shards."""
    monkeypatch.setattr(data.cache, "MAX_MAPS", 2)
    whole, rows = filled(tmp_path)
    order = np.array([0, 4, 9, 1, 5, 8, 2])
    assert np.array_equal(whole.read(order), rows[order])
    assert len(whole._maps) == 2


def test_goes_on_where_it_was_left(tmp_path):
    cache(tmp_path).write(1, np.zeros((4, 2, 3), "float32"))
    again = cache(tmp_path)
    assert again.missing() == [0, 2]
    with pytest.raises(ValueError, match="lacks 2 of 3 shards"):
        again.read(np.array([5]))


def test_another_key_is_another_cache(tmp_path):
    filled(tmp_path)
    assert cache(tmp_path, key=2).missing() == [0, 1, 2]


def test_damage_is_named(tmp_path):
    whole, _ = filled(tmp_path)
    path = next(whole.folder.glob("shard_000001.*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="shard_000001.* cannot be read as a shard"):
        whole.verify()
    done = subprocess.run([sys.executable, "-m", "data.cache", whole.folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch("error: .*shard_000001.* cannot be read as a shard.*: .*\n", done.stderr)
    for length in (0, 10, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="shard_000001.* cannot be read as a shard"):
            whole.verify()


def test_checking_no_shards_is_an_error(tmp_path):
    done = subprocess.run([sys.executable, "-m", "data.cache", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"error: no shards in {tmp_path}: give folders")


def test_wrong_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"shard 2 is \(2, 2, 3\) float32, got \(4, 2, 3\) float32"):
        cache(tmp_path).write(2, np.zeros((4, 2, 3), "float32"))


def clip_cache(tmp_path, rule="larp"):
    return ClipCache(tmp_path, {"rule": rule}, 5, size=2, shard_rows=2)


def test_clips_of_any_length_are_read_back(tmp_path):
    rng = np.random.default_rng(0)
    videos = [rng.integers(256, size=(length, 2, 2, 3), dtype=np.uint8) for length in (3, 0, 7, 1, 4)]
    cache = clip_cache(tmp_path)
    for shard in (1, 0):
        cache.write(shard, videos[2 * shard : 2 * shard + 2])
    with pytest.raises(ValueError, match="lacks 1 of 3 shards"):
        clip_cache(tmp_path).length(0)
    clip_cache(tmp_path).write(2, videos[4:])
    cache = pickle.loads(pickle.dumps(cache))
    assert [cache.length(i) for i in range(5)] == [3, 0, 7, 1, 4]
    for video, frames in ((0, [0, 2]), (2, [1, 3, 5]), (3, [0]), (4, [0, 1, 2, 3])):
        got = cache.read(video, np.array(frames))
        assert np.array_equal(got, videos[video][frames]) and type(got) is np.ndarray
        got += 1  # does not reach the file
        assert np.array_equal(cache.read(video, np.array(frames)), videos[video][frames])
    assert clip_cache(tmp_path, "coordtok").missing() == [0, 1, 2]


@pytest.mark.parametrize("place", [0, -1], ids=["lengths", "frames"])
def test_damage_to_clips_is_named(tmp_path, place):
    cache = clip_cache(tmp_path)
    cache.write(2, [np.ones((4, 2, 2, 3), np.uint8)])
    cache.verify()
    path = next(cache.folder.glob("shard_000002.*"))
    content = np.load(path)
    content[place] ^= 1
    np.save(path, content)
    with pytest.raises(ValueError, match="shard_000002.* cannot be read as a shard of a cache"):
        cache.verify()


@pytest.mark.parametrize("videos", [
    [np.zeros((4, 2, 2, 3), np.uint8)], [np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 2, 2, 3), "float32")],
    [np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 3, 2, 3), np.uint8)]], ids=["number", "type", "size"])
def test_wrong_clips_are_refused(tmp_path, videos):
    with pytest.raises(ValueError, match=r"shard 0 is 2 videos of \(2, 2, 3\) uint8, got"):
        clip_cache(tmp_path).write(0, videos)
