import numpy as np
import pytest

from data.cache import RowCache


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
    with pytest.raises(ValueError, match="shard_000001.* is damaged"):
        whole.verify()


def test_wrong_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"shard 2 is \(2, 2, 3\) float32, got \(4, 2, 3\) float32"):
        cache(tmp_path).write(2, np.zeros((4, 2, 3), "float32"))
