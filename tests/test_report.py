"""scripts/report.py on reports and runs as the other scripts write them."""
import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_line, run
from PIL import Image

from data.video import write_video
from eval.pictures import contact_sheet
from eval.protocols import FACTS, PROTOCOLS, record, write_record
from scripts import report

VOID = {"meta", "img"}


class Page(HTMLParser):
    """The rows of the table by their heading, all sources, and all text; checks that tags are closed in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.groups, self.sources, self.text = [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tbody":
            self.groups.append("")
        self.sources += [value for name, value in attributes if name in ("src", "href", "poster", "srcset")]

    def handle_startendtag(self, tag, attributes):
        assert tag in ("polyline", "circle")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "tbody" in self.open:
            self.groups[-1] += data


def write_report(folder: Path, protocol: str, results: dict, **facts) -> None:
    facts = {name: 5 if "num" in name else "x" for name in FACTS} | {"model": str(folder)} | facts
    write_record(folder / "report.json", record(PROTOCOLS[protocol], **facts), results)


@pytest.fixture
def results(tmp_path) -> Path:
    """Two tokenizers measured alike, a third at another size, samples, and a run."""
    folder = tmp_path / "results"
    reconstruction = {"rfvd_floor": float("nan"), "rfvd_rank_deficient": True, "psnr_frame": 20.5, "lpips": 0.04,
                      "psnr_clip": float("inf"), "psnr_clip_infinite": 5, "rkvd": 0.125, "precision": 0.75}
    random = {"lpips": "lpips 0.1.4 vgg, RANDOM backbone"}
    write_report(folder / "one", "larp_rfvd", {"rfvd": 1111.14, **reconstruction}, **random)
    write_report(folder / "two", "larp_rfvd", {"rfvd": 2222.24, **reconstruction}, **random, git_revision="y")
    write_report(folder / "small", "larp_rfvd", {"rfvd": 3333.34, **reconstruction}, **random, size=32)
    write_report(folder / "samples" / "ar", "larp_gfvd10k", {"fvd": 4444.44, "nll": 2.345})
    video = torch.rand(3, 4, 32, 32)
    contact_sheet(folder / "one" / "sheet.png", [(video,)])
    (folder / "samples" / "ar" / "sampled_videos").mkdir()
    for i in range(report.NUM_VIDEOS + 1):
        write_video(folder / "samples" / "ar" / "sampled_videos" / f"{i:06d}.mp4", video)
    for step in (1, 2):
        contact_sheet(folder / "run" / "samples" / f"step_{step:07d}_val.png", [(video,)])
    (folder / "run" / "args.json").write_text(json.dumps({"lpips_weights": "auto", "note": "</pre><script>"}))
    lines = [{"step": 1, "kind": "train", "loss": 4.0}, {"step": 2, "kind": "train", "loss": 0.125},
             {"step": 2, "kind": "val", "loss": 1.0, "rfvd": float("nan"), "psnr_frame": None}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "run" / "metrics.jsonl").write_text(text + '{"step": 3, "ki')
    return folder


def test_the_page(results, tmp_path):
    done = run("scripts/report.py", results, "--output", tmp_path / "out" / "page.html")
    assert f"{tmp_path / 'out' / 'page.html'}: 4 reports, 1 runs" in done.stdout and "left out" not in done.stdout
    page = Page(tmp_path / "out" / "page.html")

    numbers = ["1,111.1", "2,222.2", "3,333.3", "4,444.4"]
    groups = [{value for value in numbers if value in group} for group in page.groups]
    assert sorted(map(sorted, groups)) == [[numbers[0], numbers[1]], [numbers[2]], [numbers[3]]]
    alike = next(group for group in page.groups if numbers[0] in group)
    assert "larp_rfvd*" in alike and "num_real: 5 instead of 9537" in alike and '"extractor_sha256": "x"' in alike
    assert alike.count("random backbone") == alike.count("rank-deficient") == 2 and "n/a" in alike
    assert alike.count("∞") == alike.count("0.750") == 2 and "KVD" in page.text
    assert "2.345" in next(group for group in page.groups if numbers[3] in group)
    for words in ("None of them was measured as published", "RANDOM", "under one heading only"):
        assert words in page.text
    assert "Demo data" not in page.text

    text = (tmp_path / "out" / "page.html").read_text()
    assert "://" not in text and "<script>" not in text and "url(" not in text
    kinds = []
    for source in page.sources:
        kind, content = re.fullmatch(r"data:(image/png|video/mp4);base64,([\w+/=]+)", source).groups()
        content = base64.b64decode(content, validate=True)
        kinds.append(kind)
        assert b"ftyp" in content[:12] if kind == "video/mp4" else np.asarray(Image.open(io.BytesIO(content))).std() > 0
    assert kinds.count("image/png") == 2, "a sheet, and the run's last samples"
    assert kinds.count("video/mp4") == report.NUM_VIDEOS
    assert "run/samples/step_0000002_val.png" in page.text and "step_0000001" not in page.text


def test_curves(results):
    """Places in a picture of 320 x 150, the y axis logarithmic: a loss falls from 4 to 1/8, five octaves."""
    curves = report.read_run(results / "run").curves
    assert curves["loss"] == {"train loss": [(1, 4.0), (2, 0.125)], "val loss": [(2, 1.0)]} and not curves["FVD"]
    drawn = report.chart("loss", curves["loss"])
    assert 'points="0.0,0.0 320.0,150.0"' in drawn and 'points="320.0,60.0"' in drawn and "logarithmic" in drawn
    assert "<svg" not in report.chart("loss", {"val loss": [(2, 1.0)]})


def test_demo_data_is_said(results, tmp_path):
    (tmp_path / "UCF-101").mkdir()
    (tmp_path / "UCF-101" / "demo.json").touch()
    (results / "run" / "args.json").write_text(json.dumps({"data_root": str(tmp_path)}))
    assert any("Demo data" in line for line in report.caveats([], [report.read_run(results / "run")]))


def make_page(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, flags)])
    report.main()


def test_what_cannot_be_read_is_named(results, monkeypatch, capsys):
    (results / "one" / "report.json").write_text('{"results": {')
    (results / "two" / "report.json").write_text('{"results": {}, "record": {"title": "mine"}}')
    (results / "half" / "chunks").mkdir(parents=True)
    (results / "stopped").mkdir()
    (results / "stopped" / "metrics.jsonl").touch()
    (results / "run" / "samples" / "step_0000002_val.png").write_bytes(b"no picture")
    make_page(monkeypatch, results)
    page, said = Page(results / "index.html"), capsys.readouterr().out
    for line in (r"one: report\.json is damaged: .*char", r"two: report\.json is no report: its record lacks",
                 r"half: no report\.json", r"stopped: metrics\.jsonl is empty", r"step_0000002_val\.png: cannot"):
        assert re.search(f"left out: .*{line}", said) and re.search(line, page.text)
    assert "2 reports, 1 runs" in said and "3,333.3" in page.text and "1,111.1" not in page.text


def change(path: Path, place: tuple, value) -> None:
    """Put a value into a JSON file, or the first line of one; without the checksum, as a file from elsewhere."""
    first, newline, rest = path.read_text().partition("\n" if path.suffix == ".jsonl" else "\0")
    content = json.loads(first)
    content.pop("sha256", None)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(content) + newline + rest)


PLACES = [
    *(("one/report.json", ("record", name)) for name in (
        "title", "description", "dataset", "num_frames", "size", "num_real", "num_generated", "model", "lpips",
        "deviations", "sampler", "seed")),
    *(("one/report.json", ("results", name)) for name in ("rfvd", "psnr_frame", "rfvd_rank_deficient", "other")),
    ("one/report.json", ("results",)), ("one/report.json", ("record",)),
    *(("run/metrics.jsonl", (name,)) for name in ("step", "kind", "loss")),
    ("run/args.json", ("data_root",)), ("run/args.json", ("lpips_weights",)),
]


@pytest.mark.parametrize(("file", "place"), PLACES, ids=lambda part: part if isinstance(part, str) else ".".join(part))
def test_whatever_the_files_hold_the_page_is_made(results, monkeypatch, capsys, file, place):
    """Text is escaped, and what cannot stand where it is leaves its file out; the others are shown."""
    path = results / file
    whole = path.read_text()
    for value in ("<script>alert(1)</script>", ["<script>"], {"<script>": "<script>"}, None, 10**400, -1, True, 1e308):
        path.write_text(whole)
        change(path, place, value)
        make_page(monkeypatch, results)
        text = (results / "index.html").read_text()
        assert "<script" not in text and "2,222.2" in text and "3,333.3" in text
        page, said = Page(results / "index.html"), capsys.readouterr().out
        left_out = [line for line in said.splitlines() if line.startswith("left out")]
        assert len(left_out) <= 1 and all(file.partition("/")[0] in line for line in left_out)
        assert ("Left out" in page.text) == bool(left_out)
    assert {path.name for path in results.iterdir()} >= {"index.html"} and not list(results.glob(".index*"))


def test_pictures_that_cannot_be_read_are_named(results, monkeypatch, capsys):
    (results / "one" / "sheet.png").unlink()
    (results / "one" / "sheet.png").mkdir()
    (results / "samples" / "ar" / "sampled_videos" / "000000.mp4").unlink()
    (results / "samples" / "ar" / "sampled_videos" / "000000.mp4").symlink_to("nowhere")
    make_page(monkeypatch, results)
    said = capsys.readouterr().out
    assert "left out: one/sheet.png" in said and "left out: samples/ar/sampled_videos/000000.mp4" in said


def test_nothing_there(tmp_path, monkeypatch):
    done = run("scripts/report.py", tmp_path, fails=True)
    assert done.returncode == 1 and "holds no report.json and no metrics.jsonl" in error_line(done)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        make_page(monkeypatch, tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
