"""One page of what the runs in a folder wrote: their numbers in one table, their losses, their pictures.

    python scripts/report.py results/NAME

writes results/NAME/index.html, which needs no other file and no network. It holds each report.json of the evaluations
and of sample.py, with pictures and a few clips from beside it, and each run's metrics.jsonl and last samples. Rows
stand under one heading only where they were measured alike, whatever the model. What cannot be read is named.
"""
import argparse
import base64
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs as a script from any folder
from PIL import Image  # noqa: E402

from common.cli import one_line_errors  # noqa: E402
from common.errors import ArgumentParser  # noqa: E402
from common.files import atomic_write  # noqa: E402
from eval.motion import METRICS  # noqa: E402
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
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    lines = [read_json(line, f"metrics.jsonl, line {i}") for i, line in enumerate(lines, 1)]
    if not lines:
        raise ValueError("metrics.jsonl is empty: the run has not come to its first line")
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
    args = folder / "args.json"
    args = read_json(args.read_text(encoding="utf-8"), "args.json") if args.exists() else {}
    return Run(folder, args, lines[-1]["step"], curves)


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


def pictures_of_report(folder: Path) -> list[Path]:
    return [*folder.glob("sheet.png"), *sorted(folder.glob("sampled_videos/*.mp4"))]


def pictures_of_run(folder: Path) -> list[Path]:
    """Of the last step that has any."""
    paths = sorted([*folder.glob("samples/step_*.png"), *folder.glob("samples/step_*.mp4")])
    last = paths[-1].name[: len("step_0000000")] if paths else ""
    return [path for path in paths if path.name.startswith(last)]


# --- the page ---

def text(value: Any) -> str:
    """Whatever stands in a file, escaped."""
    return escape(str(value))


def number(value: float | None, decimals: int) -> str:
    if value is None:
        return ""
    if math.isnan(value):
        return "n/a"
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "∞"


def details(title: str, content: dict) -> str:
    content = json.dumps(content, indent=1, ensure_ascii=False)
    return f"<details><summary>{escape(title)}</summary><pre>{escape(content)}</pre></details>"


def table(groups: list[list[Report]], root: Path) -> str:
    """All reports; columns that none of them fills are left out."""
    measured = {name for group in groups for report in group for name in report.results}
    columns = {title: column for title, column in COLUMNS.items() if measured & set(column[0])}
    html = ["<table><thead><tr>", *(f"<th>{title}</th>" for title in ("Model", "Clips", *columns)), "</tr></thead>"]
    for group in groups:
        record = group[0].record
        shared = {name: value for name, value in record.items() if name not in OF_THE_MODEL}
        departs = "; ".join(record["deviations"])
        html.append(
            f'<tbody><tr class="protocol"><th colspan="{2 + len(columns)}" scope="rowgroup">'
            f"<b>{escape(record['title'])}</b> {escape(record['description'])}"
            f"<p>{text(record['dataset'])}, {text(record['num_frames'])} frames of {text(record['size'])}x"
            f"{text(record['size'])}"
            + (f". * Departs from the protocol: {escape(departs)}" if departs else "") + "</p>"
            f"{details('Record: how all rows below were measured', shared)}</th></tr>"
        )
        html += [row(report, columns, root) for report in group]
        html.append("</tbody>")
    return "".join([*html, "</table>"])


