import csv
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from data.clips import ClipDataset, VideoFile
from models.interpolant import Interpolant
from models.planes import Planes
from models.sit import SiT
from training.generation import (
    SampleStore,
    TrainedSiT,
    append_report,
    differences,
    ranges,
    real_batches,
    real_clips,
    sample_labels,
    sample_planes,
)
from training.latents import LatentStats


def fill(store, indices):
    videos = torch.rand(len(indices), 3, 4, 8, 8)
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
    assert len(again.previews()) == 6
    assert again.previews()[0].shape == (3, 4, 8, 8)


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


def test_real_clips_are_drawn_without_replacement_and_long_enough():
    files = [VideoFile(f"null:{i}") for i in range(5)]
    clips = ClipDataset(files, 4, 16, "coordtok", seed=3, damaged="skip")
    chosen = real_clips(clips, 9)
    assert sorted(chosen) == [0, 1, 2, 3, 4]
    assert real_clips(clips, 3) == chosen[:3]
    batches = list(real_batches(clips, chosen, [[0, 1, 2], [4, 5], [7]], 0, torch.device("cpu")))
    assert [places for places, _ in batches] == [[0, 1, 2], [0], []]
    assert batches[2][1] is None
    alone = list(real_batches(clips, chosen, [[i] for i in range(5)], 0, torch.device("cpu")))
    assert torch.equal(batches[0][1], torch.cat([video for _, video in alone[:3]]))
    with pytest.raises(ValueError, match="none of 5 videos has 300 frames"):
        real_clips(ClipDataset(files, 300, 16, "coordtok", damaged="skip"), 1)


def test_labels_are_functions_of_seed_and_index():
    labels = sample_labels(range(300), 3, 0)
    assert labels[100:110] == sample_labels(range(100, 110), 3, 0)
    assert np.bincount(labels).min() > 70
    assert labels != sample_labels(range(300), 3, 1)


@pytest.mark.parametrize("settings", [{}, {"mode": "ODE", "method": "heun3"}, {"cfg_scale": 3.0}])
def test_planes_of_a_sample_do_not_depend_on_the_batch(settings):
    sit = SiT(input_size=(4, 4), in_channels=2, hidden_size=16, depth=1, num_heads=2, num_classes=3,
              class_dropout_prob=0.1).eval().requires_grad_(False)
    for parameter in sit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ones = Planes(*(torch.ones(2) for _ in range(3)))
    trained = TrainedSiT(sit, Interpolant(), LatentStats(ones, ones), [])

    def sample(indices):
        labels = torch.tensor([index % 3 for index in indices])
        return sample_planes(trained, indices, 7, labels, num_steps=5, **settings)

    together = sample([3, 8, 1])
    for place, index in enumerate([3, 8, 1]):
        for batch, alone in zip(together, sample([index])):
            torch.testing.assert_close(batch[place : place + 1], alone, atol=1e-5, rtol=1e-4)
    assert together.xy.shape == (3, 4, 4, 2), "channels last, as tokenizers have them"


def test_texts():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7 to 8"
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}) == "b 2 there, 3 here"
