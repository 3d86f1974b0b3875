"""scripts/report.py on reports and runs as the other scripts write them."""
import base64
import io
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_line, run
from PIL import Image

from data.video import probe, read_frames, write_video
from eval.pictures import OUTLINE, contact_sheet, write_clips
from eval.protocols import PROTOCOLS
from eval.report import FACTS, record, write_record
from scripts import report

VOID = {"meta", "img"}


class Page(HTMLParser):
    """The rows of the table by their heading, all sources, and all text; checks that tags are closed in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.groups, self.sources, self.videos, self.text = [], [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tbody":
            self.groups.append("")
        if tag == "video":
            self.videos.append(dict(attributes))
        self.sources += [value for name, value in attributes if name in ("src", "href", "poster", "srcset")]

    def handle_startendtag(self, tag, attributes):
        raise AssertionError(f"<{tag}/> is not of HTML")

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
                      "psnr_clip": float("inf"), "psnr_clip_infinite": 5, "rkvd": 0.125, "precision": 0.75,
                      "flicker": 0.0625, "flicker_real": 0.0312}
    random = {"lpips": "lpips 0.1.4 vgg, RANDOM backbone"}
    write_report(folder / "one", "larp_rfvd", {"rfvd": 1111.14, **reconstruction}, **random,
                 model="CoordTok: weights.pth 0123")
    write_report(folder / "two", "larp_rfvd", {"rfvd": 2222.24, **reconstruction}, **random, git_revision="y")
    write_report(folder / "small", "larp_rfvd", {"rfvd": 3333.34, **reconstruction}, **random, size=32)
    write_report(folder / "samples" / "ar", "larp_gfvd10k", {"fvd": 4444.44, "nll": 2.345})
    video = torch.rand(3, 4, 32, 32)
    contact_sheet(folder / "one" / "sheet.png", [(video,)])
    write_clips(folder / "one" / "reconstructions", [(video, video)] * 2)
    (folder / "samples" / "ar" / "sampled_videos").mkdir()
    for i in range(report.NUM_VIDEOS + 1):
        write_video(folder / "samples" / "ar" / "sampled_videos" / f"{i:06d}.mp4", video)
    for step in (1, 2):
        contact_sheet(folder / "run" / "samples" / "val" / f"step_{step:07d}.png", [(video,)])
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
    assert alike.count("random network") == alike.count("rank-deficient") == 2 and "n/a" in alike
    assert alike.count("∞") == alike.count("0.750") == 2 and "KVD" in page.text
    assert alike.count("0.0625 real: 0.0312") == 2 and "seams xy" not in page.text
    assert "2.345" in next(group for group in page.groups if numbers[3] in group)
    assert "CoordTok" in alike and "weights.pth 0123" in alike, "rows are named by model"
    for words in ("None of them was measured as published", "RANDOM", "under one heading only"):
        assert words in page.text
    assert "Demo data" not in page.text

    text = (tmp_path / "out" / "page.html").read_text()
    assert "://" not in text and "<script>" not in text and "url(" not in text
    kinds = []
    for source in page.sources:
        kind, content = re.fullmatch(r"data:(image/png|image/svg\+xml|video/mp4);base64,([\w+/=]+)", source).groups()
        content = base64.b64decode(content, validate=True)
        kinds.append(kind)
        if kind == "image/svg+xml":
            assert "currentColor" in content.decode() and report.INK not in content.decode()
            ElementTree.fromstring(content)
        elif kind == "video/mp4":
            assert b"ftyp" in content[:12]
        else:
            assert np.asarray(Image.open(io.BytesIO(content))).std() > 0
    assert kinds.count("image/png") == 2, "a sheet, and the run's last samples"
    assert kinds.count("image/svg+xml") == 1, "the loss; nothing else has two steps"
    assert kinds.count("video/mp4") == 2 + report.NUM_VIDEOS
    wanted = {"autoplay", "loop", "muted", "playsinline", "controls"}
    assert all(video.keys() == {"src", *wanted} for video in page.videos)
    assert "input | reconstruction" in page.text
    assert "run/samples/val/step_0000002.png" in page.text and "step_0000001" not in page.text
    order = [page.text.index(words) for words in ("Pictures", "input | recon", "Numbers", "1,111.1", "Training")]
    assert order == sorted(order), "pictures first, numbers after"
    assert "Departs from the protocol in" in page.text and "<details><summary>* Departs" in text


def test_curves(results):
    """A loss that falls from 4 to 1/8 on a logarithmic axis, with steps below, ticks, and a legend of last values."""
    curves = report.read_run(results / "run").curves
    assert curves["loss"] == {"train loss": [(1, 4.0), (2, 0.125)], "val loss": [(2, 1.0)]} and not curves["FVD"]
    (axes,) = report.draw("loss", curves["loss"]).axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 4], [2, 0.125]], [[2, 1]]]
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "step" and axes.get_title() == "loss"
    assert [label.get_text() for label in axes.get_legend().get_texts()] == ["train loss  0.125", "val loss  1"]
    assert report.draw("PSNR", {"val": [(1, 20.0), (2, 21.0)]}).axes[0].get_yscale() == "linear"
    assert report.chart("loss", curves["loss"])["uri"].startswith("data:image/svg+xml;base64,")
    assert report.chart("loss", {"val loss": [(2, 1.0)]}) == {"uri": "", "alt": "loss: val loss 1 at step 2"}
    for name in ("$\\frac{$", "_hidden", "<script>", "]]>"):
        ElementTree.fromstring(base64.b64decode(report.chart("x", {name: [(1, 1.0), (2, 2.0)]})["uri"].split(",")[1]))


def test_continued_clips_stand_beside_the_real_ones_with_given_frames_outlined(results):
    """Greys: 60 real, 120 generated; 2 of 4 frames are given. The files of the samples stay as they are."""
    folder = results / "samples" / "fp"
    write_report(folder, "larp_k600fp50k", {"fvd": 1.0}, num_cond_frames=2)
    for name, grey in (("gt", 60), ("sampled_videos", 120)):
        (folder / name).mkdir()
        write_video(folder / name / "000000.mp4", torch.full((3, 4, 32, 32), grey / 255))
    media = report.Media(results, [])
    shown = media.of_report(report.read_report(folder))
    assert "first 2 frames" in shown["what"] and not media.problems
    path = results / "pair.mp4"
    path.write_bytes(base64.b64decode(shown["videos"][0]["uri"].split(",")[1]))
    frames = read_frames(str(path), range(probe(str(path)).num_frames)).numpy().astype(int)
    assert frames.shape == (4, 32, 64, 3)
    assert abs(frames[:, 8:24, 8:24] - 60).max() <= 4 and abs(frames[:, 8:24, 40:56] - 120).max() <= 4
    outlined = [abs(frame[0, ::8] - 255 * np.array(OUTLINE)).max() < 60 for frame in frames]
    assert outlined == [True, True, False, False]
    (folder / "gt" / "000000.mp4").write_bytes(b"no video")
    assert not media.of_report(report.read_report(folder))["videos"]
    assert "fp/sampled_videos/000000.mp4" in media.problems[0]


def test_demo_data_is_said(results, tmp_path):
    (tmp_path / "UCF-101").mkdir()
    (tmp_path / "UCF-101" / "demo.json").touch()
    (results / "run" / "args.json").write_text(json.dumps({"data_root": str(tmp_path)}))
    assert "Demo data" in report.page(results, [], [report.read_run(results / "run")], [])


def make_page(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, flags)])
    report.main()


def test_what_cannot_be_read_is_named(results, monkeypatch, capsys):
    (results / "one" / "report.json").write_text('{"results": {')
    (results / "two" / "report.json").write_text('{"results": {}, "record": {"title": "mine"}}')
    (results / "half" / "chunks").mkdir(parents=True)
    (results / "stopped").mkdir()
    (results / "stopped" / "metrics.jsonl").touch()
    (results / "run" / "samples" / "val" / "step_0000002.png").write_bytes(b"no picture")
    make_page(monkeypatch, results)
    page, said = Page(results / "index.html"), capsys.readouterr().out
    for line in (r"one: report\.json is damaged: .*char", r"two: report\.json is no report: its record lacks",
                 r"half: no report\.json", r"stopped: metrics\.jsonl is empty", r"step_0000002\.png: cannot"):
        assert re.search(f"left out: .*{line}", said) and re.search(line, page.text)
    assert "2 reports, 1 runs" in said and "3,333.3" in page.text and "1,111.1" not in page.text


def test_where_nothing_can_be_read_no_page_is_made(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "ki')
    with pytest.raises(ValueError, match=f"{tmp_path}: nothing in it can be read"):
        make_page(monkeypatch, tmp_path)
    assert capsys.readouterr().out == "left out: run: metrics.jsonl is cut within its first line\n"
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize(("losses", "remark"), [
    (["NaN", "null"], "run: no finite loss from step 1 on."), (["1.0", "NaN", "Infinity"], "loss from step 2 on."),
    (["NaN", "1.0"], None),
])
def test_a_loss_that_is_not_finite_is_remarked(tmp_path, losses, remark):
    (tmp_path / "run").mkdir()
    lines = [f'{{"step": {step}, "kind": "train", "loss": {loss}}}\n' for step, loss in enumerate(losses, 1)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join([*lines, '{"step": 9, "kind": "val", "psnr": 1}\n']))
    found = report.caveats([], [report.read_run(tmp_path / "run")])
    assert remark in found[0] if remark else not found


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
    if path.suffix != ".jsonl":  # curves are of those alone, and slow
        monkeypatch.setattr(report, "chart", lambda *_: {"uri": "", "alt": ""})
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
