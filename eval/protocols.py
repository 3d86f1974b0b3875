"""Named evaluation protocols, and the record that accompanies every number.

A Fréchet video distance means nothing without the split, stride, resize, number of clips and extractor behind it, so a
number is printed and saved with the record of how it was made. `PROTOCOLS` holds the published ways of measuring;
`record` adds the facts of a run, notes where the run departs from its protocol and refuses to leave a fact out.
"""
import dataclasses
import hashlib
import json
import math
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import write_whole
from eval.features import FEATURE_METRICS_RECORD

NOT_OURS = "published, not reproduced here"


@dataclass(frozen=True)
class Protocol:
    """How a number is measured: all that is fixed before a run."""

    name: str
    description: str
    metrics: tuple[str, ...]
    dataset: str | None  # None, here and below: the run says
    split: str | None
    num_frames: int
    stride: int  # frames between two frames of a clip
    clip_start: str  # which clips: how files and first frames are chosen
    short_videos: str  # what happens to videos shorter than a clip
    size: int  # height and width of the clips compared
    resize: str  # from a file's frames to `size`
    num_real: int | None
    num_generated: int | None
    whole_clip: bool = True  # one pass of the extractor a clip, or the clip cut into chunks
    input_range: str = "[0, 1], clamped"
    pixels: str = "tensors"  # or: files, both sides through the same 8-bit storage
    extractor: str = "I3D Kinetics-400, 400 logits averaged over time, float32"
    i3d_eps: float = 1e-3
    i3d_resize: str = "square"
    divisor: str = "N-1"  # of the covariance
    num_cond_frames: int = 0  # frames of each clip given to the generator
    lpips: str = "none"  # LPIPS backbone
    anchors: tuple[str, ...] = ()  # published values, as text

    def __post_init__(self):
        if self.divisor not in ("N", "N-1"):
            raise ValueError(f"the covariance divisor is N or N-1, got {self.divisor!r}")
        if self.i3d_resize not in ("square", "short_side"):
            raise ValueError(f"--i3d_resize is square or short_side, got {self.i3d_resize!r}")


LARP_RESIZE = "shorter side to size, bilinear with antialias on float, centre crop"
COORDTOK_RESIZE = "shorter side to size, bicubic with antialias on 8-bit images, centre crop"

_LARP_16 = {
    "num_frames": 16,
    "stride": 1,
    "short_videos": "the last frame is repeated",
    "size": 128,
    "resize": LARP_RESIZE,
    "divisor": "N",
}
_STYLEGANV = {
    "description": "2,048 real against 2,048 generated clips (StyleGAN-V, arXiv 2112.14683)",
    "metrics": ("fvd",),
    "dataset": "UCF-101",
    "split": "train",
    "stride": 1,
    "clip_start": "videos drawn without replacement, first frame uniform over the video, both from the seed",
    "short_videos": "discarded",
    "size": 128,
    "resize": COORDTOK_RESIZE,
    "num_real": 2048,
    "num_generated": 2048,
}

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="larp_rfvd",
            description="reconstruction against input, one clip per training video (LARP, arXiv 2410.21264)",
            metrics=("fvd", "mse", "psnr_clip", "lpips"),
            dataset="UCF-101",
            split="train",
            clip_start="one clip per video of the sorted list, first frame uniform over the video, from the seed",
            num_real=9537,
            num_generated=9537,
            lpips="vgg",
            anchors=(f"LARP-L-Long: rFVD 19.53, PSNR 28.70, LPIPS 0.0755 ({NOT_OURS})",),
            **_LARP_16,
        ),
        Protocol(
            name="larp_gfvd10k",
            description="10,000 class-conditional samples against as many real segments (LARP, arXiv 2410.21264)",
            metrics=("fvd",),
            dataset="UCF-101",
            split="train",
            clip_start="non-overlapping segments of all videos with paths sorted, n in number; of these "
            "random.Random(split_seed).sample(range(n), 10000); the generator gets the same segments' labels",
            num_real=10000,
            num_generated=10000,
            anchors=(
                f"LARP-L-Long: FVD 57 ({NOT_OURS})",
                f"EVATok: FVD 48 ({NOT_OURS})",
                f"W.A.L.T-L: FVD 46 ({NOT_OURS})",
            ),
            **_LARP_16,
        ),
        Protocol(
            name="larp_k600fp50k",
            description="frame prediction, 5 frames given and all 16 generated (LARP, arXiv 2410.21264); "
            "both sides resized from 128x128 to 64x64, bilinear with antialias",
            metrics=("fvd",),
            dataset="Kinetics-600",
            split="val",
            clip_start="non-overlapping segments of all videos with paths sorted, n in number; of these "
            "random.Random(split_seed).sample(range(n), 50000)",
            num_real=50000,
            num_generated=50000,
            num_cond_frames=5,
            anchors=(
                f"LARP-L-Long: FVD 5.1 ({NOT_OURS})",
                f"EVATok: FVD 4.0 ({NOT_OURS})",
                f"W.A.L.T-L: FVD 3.3 ({NOT_OURS})",
            ),
            **_LARP_16 | {"size": 64},
        ),
        Protocol(
            name="coordtok_rfvd10k_128f",
            description="reconstruction against input, 10,000 clips of 128 frames (CoordTok, arXiv 2411.14762); the "
            "paper's script is not released, so the choice of clips is this project's",
            metrics=("fvd", "psnr_frame", "ssim", "lpips"),
            dataset="UCF-101",
            split="train",
            num_frames=128,
            stride=1,
            clip_start="clip i, for i from 0, is of video i mod n of the sorted list of the n videos that are long "
            "enough; first frame uniform over the video, from the seed and i",
            short_videos="discarded",
            size=128,
            resize=COORDTOK_RESIZE,
            num_real=10000,
            num_generated=10000,
            i3d_resize="short_side",
            lpips="vgg",
            anchors=(
                f"CoordTok: rFVD 102.9, PSNR 28.6, SSIM 0.892, LPIPS 0.066 ({NOT_OURS})",
                f"OmniTok-CV, 8192 tokens: rFVD 49.5 ({NOT_OURS})",
            ),
        ),
        Protocol(name="styleganv_fvd2048_16f", num_frames=16, **_STYLEGANV),
        Protocol(
            name="styleganv_fvd2048_128f",
            num_frames=128,
            anchors=(f"CoordTok-SiT-L/2: FVD 369.3 ({NOT_OURS})",),
            **_STYLEGANV,
        ),
    )
}

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
    full = {"title": title, **full, "feature_metrics": FEATURE_METRICS_RECORD, "deviations": deviations}
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


def manifest_sha256(paths: Iterable[str | Path], root: str | Path | None = None) -> str:
    """SHA-256 of a list of files in its order, one POSIX path a line; relative to `root` where given, so that the same
    data set in another folder has the same value. ValueError where a path is not under `root`."""
    lines = (path if root is None else path.relative_to(root) for path in map(Path, paths))
    text = "".join(f"{line.as_posix()}\n" for line in lines)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def git_revision() -> str:
    """Commit of this code, with "-dirty" where tracked files differ from it, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


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


def nulls(value: Any) -> Any:
    """The same with null for every number that is not finite, since JSON has no others."""
    if isinstance(value, dict):
        return {name: nulls(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
