"""Records and their files: eval/report.py."""
import dataclasses
import json
import math

import pytest

from eval import protocols, report
from eval.protocols import PROTOCOLS
from eval.report import comparable, describe, record

FACTS = {
    "num_real": 10000,
    "num_generated": 10000,
    "extractor_sha256": "af5c50f0",
    "seed": 42,
    "manifest_sha256": "abc",
    "num_videos": 9537,
    "sampler": {"cfg_scale": 1.25},
    "model": "runs/ar/last.pt",
    "git_revision": "unknown",
    "world_size": 1,
}


def test_a_faithful_run_has_no_deviations():
    full = record(PROTOCOLS["larp_gfvd10k"], **FACTS)
    assert full["deviations"] == [] and full["title"] == "larp_gfvd10k"
    assert full["divisor"] == "N" and full["i3d_eps"] == 1e-3 and full["sampler"] == {"cfg_scale": 1.25}
    assert full == json.loads(json.dumps(full)), "a record equals itself read from a file"


@pytest.mark.parametrize("name", report.FACTS)
def test_a_missing_fact_is_refused(name):
    with pytest.raises(ValueError, match=f"lacks {name}"):
        record(PROTOCOLS["larp_gfvd10k"], **{k: v for k, v in FACTS.items() if k != name})
    with pytest.raises(ValueError, match=f"lacks {name}"):
        record(PROTOCOLS["larp_gfvd10k"], **FACTS | {name: None})


def test_an_unknown_fact_is_refused():
    with pytest.raises(ValueError, match="no field num_frame"):
        record(PROTOCOLS["larp_gfvd10k"], **FACTS, num_frame=8)
    with pytest.raises(ValueError, match="no field name"):
        record(PROTOCOLS["larp_gfvd10k"], **FACTS, name="mine")


def test_deviations_are_listed_and_marked():
    small = record(PROTOCOLS["larp_gfvd10k"], **FACTS | {"num_real": 64}, dataset="demo", size=128)
    assert small["title"] == "larp_gfvd10k*"
    assert small["deviations"] == ["dataset: demo instead of UCF-101", "num_real: 64 instead of 10000"]
    assert small["num_real"] == 64 and small["num_generated"] == 10000
    text = describe(small)
    assert "larp_gfvd10k*" in text and "64 instead of 10000" in text and protocols.NOT_OURS in text


def test_what_a_protocol_leaves_open_the_run_must_say():
    protocol = dataclasses.replace(PROTOCOLS["larp_rfvd"], num_real=None, num_generated=None, dataset=None)
    full = record(protocol, **FACTS, dataset="mine")
    assert full["deviations"] == [] and full["num_real"] == 10000 and full["dataset"] == "mine"
    with pytest.raises(ValueError, match="lacks dataset"):
        record(protocol, **FACTS)


def test_a_deviation_must_be_valid():
    with pytest.raises(ValueError, match="divisor"):
        record(PROTOCOLS["larp_rfvd"], **FACTS, divisor="n")


def test_comparable_names_the_fields_that_differ():
    a = record(PROTOCOLS["larp_gfvd10k"], **FACTS)
    assert comparable(a, a) == []
    b = record(PROTOCOLS["larp_gfvd10k"], **FACTS | {"seed": 43, "model": "other"}, i3d_eps=1e-5)
    assert comparable(a, b) == ["deviations", "i3d_eps", "model", "seed", "title"]
    assert comparable(a, record(PROTOCOLS["larp_gfvd10k"], **FACTS | {"model": "b"}), ignore=("model",)) == []


def test_write_record(tmp_path):
    full = record(PROTOCOLS["larp_gfvd10k"], **FACTS)
    report.write_record(tmp_path / "new" / "fvd.json", full, {"fvd": 57.0})
    assert report.read_record(tmp_path / "new" / "fvd.json") == {"results": {"fvd": 57.0}, "record": full}
    assert len(list((tmp_path / "new").iterdir())) == 1


def no_constants(name):
    raise AssertionError(f"{name} is not JSON")


def test_what_is_not_finite_is_null_and_says_why(tmp_path):
    path = tmp_path / "report.json"
    report.write_record(path, {}, {"rfvd": 1.5, "rfvd_floor": math.nan, "psnr_clip": math.inf, "x": -math.inf})
    results = json.loads(path.read_text(), parse_constant=no_constants)["results"]
    assert results == {
        "rfvd": 1.5, "rfvd_floor": None, "rfvd_floor_note": "not defined for fewer than four clips",
        "psnr_clip": None, "psnr_clip_note": "infinite: every clip is without error", "x": None, "x_note": "infinite",
    }
    assert report.read_record(path)["results"] == results


def test_a_damaged_record_is_named(tmp_path):
    path = tmp_path / "report.json"
    report.write_record(path, {"seed": 1}, {"fvd": 57.25})
    whole = path.read_text()
    assert "57.25" in whole
    for text in ("garbage", '"garbage"', "[]", "{}", whole[:-9], '{"results": 1, "record": {}}',
                 whole.replace("57.25", "47.25"), whole.replace('"seed": 1', '"seed": 2')):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"report\.json is damaged: "):
            report.read_record(path)
    content = json.loads(whole)
    del content["sha256"]  # as earlier versions wrote it
    path.write_text(json.dumps(content))
    assert report.read_record(path) == content


def test_records_hold_no_nan(tmp_path):
    numbers = {"psnr": float("inf"), "psnr_infinite": 3, "lists": [float("nan"), (1.5, -float("inf"))], "flag": True}
    report.write_record(tmp_path / "report.json", record(PROTOCOLS["larp_gfvd10k"], **FACTS), numbers)
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)["results"]
    assert read == {"psnr": None, "psnr_infinite": 3, "lists": [None, [1.5, None]], "flag": True,
                    "psnr_note": "infinite: every clip is without error"}


@pytest.mark.parametrize("source, num_videos, named", [
    ("UCF-101_train", 9537, ("UCF-101", "train")),
    ("training/ucf101_val.csv", 3783, ("UCF-101", "val")),
    ("UCF-101_train", 8, ("UCF-101_train", "train")),
    ("ucf101_train.csv+ucf101_val.csv", 13320, ("UCF-101", "all")),
    ("k600_val.csv", 29_000, ("Kinetics-600", "val")),
    ("k600_val.csv", 100, ("k600_val.csv", "val")),
    ("none", 0, ("none", "all")),
])
def test_a_data_set_has_its_name_where_it_is_whole(source, num_videos, named):
    assert report.known_dataset(source, num_videos) == named
