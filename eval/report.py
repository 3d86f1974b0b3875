"""A number and its record: built once, written and read as JSON."""
import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from common.files import write_whole
from eval.features import FEATURE_METRICS_RECORD
from eval.motion import MOTION_RECORD
from eval.protocols import Protocol, nulls

# What only a run knows. `num_real` and `num_generated` are the protocol's numbers, here the counts in fact.
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


def record(protocol: Protocol, **facts: Any) -> dict[str, Any]:
    """The full record of one measurement: the protocol's fields with the facts of the run laid over them.

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
        raise ValueError(f"the record of {protocol.name} lacks {', '.join(missing)}; a number is not written without")
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
    """Names of the fields in which two records differ, but for those of `ignore`. Results may stand in one row, or
    under one heading, only where this is empty."""
    return sorted(name for name in a.keys() | b.keys() if name not in ignore and a.get(name) != b.get(name))


def write_record(path: str | Path, record: dict[str, Any], results: dict[str, Any]) -> None:
    """Save the numbers with their record as JSON, whole or not at all.

    The SHA-256 of both stands beside them, for `read_record`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"results": as_json(results), "record": record}
    with write_whole(path, "w") as file:
        text = json.dumps({**content, "sha256": content_sha256(content)}, indent=1, allow_nan=False)
        file.write(text + "\n")


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: such a number becomes null, and NAME_note beside it says why."""
    notes = {f"{name}_note": why_not_finite(name, value) for name, value in values.items()
             if isinstance(value, float) and not math.isfinite(value)}
    return nulls(values) | notes


def why_not_finite(name: str, value: float) -> str:
    if name.endswith(("fvd_floor", "fvd_spread")):
        return "not defined for fewer than four clips"
    if name.startswith("psnr") and value > 0:
        return "infinite: every clip is without error"
    return "not a number" if math.isnan(value) else "infinite"


def content_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_record(path: str | Path) -> dict[str, Any]:
    """{"results": ..., "record": ...} as `write_record` saved them. ValueError where the file is damaged: no JSON, not
    of this form, or other numbers than those that were written."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in ("results", "record")):
        raise ValueError(f"{path} is damaged: it holds no results with their record")
    written = content.pop("sha256", None)  # which reports of earlier versions lack
    if written is not None and written != content_sha256(content):
        raise ValueError(f"{path} is damaged: its content is not what its checksum says")
    return content

