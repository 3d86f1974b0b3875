"""One table and one plot of several evaluations over bits per pixel: PSNR, SSIM, LPIPS or ST-LPIPS, and rFVD.

    python -m eval.rate_distortion [NAME=]report.json ... --output FOLDER

The reports are those of eval.reconstruct and of both evaluation scripts. They must have been measured alike.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import Parser, one_line_errors
from common.files import atomic_write
from eval.report import comparable, read_record

# What may differ between rows: all else is how a number was measured.
OF_THE_MODEL = ("model", "sampler", "git_revision", "world_size")
METRICS = {  # {name in results: (heading, decimals)}
    "psnr_frame": ("PSNR of frames, dB (higher is better)", 2),
    "ssim": ("SSIM (higher is better)", 4),
    "lpips": ("LPIPS (lower is better)", 4),
    "stlpips": ("ST-LPIPS (lower is better)", 4),
    "rfvd": ("rFVD (lower is better)", 1),
}
MARKERS = "osD^vP*X"


def read_points(sources: Sequence[str | Path]) -> tuple[list[tuple[str, dict]], dict]:
    """([(name, results)] of reports "NAME=PATH" or "PATH", by name and bits; the record that they share).

    A report without a name has that of its model. ValueError where reports were measured differently, have no bits, or
    one NAME is given to two of as many bits, which are no two points of one curve.
    """
    given: set[tuple[str, float]] = set()
    points, records = [], []
    for source in map(str, sources):
        name, _, path = source.rpartition("=") if not Path(source).exists() else ("", "", source)
        if not Path(path).is_file():
            what = "is a folder, expected a report.json: give a file in it" if Path(path).is_dir() else \
                "no such file; expected a report.json of an evaluation"
            raise FileNotFoundError(f"{path}: {what}")
        report = read_record(path)
        results, record = report["results"], report["record"]
        records.append((path, record))
        first_path, first = records[0]
        if differs := comparable(first, record, OF_THE_MODEL):
            raise ValueError(f"{path} and {first_path} were not measured alike ({', '.join(differs)} differ): compare "
                             "them in tables of their own")
        if results.get("bits_per_pixel") is None:
            raise ValueError(f"{path} has no bits_per_pixel: evaluate again with this version")
        if (point := (name, results["bits_per_pixel"])) in given:
            raise ValueError(f"{name} has two reports of {point[1]:g} bits per pixel: give each a name of its own")
        given |= {point} if name else set()
        points.append((name or record["model"].split()[0], results))
    return sorted(points, key=lambda point: (point[0], point[1]["bits_per_pixel"])), records[0][1]


def table(points: list[tuple[str, dict]]) -> str:
    """Markdown, a row each point; an infinite PSNR is shown as inf."""
    shown = [name for name in METRICS if any(name in results for _, results in points)]
    headings = [METRICS[name][0].split(" (")[0] for name in shown]
    lines = [f"| tokenizer | bits per pixel | {' | '.join(headings)} |", "|---" * (len(shown) + 2) + "|"]
    for label, results in points:
        values = [f"{results[name]:.{METRICS[name][1]}f}" if results.get(name) is not None
                  else "inf" if f"{name}_infinite" in results else "unavailable" for name in shown]
        lines.append(f"| {label} | {results['bits_per_pixel']:.4f} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def plot(path: Path, points: list[tuple[str, dict]], title: str) -> None:
    """A panel for each metric, a line for each tokenizer, bits per pixel on a logarithmic axis."""
    from matplotlib.figure import Figure  # late: 0.5 s; a figure of its own needs no display and leaves no state

    shown = [name for name in METRICS if any(results.get(name) is not None for _, results in points)]
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    labels = list(dict.fromkeys(label for label, _ in points))
    rates = [results["bits_per_pixel"] for _, results in points]
    steps = [step * 10.0**power for power in range(-6, 6) for step in (1, 2, 5)]
    low = max(step for step in steps if step < min(rates))
    high = min(step for step in steps if step > max(rates))
    ticks = [step for step in steps if low <= step <= high]
    for axis, metric in zip(axes, shown):
        for i, label in enumerate(labels):
            line = [(results["bits_per_pixel"], results[metric]) for name, results in points
                    if name == label and results.get(metric) is not None]
            if line:
                axis.plot(*zip(*line), marker=MARKERS[i % len(MARKERS)], color=f"C{i % 10}", label=label)
        axis.set(xscale="log", xlabel="bits per pixel", title=METRICS[metric][0])
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.set_xlim(ticks[0], ticks[-1])
        axis.grid(alpha=0.3)
    for axis in axes[len(shown):]:
        axis.remove()
    lines, names = _handles(list(axes[: len(shown)]))
    figure.legend(lines, names, loc="outside lower center", ncols=min(4, len(labels)))
    figure.suptitle(title, fontsize=10)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _handles(axes: Sequence) -> tuple[list, list]:
    """Lines and names for a legend: a tokenizer may be missing in one panel."""
    found: dict[str, Any] = {}
    for axis in axes:
        found |= {label: line for line, label in zip(*axis.get_legend_handles_labels())}
    return list(found.values()), list(found)


def write_comparison(sources: Sequence[str | Path], folder: Path) -> str:
    """Write rate_distortion.md and .png to `folder`, and return the text: the table and where the plot is."""
    points, record = read_points(sources)
    title = (f"{record['title']}: {record['num_real']} clips of {record['num_frames']} frames at "
             f"{record['size']}x{record['size']}, {record['dataset']} {record['split']}")
    text = f"{title}\n\n{table(points)}"
    folder.mkdir(parents=True, exist_ok=True)
    plot(folder / "rate_distortion.png", points, title)
    with atomic_write(folder / "rate_distortion.md", "w") as file:
        file.write(text)
    return f"{text}\ntable and plot: {folder / 'rate_distortion.md'}, .png"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__.split("\n")[0], prog="python -m eval.rate_distortion")
    parser.add_argument("reports", nargs="+", metavar="[NAME=]report.json", help="evaluations, each with a name")
    parser.add_argument("--output", default="results/rate_distortion", help="folder of the table and the plot")
    args = parser.parse_args(argv)
    print(write_comparison(args.reports, Path(args.output)))


if __name__ == "__main__":
    with one_line_errors():
        main()
