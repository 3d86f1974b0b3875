"""All benchmarks within a time budget. Every run adds dated rows to history.csv, so that a regression shows, and makes
of the newest ones the tables of RESULTS.md, ratio.png, mfu.png and memory.png.

    python -m scripts.benchmarks.run_all [--device cpu|cuda] [--budget 480] [--folder scripts/benchmarks]

Small sizes on a CPU, mostly the published ones on a GPU. What does not end within the budget is stopped and named; the
rows that it had by then count. The tables replace what RESULTS.md has between two comments.
"""
import argparse
import csv
import datetime
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

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


def bars(path: Path, title: str, values: dict[str, float], baseline: float | None = None) -> None:
    """A horizontal bar a label, with its value. With a baseline, bars start there, on a logarithmic axis."""
    row, left, width, font = 22, 440, 460, ImageFont.load_default(13)
    image = Image.new("RGB", (left + width + 80, row * (len(values) + 2)), "white")
    draw, numbers = ImageDraw.Draw(image), [*values.values()]
    low, high = min(*numbers, baseline or 1), max(*numbers, 2 * (baseline or 0), 1e-9)

    def place(value: float) -> float:
        return left + width * (math.log(value / low) / math.log(high / low) if baseline else value / high)

    draw.text((8, 4), title, "black", font)
    for i, (label, value) in enumerate(values.items()):
        top, start, end = row * (i + 1.5), place(baseline or 0), place(value)
        draw.text((left - 8, top), label, "black", font, anchor="ra")
        draw.rectangle((min(start, end), top, max(start, end), top + row - 6), "#4878a8" if end >= start else "#c08040")
        draw.text((max(start, end) + 6, top), f"{value:.3g}", "black", font)
    image.quantize(16).save(path, optimize=True)


def plot(history: Path) -> None:
    for field, title, baseline in [
        ("ratio", "times as fast as plain in the same run (logarithmic, from 1)", 1.0),
        ("mfu", "share of the device's peak (of a large product's rate on a CPU)", None),
        ("memory_gib", "peak GPU memory, GiB", None),
    ]:
        values = {f"{row['benchmark']}: {row['variant']} ({row['device'][:16]})": float(row[field])
                  for row in newest(history) if row[field] and row["variant"] not in ("plain", "fp32")}
        if values:
            bars(history.with_name(field.split("_")[0] + ".png"), title, values, baseline)


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