def row(report: Report, columns: dict, root: Path) -> str:
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
    clips = text(record["num_generated"])
    if record["num_real"] != record["num_generated"]:
        clips += f" against {text(record['num_real'])}"
    own = {name: record[name] for name in OF_THE_MODEL}
    cells = [f"<td><b>{escape(name_of(report.folder, root))}</b> <small>{escape(record['model'])}</small>"
             f"{details('All numbers, settings', {'results': results, **own})}</td>",
             f'<td data-name="Clips">{clips}</td>']
    for title, (names, decimals) in columns.items():
        name = next((name for name in names if name in results), "")
        value = results.get(name)
        if name and value is None:
            infinite = f"{name}_infinite" in results or str(results.get(f"{name}_note")).startswith("infinite")
            value = math.inf if infinite else math.nan
        note = f" <small>{notes[title]}</small>" if title in notes and name else ""
        cells.append(f'<td data-name="{title}">{number(value, decimals)}{note}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def chart(title: str, curves: dict[str, list[tuple[int, float]]]) -> str:
    """Curves over steps as inline SVG, logarithmic where they fall or rise tenfold; values alone where there is one
    step."""
    width, height = 320, 150
    steps, values = zip(*(point for curve in curves.values() for point in curve))
    logarithmic = min(values) > 0 and max(values) > 10 * min(values)
    scale = math.log10 if logarithmic else float
    low, high = scale(min(values)), scale(max(values))

    def place(step: int, value: float) -> tuple[float, float]:
        return (width * (step - min(steps)) / (max(steps) - min(steps) or 1),
                height - height * (scale(value) - low) / (high - low or 1))

    lines, legend = [], []
    for i, (name, curve) in enumerate(curves.items()):
        points = [place(*point) for point in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        lines.append(f'<polyline class="c{i % 6}" stroke="currentColor" points="{path}"/>')
        if len(points) <= 20:
            lines += [f'<circle class="c{i % 6}" fill="currentColor" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
                      for x, y in points]
        legend.append(f'<span class="c{i % 6}">{escape(name)} <b>{curve[-1][1]:.4g}</b></span>')
    legend = f"<figcaption>{' '.join(legend)}</figcaption>"
    if min(steps) == max(steps):
        return f"<figure><figcaption>{title}, step {text(steps[0])}</figcaption>{legend}</figure>"
    kind = ", logarithmic" if logarithmic else ""
    return (f"<figure><figcaption>{title}{kind}: {min(values):.4g} to {max(values):.4g}, "
            f"step {text(min(steps))} to {text(max(steps))}</figcaption>"
            f'<svg viewBox="-4 -4 {width + 8} {height + 8}" fill="none" stroke-width="1.5" role="img" '
            f'aria-label="{title} over steps">{"".join(lines)}</svg>{legend}</figure>')


def data_uri(path: Path) -> str:
    kind = {".png": "image/png", ".mp4": "video/mp4"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def pictures(paths: list[Path], root: Path, problems: list[str]) -> str:
    """Sheets, and the first few clips that are small. Damaged ones are added to `problems`."""
    html, videos = [], []
    for path in paths:
        caption = f"<figcaption>{escape(name_of(path, root))}</figcaption>"
        try:
            if path.suffix == ".mp4" and len(videos) < NUM_VIDEOS and path.stat().st_size <= LARGEST_VIDEO:
                videos.append(f'<figure><video src="{data_uri(path)}" controls loop muted playsinline></video>{caption}'
                              "</figure>")
            elif path.suffix == ".png":
                with Image.open(path) as image:
                    image.load()
                html.append(f'<figure><img src="{data_uri(path)}" alt="contact sheet">{caption}</figure>')
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # as Pillow fails
            problems.append(f"{name_of(path, root)}: {error}")
    return "".join([*html, '<div class="clips">', *videos, "</div>"])


def caveats(reports: list[Report], runs: list[Run]) -> list[str]:
    """What these numbers are not."""
    found = []
    demos = [ROOT / str(run.args.get("data_root")) / "UCF-101" / "demo.json" for run in runs]
    if any(map(os.path.exists, demos)):
        found.append("Demo data, photographs moved by a camera, and small models: they show that everything runs and "
                     "learns, not what the methods reach.")
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
    return found


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #f3f4f6; --line: #d5d9df; --dim: #59636e;
  --warn: #fff4d6; --c0: #0b62c4; --c1: #c2410c; --c2: #15803d; --c3: #9333ea; --c4: #b91c5c; --c5: #0f766e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #14171b; --soft: #1e2329; --line: #3a424c;
  --dim: #9aa4af; --warn: #3a3116; --c0: #6cb0ff; --c1: #ff9d5c; --c2: #5fd38a; --c3: #c9a0ff; --c4: #ff8fb8;
  --c5: #5fd6c9; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 76rem;
  margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; } p { margin: .3rem 0; }
.note { background: var(--warn); padding: .6rem 1rem .6rem 2rem; border-radius: .4rem; }
small, figcaption, .protocol p { color: var(--dim); font-size: .85em; font-weight: normal; }
table { border-collapse: collapse; width: 100%; } td small { display: block; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem; border-bottom: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; } .protocol, td:first-child, pre, figcaption { overflow-wrap: anywhere; }
.protocol th { background: var(--soft); font-weight: normal; }
details { font-size: .85em; font-weight: normal; } summary { cursor: pointer; color: var(--c0); }
pre { white-space: pre-wrap; margin: .3rem 0; }
figure { margin: .5rem 0; } img { max-width: 100%; height: auto; background: white; }
.charts, .clips { display: flex; flex-wrap: wrap; gap: 1rem; } .charts figure { flex: 1 1 17rem; max-width: 24rem; }
.clips figure { max-width: 100%; } video { min-width: 14rem; max-width: 100%; image-rendering: pixelated; }
svg { width: 100%; border: 1px solid var(--line); border-radius: .3rem; } figcaption span { margin-right: .8em; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
@media (max-width: 45rem) { table, tbody, tr, td, th { display: block; } thead { display: none; }
  td { border: 0; padding: .1rem .6rem; } td:empty { display: none; } tr { border-bottom: 1px solid var(--line); }
  td[data-name]::before { content: attr(data-name) ": "; color: var(--dim); } td small { display: inline; } }
"""
LEGEND = """<p><small>Floor: the FVD between two halves of the real clips. Spread: its deviation over resamples of the
clips. At ∞: extrapolated to infinitely many clips. KVD: a distance of the same features that is not biased by the
number of clips. Precision and density: how many generated clips lie near real ones; recall and coverage: how many
real ones lie near generated ones. PSNR in dB, of a clip's mean squared error or the mean of its frames'; of the mean
frame: what a clip's own mean picture would reach; given: of the frames that the model continues. Warping: the
squared difference of each frame and the next one moved back by the optical flow (for a reconstruction, the input's
flow); flicker: the mean second difference in time; frozen: the share of frames that repeat the one before; seams: the
error on borders of blocks over that inside, of samples the jumps, 1 without seams; the same of the real clips beside
them. NLL: of the samples
under the model that drew them, in nats: LARP's of a code, without guidance; SiT's of a clip's latents.</small></p>"""


def page(root: Path, reports: list[Report], runs: list[Run], problems: list[str]) -> str:
    """Damaged pictures are added to `problems`."""
    body = []
    if reports:
        body += ["<h2>Numbers</h2>", table(alike(reports), root), LEGEND, "<h2>Pictures</h2>"]
    for report in reports:
        body += [f"<h3>{escape(name_of(report.folder, root))} <small>{escape(report.record['title'])}</small></h3>",
                 pictures(pictures_of_report(report.folder), root, problems)]
    body += ["<h2>Training</h2>"] if runs else []
    for run in runs:
        charts = [chart(title, curves) for title, curves in run.curves.items() if curves]
        body += [f"<h3>{escape(name_of(run.folder, root))} <small>up to step {text(run.step)}</small></h3>",
                 f'<div class="charts">{"".join(charts)}</div>', pictures(pictures_of_run(run.folder), root, problems),
                 details("Flags", run.args)]
    head = [f"<h1>{escape(root.name)}</h1>", items("note", caveats(reports, runs))]
    head += ["<h2>Left out</h2>", items("problems", problems)] if problems else []
    return ('<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{escape(root.name)}</title><style>{STYLE}</style>'
            f"</head><body>{''.join([*head, *body])}</body></html>\n")


def items(kind: str, lines: list[str]) -> str:
    return f'<ul class="{kind}">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of runs, evaluations and samples, at any depth")
    parser.add_argument("--output", type=Path, help="the page (default: FOLDER/index.html)")
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder}: no such folder; give one of runs and reports, such as results/quickstart")
    folder = args.folder.resolve()
    reports, runs, problems = gather(folder)
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
