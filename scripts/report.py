"""One page of what the runs in a folder wrote: their numbers in one table, their losses, their pictures.

    python scripts/report.py results/NAME

writes results/NAME/index.html, which needs no other file and no network: first clips and pictures of the evaluations
and of sample.py, then the numbers of each report.json, then each run's curves and last samples. Rows stand under one
heading only where they were measured alike, whatever the model. What cannot be read is named. The page's text and looks
are in report.html.j2 beside this script.
"""
import argparse
import base64
import dataclasses
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs as a script from any folder
import jinja2  # noqa: E402
import torch  # noqa: E402
from matplotlib import rc_context  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402

from common.cli import one_line_errors  # noqa: E402
from common.errors import ArgumentParser  # noqa: E402
from common.files import atomic_write  # noqa: E402
from data.video import VideoError, probe, read_frames, write_video  # noqa: E402
from eval.motion import METRICS  # noqa: E402
from eval.pictures import outline  # noqa: E402
from eval.protocols import Protocol  # noqa: E402
from eval.report import FACTS, comparable, read_record  # noqa: E402

# What may differ under one heading: all else is how a number was measured.
OF_THE_MODEL = ("model", "sampler", "git_revision", "world_size")
COLUMNS = {  # {heading: (names in results, decimals)}; other results are in the row's details
    "FVD": (("fvd", "rfvd"), 1),
    "floor": (("fvd_floor", "rfvd_floor"), 1),
    "spread": (("fvd_spread", "rfvd_spread"), 1),
    "at ∞": (("fvd_infinity", "rfvd_infinity"), 1),
    "KVD": (("kvd", "rkvd"), 3),
    "precision": (("precision",), 3),
    "recall": (("recall",), 3),
    "density": (("density",), 3),
    "coverage": (("coverage",), 3),
    "PSNR clip": (("psnr_clip",), 2),
    "PSNR frame": (("psnr_frame",), 2),
    "SSIM": (("ssim",), 3),
    "LPIPS": (("lpips",), 4),
    "ST-LPIPS": (("stlpips",), 4),
    "warping": (("warping_error",), 5),
    "flicker": (("flicker",), 4),
    "frozen": (("frozen",), 3),
    "seams t": (("seams_t",), 3),
    "seams xy": (("seams_xy",), 3),
    "VMAF": (("vmaf",), 1),
    "PSNR given": (("psnr_given",), 2),
    "NLL": (("nll",), 3),
    "bits/dim": (("bits_per_dim",), 3),
}
CHARTS = {  # {title: names in metrics.jsonl}
    "loss": ("loss", "loss_uncond"),
    "PSNR frame": ("psnr_frame",),
    "FVD": ("fvd", "rfvd"),
}
NUM_VIDEOS = 4  # of each report and run
LARGEST_VIDEO = 500_000  # bytes


class Report(NamedTuple):
    """A report.json, as eval.report.write_record wrote it."""

    folder: Path
    results: dict[str, Any]
    record: dict[str, Any]


class Run(NamedTuple):
    """A training run's folder."""

    folder: Path
    args: dict[str, Any]
    step: int  # the last in metrics.jsonl
    diverged: int | None  # the step from which on no loss is finite
    curves: dict[str, dict[str, list[tuple[int, float]]]]  # {chart: {"train loss": [(step, value)]}}


# --- what the folder holds ---

def name_of(path: Path, root: Path) -> str:
    return root.name if path == root else str(path.relative_to(root))


