"""All benchmarks within a time budget. Every run adds dated rows to history.csv, so that a regression shows, and makes
of the newest ones the tables of RESULTS.md, ratio.png, mfu.png and memory.png.

    python -m scripts.benchmarks.run_all [--device cpu|cuda] [--budget 480] [--folder scripts/benchmarks]

Small sizes on a CPU, mostly the published ones on a GPU. What does not end within the budget is stopped and named; the
rows that it had by then count. The tables replace what RESULTS.md has between two comments.
"""
import argparse
import csv
import datetime
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.benchmarks.common import device_name

RUNS = {
    "cpu": [
        "train_step --device cpu --rounds 3 --steps coordtok_1 sit larp_ar",
        "train_step --device cpu --rounds 1 --steps coordtok_2 larp_tokenizer",
        "precision --device cpu",
        "larp_tokenizer --device cpu --batch 2 --rounds 3",
        "loader --num_videos 2 --repeats 3",
        "sit --device cpu --rounds 2 --steps 5",
        "ar_train --device cpu --rounds 2",
        "ar_generate --device cpu --model llama-abs-S --codes 64 --batch 8",
        "sample --device cpu --rounds 1 --num_batches 2",
        "render --device cpu --slices 32 --rounds 1",
        "i3d --device cpu --num_clips 4 --batch_size 4 --repeats 1",
    ],
    "cuda": [
        "ar_generate --device cuda --model llama-abs-LP --batch 64 --cfg_scale 1.25 --dtype bfloat16 --plain_codes 32"
        " --profile",
        *(f"train_step --device cuda --rounds 2 --variants all --profile --steps {step}"
          for step in ("larp_tokenizer", "coordtok_1", "larp_ar", "sit", "coordtok_2")),
        "i3d --device cuda",
        "sit --device cuda --rounds 1",
        "larp_tokenizer --device cuda --compile --rounds 3",
        "precision --device cuda",
        "loader --num_videos 2 --repeats 1",
        "render --device cuda",
        "ar_train --device cuda --rounds 2",
        "sample --device cuda --rounds 1",
    ],
}
FIELDS = ("date", "device", "benchmark", "variant", "ratio", "mfu", "memory_gib", "deviation")
START, END = "<!-- by run_all -->", "<!-- end -->"


def run(command: str, seconds: float) -> list[dict]:
    """The records of one benchmark, which has so long."""
    print(f"== {command}", flush=True)
    name, *flags = command.split()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record"
        try:
            subprocess.run(
                [sys.executable, "-m", f"scripts.benchmarks.{name}", *flags, "--record", str(path)], check=True,
                timeout=max(seconds, 0.1), cwd=Path(__file__).parents[2],
            )
        except subprocess.TimeoutExpired:
            print(f"stopped: the budget is spent ({command})", flush=True)
        except subprocess.CalledProcessError as error:
            print(f"failed with status {error.returncode} ({command})", flush=True)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, rows: list[dict]) -> None:
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def newest(path: Path) -> list[dict]:
    """The last row of each variant on each device."""
    with open(path, newline="") as file:
        rows = {}
        for row in csv.DictReader(file):
            key = row["device"], row["benchmark"], row["variant"]
            rows.pop(key, None)  # so that it comes last
            rows[key] = row
    return list(rows.values())


PLOTS = {  # field: (title, axis, baseline)
    "ratio": ("Speed against the plain way, in the same run", "times as fast as plain", 1.0),
    "mfu": ("Model FLOP utilisation", "share of the peak (on a CPU: of the rate of a large product)", None),
    "memory_gib": ("Peak GPU memory", "GiB", None),
}


def plot(history: Path) -> None:
    """A picture for each of PLOTS: a panel a device, bars grouped by benchmark, a line at the baseline."""
    rows = [row for row in newest(history) if row["variant"] not in ("plain", "fp32")]
    for field, (title, axis_name, baseline) in PLOTS.items():
        found = {device: [row for row in rows if row["device"] == device and row[field]]
                 for device in dict.fromkeys(row["device"] for row in rows)}
        found = {device: sorted(part, key=lambda row: row["benchmark"]) for device, part in found.items() if part}
        if not found:
            continue
        heights = [len(part) + len({row["benchmark"] for row in part}) for part in found.values()]
        figure = Figure(figsize=(9, 0.24 * sum(heights) + 0.9 * len(found) + 0.4), layout="constrained")
        figure.suptitle(title)
        panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (device, part) in zip(panels, found.items()):
            bars(panel, part, field, baseline)
            panel.set(title=device, xlabel=axis_name)
        figure.savefig(history.with_name(field.split("_")[0] + ".png"), dpi=90)


def bars(panel: Axes, rows: list[dict], field: str, baseline: float | None) -> None:
    """A horizontal bar a row, below the name of its benchmark. With a baseline they start there, on a log axis."""
    names, top = {}, 0
    for benchmark, group in itertools.groupby(rows, key=lambda row: row["benchmark"]):
        names[top] = benchmark
        for i, row in enumerate(group, top + 1):
            value, start = float(row[field]), baseline or 0
            panel.barh(i, value - start, left=start, color="#4878a8" if value >= start else "#c08040")
            place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
            panel.annotate(f"{value:.3g}", (max(value, start), i), **place)
            names[i] = row["variant"]
        top = i + 1
    panel.set_yticks(list(names), list(names.values()))
    for label in panel.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in {row["benchmark"] for row in rows} else "normal")
    panel.set_ylim(top, -1)
    panel.margins(x=0.1)
    if baseline:
        panel.set_xscale("log")
        panel.axvline(baseline, color="black", linewidth=1)
        panel.xaxis.set_major_formatter("{x:g}x")
    panel.spines[["top", "right"]].set_visible(False)


def tables(rows: list[dict]) -> str:
    """In Markdown, one for each device."""
    lines = []
    for device in dict.fromkeys(row["device"] for row in rows):
        lines += [f"**{device}**", "", "| benchmark | variant | x plain | MFU | GiB | deviation | date |",
                  "|---|---|---|---|---|---|---|"]
        for row in rows:
            if row["device"] == device:
                values = [f"{float(row[field]):.3g}" if row[field] else "" for field in FIELDS[4:]]
                lines.append(f"| {' | '.join([row['benchmark'], row['variant'], *values, row['date']])} |")
        lines.append("")
    return "\n".join(lines)


def write_tables(path: Path, rows: list[dict]) -> None:
    """Into the Markdown file at `path`, between START and END; at its end where it has no such place."""
    text = path.read_text() if path.exists() else ""
    before, _, rest = text.partition(START)
    path.write_text(f"{before}{START}\n{tables(rows)}{END}{rest.partition(END)[2] or chr(10)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=RUNS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=480, help="seconds for all of it")
    names = sorted({command.split()[0] for commands in RUNS.values() for command in commands})
    parser.add_argument("--only", nargs="+", choices=names, help="these benchmarks")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="of what it writes")
    args = parser.parse_args()
    end = time.monotonic() + args.budget
    facts = {"date": datetime.date.today().isoformat(), "device": device_name(torch.device(args.device))}
    rows = []
    for command in RUNS[args.device]:
        if args.only and command.split()[0] not in args.only:
            continue
        rows += [{**facts, **row} for row in run(command, end - time.monotonic())]
    append(args.folder / "history.csv", rows)
    plot(args.folder / "history.csv")
    write_tables(args.folder / "RESULTS.md", newest(args.folder / "history.csv"))
    print(f"{len(rows)} rows; tables and pictures: {args.folder}")


if __name__ == "__main__":
    main()
