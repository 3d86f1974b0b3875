"""A number and the record of how it was made: built here, written and read as JSON.

`run_record` is the one way from a run to its record. It adds the facts of the run to those of its protocol, lists where
the run departs from the protocol, and refuses a record with a missing fact.
"""
import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from common import distributed
from common.files import atomic_write, git_revision
from eval.features import FEATURE_METRICS_RECORD
from eval.i3d import I3D
from eval.motion import MOTION_RECORD
from eval.protocols import Protocol

# Facts that only a run knows. `num_real` and `num_generated` are the actual counts; the protocol has planned ones.
FACTS = (
    "num_real",
    "num_generated",
    "extractor_sha256",  # of the I3D weights
    "seed",  # of clip starts, or the split seed of segments
    "manifest_sha256",  # of the list of real files
    "num_videos",  # in that list
    "sampler",  # settings (dict) of the generator, or of the tokenizer where it reconstructs
    "model",  # what made the second set: checkpoint, or folder of files
    "git_revision",
    "world_size",
)


def run_record(protocol: Protocol, source: str, num_videos: int, i3d: I3D | None, **facts: Any) -> dict[str, Any]:
    """The record of a measurement in this process group.

    source: the folder or list of the real videos, `num_videos` in number; the data set and its split are named by it,
    unless `facts` names them. i3d: the extractor, None where FVD was left out. facts: the others, as in `record`.
    """
    dataset, split = known_dataset(source, num_videos)
    own = {
        "dataset": dataset,
        "split": split,
        "num_videos": num_videos,
        "extractor_sha256": i3d.weights_sha256 if i3d else "none: --no_fvd",
        "git_revision": git_revision(),
        "world_size": distributed.world_size(),
    }
    return record(protocol, **own | facts)


def known_dataset(source: str, num_videos: int) -> tuple[str, str]:
    """(data set, split) that a folder, list or "LIST+LIST" of videos is called in a record.

    A source counts as UCF-101 or Kinetics-600 if its name says so and it has as many videos as one of their splits.
    """
    name = Path(source).name
    dataset = source
    if name.upper().replace("-", "").startswith("UCF101") and num_videos in (9537, 3783, 13320):
        dataset = "UCF-101"
    if name in ("k600_train.csv", "k600_val.csv") and num_videos > 20_000:  # every copy lacks some of its videos
        dataset = "Kinetics-600"
    split = "all" if "+" in name else next((part for part in ("train", "test", "val") if part in name), "all")
    return dataset, split


def record(protocol: Protocol, **facts: Any) -> dict[str, Any]:
    """The fields of the protocol, replaced and completed by the facts of the run.

    facts: every name of FACTS; also any field of the protocol in which the run differs (num_frames=8, ...). Each
    difference is listed under "deviations", and the name printed with the number gets a star.
    ValueError where a fact is missing, None or unknown.
    """
    planned = dataclasses.asdict(protocol)
    unknown = [name for name in facts if name not in {*FACTS, *planned} - {"name", "anchors"}]
    if unknown:
        raise ValueError(f"a record has no field {', '.join(unknown)}; expected {FACTS} or a field of {protocol.name}")
    actual = dataclasses.replace(protocol, **{name: facts[name] for name in facts if name in planned})
    full = dict.fromkeys(FACTS) | dataclasses.asdict(actual) | facts
    missing = [name for name in full if full[name] is None or name in FACTS and name not in facts]
    if missing:
        raise ValueError(f"the record of {protocol.name} lacks {', '.join(missing)}; no number is written without")
    changed = [name for name in planned if planned[name] not in (None, full[name])]
    deviations = [f"{name}: {full[name]} instead of {planned[name]}" for name in changed]
    title = protocol.name + ("*" if deviations else "")
    # Through JSON, so that a fresh record equals one read from a file.
    full = {"title": title, **full, "feature_metrics": FEATURE_METRICS_RECORD, "motion_metrics": MOTION_RECORD,
            "deviations": deviations}
    return nulls(full)


def describe(record: dict[str, Any]) -> str:
    """A few lines to print beside the number."""
    rows = [
        f"protocol {record['title']}: {record['description']}",
        f"  {record['num_real']} real, {record['num_generated']} generated clips of {record['num_frames']} frames "
        f"(stride {record['stride']}) at {record['size']}x{record['size']}, {record['dataset']} {record['split']}, "
        f"seed {record['seed']}, {record['num_videos']} videos, manifest {record['manifest_sha256'][:12]}",
        f"  I3D {record['extractor_sha256'][:12]}, eps {record['i3d_eps']:g}, resize {record['i3d_resize']}, "
        f"covariance / ({record['divisor']}), pixels from {record['pixels']}, revision {record['git_revision'][:12]}",
    ]
    rows += [f"  * {deviation}" for deviation in record["deviations"]]
    return "\n".join(rows + [f"  for comparison: {anchor}" for anchor in record["anchors"]])


def comparable(a: dict[str, Any], b: dict[str, Any], ignore: tuple[str, ...] = ()) -> list[str]:
    """Names of the fields in which two records differ, except those in `ignore`. Results may be compared, in one row or
    under one heading, only if there are none."""
    return sorted(name for name in a.keys() | b.keys() if name not in ignore and a.get(name) != b.get(name))


def write_record(path: str | Path, record: dict[str, Any], results: dict[str, Any]) -> None:
    """Save the numbers with their record as JSON, atomically, with a SHA-256 of both that `read_record` checks."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"results": as_json(results), "record": record}
    with atomic_write(path, "w") as file:
        text = json.dumps({**content, "sha256": content_sha256(content)}, indent=1, allow_nan=False)
        file.write(text + "\n")


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """The values for JSON, which has no NaN or infinity: such a number becomes null, and NAME_note says why."""
    notes = {f"{name}_note": why_not_finite(name, value) for name, value in values.items()
             if isinstance(value, float) and not math.isfinite(value)}
    return nulls(values) | notes


def nulls(value: Any) -> Any:
    """The value with null for every number that is not finite, since JSON has no such numbers."""
    if isinstance(value, dict):
        return {name: nulls(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def why_not_finite(name: str, value: float) -> str:
    if name.endswith(("fvd_floor", "fvd_spread")):
        return "not defined for fewer than four clips"
    if name.startswith("psnr") and value > 0:
        return "infinite: every clip is without error"
    return "not a number" if math.isnan(value) else "infinite"


def content_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_record(path: str | Path) -> dict[str, Any]:
    """{"results": ..., "record": ...} as `write_record` saved them. ValueError where the file is damaged: it is not
    JSON of this form, or its checksum does not fit."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in ("results", "record")):
        raise ValueError(f"{path} is damaged: it holds no results with a record")
    written = content.pop("sha256", None)  # reports of earlier versions have none
    if written is not None and written != content_sha256(content):
        raise ValueError(f"{path} is damaged: its content does not have its checksum")
    return content