def read_json(text: str, source: str) -> dict:
    """ValueError that names the source where there is no JSON object."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source} is damaged: no JSON object")
    return content


def check_number(value: Any, source: str) -> None:
    """ValueError where a value is none that can be drawn or written in columns; NaN and infinity can."""
    if isinstance(value, bool) or not isinstance(value, int | float) or isinstance(value, int) and abs(value) > 2**53:
        raise ValueError(f"{source} is damaged: {str(value)[:40]!r} is no number")


def read_report(folder: Path) -> Report:
    """ValueError or OSError where there is none, or a damaged one."""
    if not (folder / "report.json").exists():
        raise ValueError("no report.json: what else is there is not finished")
    content = read_record(folder / "report.json")
    # Records written before ST-LPIPS was there were made without it.
    report = Report(folder, content["results"], {"stlpips": "none", **content["record"]})
    needed = ("title", "deviations", *FACTS, *(field.name for field in dataclasses.fields(Protocol)))
    if missing := [name for name in needed if name not in report.record]:
        raise ValueError(f"report.json is no report: its record lacks {', '.join(missing[:3])}")
    deviations = report.record["deviations"]
    texts = {name: report.record[name] for name in ("title", "description", "model", "lpips")}
    listed = isinstance(deviations, list) and all(isinstance(line, str) for line in deviations)
    texts["deviations"] = "" if listed else None
    if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise ValueError(f"report.json is damaged: {wrong[0]} is {report.record[wrong[0]]!r}, expected text")
    real = {f"{name}_real" for name in METRICS}
    for name in {name for names, _ in COLUMNS.values() for name in names} | {"psnr_mean_frame"} | real:
        if report.results.get(name) is not None:
            check_number(report.results[name], f"report.json, {name}")
    return report


def read_run(folder: Path) -> Run:
    """A last line cut short by a kill is left out. ValueError or OSError for damaged files."""
    *lines, cut = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    lines = [read_json(line, f"metrics.jsonl, line {i}") for i, line in enumerate(lines, 1)]
    if not lines:
        raise ValueError("metrics.jsonl is cut within its first line" if cut else
                         "metrics.jsonl is empty: the run has not come to its first line")
    diverged = None
    curves = {chart: {} for chart in CHARTS}
    for i, line in enumerate(lines, 1):
        check_number(line.get("step"), f"metrics.jsonl, line {i}, step")
        if not isinstance(line.get("kind"), str):
            raise ValueError(f"metrics.jsonl, line {i} is damaged: its kind is no text")
        for chart, names in CHARTS.items():
            for name in names:
                if line.get(name) is None:  # null: it was not finite
                    continue
                check_number(line[name], f"metrics.jsonl, line {i}, {name}")
                if math.isfinite(line[name]):
                    curves[chart].setdefault(f"{line['kind']} {name}", []).append((line["step"], line[name]))
        if line["kind"] == "train" and (losses := [line[name] for name in CHARTS["loss"] if name in line]):
            finite = any(loss is not None and math.isfinite(loss) for loss in losses)
            diverged = None if finite else line["step"] if diverged is None else diverged
    args = folder / "args.json"
    args = read_json(args.read_text(encoding="utf-8"), "args.json") if args.exists() else {}
    return Run(folder, args, lines[-1]["step"], diverged, curves)


def gather(root: Path) -> tuple[list[Report], list[Run], list[str]]:
    """All reports and runs under `root` in the order of their paths, and what is left out and why, a line each."""
    problems = []

    def read(reader: Callable[[Path], Any], marks: tuple[str, ...]) -> list:
        found = []
        for folder in sorted({path.parent for mark in marks for path in root.rglob(mark)}):
            try:
                found.append(reader(folder))
            except (ValueError, OSError, RecursionError) as error:
                problems.append(f"{name_of(folder, root)}: {str(error).replace(f'{folder}/', '')}")
        return found

    reports = read(read_report, ("report.json", "sheet.png", "chunks"))  # these are of evaluations and samples alone
    runs = read(read_run, ("metrics.jsonl",))
    if not reports and not runs and not problems:
        raise ValueError(f"{root} holds no report.json and no metrics.jsonl: give the folder of a finished run, "
                         "evaluation or sample.py")
    return reports, runs, problems


def alike(reports: list[Report]) -> list[list[Report]]:
    """The reports in groups whose numbers may be compared."""
    groups = []
    for report in reports:
        for group in groups:
            if not comparable(group[0].record, report.record, OF_THE_MODEL):
                group.append(report)
                break
        else:
            groups.append([report])
    return groups


def last_samples(folder: Path) -> list[Path]:
    """The pictures and clips of the last step of a run that has any; a run that validates averages too has them in
    folders of their own."""
    paths = sorted([*folder.glob("samples/**/step_*.png"), *folder.glob("samples/**/step_*.mp4")])
    last = max((path.name[: len("step_0000000")] for path in paths), default="")
    return [path for path in paths if path.name.startswith(last)]


# --- the page ---

def number(value: float | None, decimals: int) -> str:
    if value is None:
        return ""
    if math.isnan(value):
        return "n/a"
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "∞"


def table(reports: list[Report], root: Path) -> dict[str, Any]:
    """Columns that a report fills, and the groups of rows that may be compared, as the template takes them."""
    measured = {name for report in reports for name in report.results}
    columns = {title: column for title, column in COLUMNS.items() if measured & set(column[0])}
    groups = []
    for group in alike(reports):
        record = group[0].record
        shared = {name: value for name, value in record.items() if name not in OF_THE_MODEL}
        groups.append({"record": record, "shared": shared, "rows": [row(report, columns, root) for report in group]})
    return {"columns": list(columns), "groups": groups}


def model_name(report: Report) -> tuple[str, str]:
    """(kind of model, its weights), as the record names them; ("", weights) in records that name no kind."""
    kind, _, weights = report.record["model"].rpartition(": ")
    return kind, weights


def row(report: Report, columns: dict, root: Path) -> dict[str, Any]:
    results, record = report.results, report.record
    notes = {}
    if results.get("fvd_rank_deficient", results.get("rfvd_rank_deficient")):
        notes["FVD"] = "rank-deficient"
    notes |= {title: "random network" for title in ("LPIPS", "ST-LPIPS") if "RANDOM" in record[COLUMNS[title][0][0]]}
    if "psnr_mean_frame" in results:
        notes["PSNR frame"] = f"mean frame: {number(results['psnr_mean_frame'], 2)}"
    for title in ("warping", "flicker", "frozen", "seams t", "seams xy"):
        name, decimals = COLUMNS[title][0][0], COLUMNS[title][1]
        if results.get(f"{name}_real") is not None:
            notes[title] = f"real: {number(results[f'{name}_real'], decimals)}"
    clips = str(record["num_generated"])
    if record["num_real"] != record["num_generated"]:
        clips += f" against {record['num_real']}"
    cells = [("Clips", clips, "")]
    for title, (names, decimals) in columns.items():
        name = next((name for name in names if name in results), "")
        value = results.get(name)
        if name and value is None:
            infinite = f"{name}_infinite" in results or str(results.get(f"{name}_note")).startswith("infinite")
            value = math.inf if infinite else math.nan
        cells.append((title, number(value, decimals), notes.get(title, "") if name else ""))
    own = {"results": results, **{name: record[name] for name in OF_THE_MODEL}}
    kind, weights = model_name(report)
    return {"kind": kind, "weights": weights, "folder": name_of(report.folder, root), "cells": cells, "own": own}


INK = "#010203"  # stands for the page's own colour of text, dark or light
COLORS = ("#2f7fd6", "#d9641e", "#2f9e55", "#a35be0", "#d1477f", "#1f9488")  # seen on white and on black


def draw(title: str, curves: dict[str, list[tuple[int, float]]]) -> Figure:
    """Curves over steps, logarithmic where they fall or rise tenfold."""
    with rc_context({"text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
                     "ytick.color": INK, "axes.prop_cycle": f"cycler('color', {COLORS})", "text.parse_math": False}):
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.add_subplot()
        for name, curve in curves.items():
            steps, values = zip(*curve)
            axes.plot(steps, values, marker="o" if len(curve) <= 20 else None, markersize=3, linewidth=1.4,
                      label=f"{name[:40]}  {values[-1]:.4g}".lstrip("_"))
        values = [value for curve in curves.values() for _, value in curve]
        if min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    return figure


def chart(title: str, curves: dict[str, list[tuple[int, float]]]) -> dict[str, str]:
    """{"uri": the curves as an SVG whose text has the page's colour, "alt": their last values}; no picture where there
    is one step alone."""
    last = [f"{name} {curve[-1][1]:.4g} at step {curve[-1][0]}" for name, curve in curves.items()]
    alt = f"{title}: {', '.join(last)}"
    if len({step for curve in curves.values() for step, _ in curve}) == 1:
        return {"uri": "", "alt": alt}
    file = io.StringIO()
    draw(title, curves).savefig(file, format="svg", transparent=True)
    style = "<style>svg{color:#1b1f24}@media(prefers-color-scheme:dark){svg{color:#e6e8eb}}</style>"
    svg = file.getvalue().replace(INK, "currentColor").replace("<defs>", f"{style}<defs>", 1)
    return {"uri": data_uri(svg.encode(), "image/svg+xml"), "alt": alt}


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


class Media:
    """Pictures and clips as the template takes them. Those that cannot be read are added to `problems`."""

    def __init__(self, root: Path, problems: list[str]):
        self.root, self.problems = root, problems

    def read(self, path: Path, kind: str, load: Callable[[Path], bytes], largest: float = math.inf) -> list[dict]:
        try:
            if path.stat().st_size > largest:
                return []
            return [{"uri": data_uri(load(path), kind), "name": name_of(path, self.root)}]
        except (OSError, ValueError, SyntaxError, VideoError, Image.DecompressionBombError) as error:  # as Pillow fails
            self.problems.append(f"{name_of(path, self.root)}: {error}")
            return []

    def sheets(self, paths: list[Path]) -> list[dict]:
        return [sheet for path in paths for sheet in self.read(path, "image/png", read_picture)]

    def videos(self, paths: list[Path], load: Callable[[Path], bytes] = Path.read_bytes) -> list[dict]:
        """The first few that are small."""
        found = []
        for path in paths:
            if len(found) < NUM_VIDEOS:
                found += self.read(path, "video/mp4", load, LARGEST_VIDEO)
        return found

    def of_report(self, report: Report) -> dict[str, Any]:
        """Clips beside their reconstructions, or samples; those that continue real clips beside these."""
        folder, given = report.folder, report.record["num_cond_frames"]
        pairs, samples = sorted(folder.glob("reconstructions/*.mp4")), sorted(folder.glob("sampled_videos/*.mp4"))
        shown = {"kind": model_name(report)[0], "folder": name_of(folder, self.root), "title": report.record["title"],
                 "sheets": self.sheets(list(folder.glob("sheet.png")))}
        if pairs:
            return {**shown, "what": "input | reconstruction", "videos": self.videos(pairs)}
        if isinstance(given, int) and given > 0 and (folder / "gt").is_dir():
            what = f"real | generated from the first {given} frames, which are outlined"
            return {**shown, "what": what, "videos": self.videos(samples, lambda path: beside_real(path, given))}
        return {**shown, "what": "samples" if samples else "", "videos": self.videos(samples)}

    def of_run(self, run: Run) -> dict[str, Any]:
        paths = last_samples(run.folder)
        return {"name": name_of(run.folder, self.root), "step": run.step, "args": run.args,
                "charts": [chart(title, curves) for title, curves in run.curves.items() if curves],
                "sheets": self.sheets([path for path in paths if path.suffix == ".png"]),
                "videos": self.videos([path for path in paths if path.suffix == ".mp4"])}


def read_picture(path: Path) -> bytes:
    """OSError, SyntaxError or ValueError where it is none."""
    with Image.open(path) as image:
        image.load()
    return path.read_bytes()


def beside_real(path: Path, given: int) -> bytes:
    """An mp4 of the real clip, ../gt/NAME, and the sample that continues its first `given` frames, side by side, these
    frames outlined. OSError or VideoError where one cannot be read."""
    clips = []
    for file in (path.parent.parent / "gt" / path.name, path):
        frames = read_frames(str(file), range(probe(str(file)).num_frames))
        clips.append(outline(frames.permute(3, 0, 1, 2).float() / 255, given))
    length = min(clip.shape[1] for clip in clips)
    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder) / path.name, torch.cat([clip[:, :length] for clip in clips], dim=3))
        return (Path(folder) / path.name).read_bytes()


def is_demo(runs: list[Run]) -> bool:
    """Whether a run trained on the demo data."""
    return any(os.path.exists(ROOT / str(run.args.get("data_root")) / "UCF-101" / "demo.json") for run in runs)


def caveats(reports: list[Report], runs: list[Run]) -> list[str]:
    """What these numbers are not."""
    found = []
    starred = sum(bool(report.record["deviations"]) for report in reports)
    if starred:
        which = "None of them was" if starred == len(reports) else f"{starred} of {len(reports)} reports were not"
        found.append(f"Not published numbers. {which} measured as published: under a heading with a star stands what "
                     "departs, and its rows must not be held against a paper's.")
    if len(reports) > 1:
        found.append("Compare rows under one heading only: under another one, clips, sizes or rules were different.")
    if any(report.results.get("fvd_rank_deficient", report.results.get("rfvd_rank_deficient")) for report in reports):
        found.append("Rank-deficient: no more clips than the extractor's 400 features, which makes the FVD too large; "
                     "read it with its floor.")
    if any("RANDOM" in report.record[name] for report in reports for name in ("lpips", "stlpips")) or any(
            run.args.get("lpips_weights") == "random" for run in runs):
        found.append("LPIPS or ST-LPIPS stands on a RANDOM network, for want of its weights: its values mean nothing.")
    found += [f"{run.folder.name}: no finite loss from step {run.diverged} on." for run in runs
              if run.diverged is not None]
    return found


def page(root: Path, reports: list[Report], runs: list[Run], problems: list[str]) -> str:
    """Damaged pictures are added to `problems`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )
    environment.filters["json"] = lambda content: json.dumps(content, indent=1, ensure_ascii=False)
    media = Media(root, problems)
    shown = {"shown": [media.of_report(report) for report in reports], "runs": [media.of_run(run) for run in runs]}
    return environment.get_template("report.html.j2").render(
        name=root.name, demo=is_demo(runs), table=table(reports, root), caveats=caveats(reports, runs),
        problems=problems, **shown,
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of runs, evaluations and samples, at any depth")
    parser.add_argument("--output", type=Path, help="the page (default: FOLDER/index.html)")
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder}: no such folder; give one of runs and reports, such as results/quickstart")
    folder = args.folder.resolve()
    reports, runs, problems = gather(folder)
    if not reports and not runs:
        for problem in problems:
            print(f"left out: {problem}")
        raise ValueError(f"{args.folder}: nothing in it can be read: give the folder of a whole run or evaluation")
    html = page(folder, reports, runs, problems)
    output = args.output or args.folder / "index.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as file:
        file.write(html.encode("utf-8", "replace"))  # names of files may be of any bytes
    for problem in problems:
        print(f"left out: {problem}")
    print(f"{output}: {len(reports)} reports, {len(runs)} runs, {output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    with one_line_errors():
        main()
