"""The audit of an FVD, with a small stand-in for I3D."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run
from PIL import Image

from common.errors import DamagedFile
from data.video import write_video
from eval import audit
from eval.audit import Choice, Extractor, curve, distance, in_both, main, nearest, other_split, through_mp4
from eval.fvd import FeatureStats, folder_features, frechet_distance, list_videos
from eval.report import read_record

FEATURES = 12


class Projections(torch.nn.Module):
    """Stands in for I3D: random projections of small clips, which eps scales as it does batch norms."""

    weights_sha256 = "0" * 64

    def __init__(self, eps: float):
        super().__init__()
        self.eps, self.calls = eps, 0
        self.scale = torch.nn.Parameter(torch.tensor((1 + eps) ** -0.5))

    def forward_prepared(self, x):
        assert x.shape[-2:] == (224, 224) and x.min() >= -1
        self.calls += len(x)
        pooled = torch.nn.functional.adaptive_avg_pool3d(x, (4, 6, 6)).flatten(1)
        return self.scale * pooled @ torch.randn(432, FEATURES, generator=torch.Generator().manual_seed(0))

    def forward(self, video, resize):
        return self.forward_prepared(audit.prepare(video, resize))


@pytest.fixture
def networks(monkeypatch):
    """The stand-ins that an audit makes, by eps. Chunks are short, so that clips can be."""
    made = {}
    monkeypatch.setattr(audit, "CHUNK", 10)
    monkeypatch.setattr(audit.I3D, "from_weights", lambda path, eps: made.setdefault(eps, Projections(eps)))
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """UCF-101_train and UCF-101_test, of videos of 20 to 22 frames that are not square, and a folder of "samples",
    blurred test videos of 20 frames."""
    root = tmp_path_factory.mktemp("data")
    flags = "--classes PanLeft TiltUp --groups 1 2 3 8 9 10 --clips 1 --size 48x32 --min_frames 20 --max_frames 22"
    run("data/demo.py", "--root", root, *flags.split())
    run("data/split_ucf.py", "--data_root", root, "--data_name", "UCF-101")
    choice = Choice(1e-3, "square", 32, "coordtok", 1, seed=0)
    (root / "samples").mkdir()
    for i, (_, clip) in enumerate(extractor(20).clips(list_videos(str(root / "UCF-101_test")), choice)):
        blurred = torch.nn.functional.avg_pool2d(clip, 5, 1, 2)
        write_video(root / "samples" / f"{i:06d}.mp4", blurred)
    return root


def extractor(num_frames: int, batch_size: int = 4) -> Extractor:
    return Extractor(None, num_frames, 4, batch_size, 0, 60.0, "cpu")


FLAGS = "--num_clips 4 --size 32 --device cpu".split()


def by_name(rows: list[dict], part: str) -> dict:
    found = [row for row in rows if part in row["row"]]
    assert len(found) == 1, (part, [row["row"] for row in rows])
    return found[0]


def test_distance_of_features_is_that_of_statistics():
    for num_real, num_fake, dim in ((30, 20, 8), (5, 7, 40), (60, 9, 20)):
        real, fake = torch.randn(num_real, 1, dim), torch.randn(num_fake, 1, dim) * 0.8 + 0.3
        for divisor in ("N", "N-1"):
            expected = frechet_distance(*(FeatureStats.from_features(x.flatten(0, 1)) for x in (real, fake)), divisor)
            assert distance(real, fake, divisor) == pytest.approx(expected, rel=1e-9)


def test_the_clips_are_those_of_the_distance(root, networks):
    """The named protocol's row is what `python -m eval.fvd` gives."""
    files, network = list_videos(str(root / "UCF-101_train")), Projections(1e-3)
    protocol = audit.dataclasses.replace(audit.CHOICES["folders"], num_frames=10, size=32)
    expected, _ = folder_features(network, files, protocol, 5, seed=3, batch_size=2, num_workers=0)
    found = Extractor(None, 10, 5, 4, 0, 60.0, "cpu").features(
        files, Choice(1e-3, "square", 32, "coordtok", 1, seed=3), "real")
    torch.testing.assert_close(found, expected[:, None])


def test_an_audit(root, networks, tmp_path, capsys):
    train, test, samples = (str(root / name) for name in ("UCF-101_train", "UCF-101_test", "samples"))
    assert main([train, samples, "--num_frames", "20", "--output", str(tmp_path), *FLAGS]) == 0
    written = (tmp_path / "audit.md").read_text()
    assert written in capsys.readouterr().out
    saved = read_record(tmp_path / "audit.json")
    rows = saved["results"]["rows"]
    measured = [row for row in rows if row["value"] is not None]
    assert len(measured) >= 14 and len(rows) == written.count("\n| ") - 1
    base = rows[0]["value"]
    for row in measured:
        assert row["interval"][0] <= row["value"] <= row["interval"][1]
        assert row["shift_interval"][0] <= row["shift"] <= row["shift_interval"][1]
        if row["unit"] == "":
            assert row["value"] == pytest.approx(base + row["shift"])
    # Values that are known: the stand-in's features scale with eps, and so do distances with its square.
    scale = (1 + 1e-3) / (1 + 1e-5)
    assert by_name(rows, "eps 1e-05")["value"] == pytest.approx(base * scale, rel=1e-4)
    widths = [by_name(rows, "eps 1e-05")[name] for name in ("shift_interval", "interval")]
    assert np.ptp(widths[0]) < 2e-3 * np.ptp(widths[1]), "both are measured on the same clips"
    assert by_name(rows, "divisor N ")["shift"] < 0
    same = by_name(rows, "I3D resize short_side")
    assert same["shift"] == 0 and same["shift_interval"] == [0, 0], "clips are square, so that both rules are one"
    assert by_name(rows, "straight to 224x224, short_side")["shift"] != by_name(rows, "224x224, square")["shift"] != 0
    assert by_name(rows, "first frame")["shift"] != 0 and by_name(rows, "chunks of 10")["shift"] != 0
    assert by_name(rows, "UCF-101_test as the real side")["shift"] != 0
    assert abs(by_name(rows, "generated clips through mp4, crf 5")["shift"]) < abs(
        by_name(rows, "generated clips through mp4, crf 23")["shift"])
    assert by_name(rows, "each clip's error")["shift"] == 0 < by_name(rows, "each frame's error")["shift"]
    for part, reason in (("stride 2", "real: 0 videos have 39 frames"), ("infinitely", "1000 clips"),
                         ("before any file", "not an output folder of sample.py")):
        row = by_name(rows, part)
        assert row["value"] is None and ("30 clips" if part == "infinitely" else reason) in row["note"]
    # No clip went through a network twice.
    assert sum(network.calls for network in networks.values()) == saved["results"]["clips_through_i3d"]
    record = saved["record"]
    assert record["num_real"] == record["num_generated"] == 4 and "num_frames: 20 instead of 16" in record["deviations"]
    assert saved["results"]["in_both"] == {"generated": [], "UCF-101_test": []}
    with Image.open(tmp_path / "nearest.png") as sheet:
        assert sheet.height > 4 * 2 * 96


def test_some_rows_of_short_clips(root, networks, tmp_path):
    """10 frames of these videos can be taken at stride 2 from both sides; a clip is one chunk."""
    flags = ["--rows", "stride", "chunks", "--num_frames", "10", "--output", str(tmp_path), *FLAGS]
    main([str(root / "UCF-101_train"), str(root / "samples"), *flags])
    rows = read_record(tmp_path / "audit.json")["results"]["rows"]
    assert [row["row"] for row in rows] == ["the named protocol", "stride 2 instead of 1", "chunks of 10 frames"]
    assert rows[1]["shift"] != 0 and rows[1]["note"] == "" and rows[2]["value"] is None


def test_a_side_that_is_too_short_keeps_its_clips(root, networks, tmp_path):
    for i, (_, clip) in enumerate(extractor(10).clips(list_videos(str(root / "samples")),
                                                      Choice(1e-3, "square", 32, "coordtok", 1, seed=0))):
        write_video(tmp_path / f"{i}.mp4", clip)
    main([str(root / "UCF-101_train"), str(tmp_path), "--rows", "stride", "--num_frames", "10", "--output",
          str(tmp_path / "out"), *FLAGS])
    row = read_record(tmp_path / "out" / "audit.json")["results"]["rows"][1]
    assert row["shift"] != 0 and row["note"] == "generated: 0 videos have 19 frames, kept as they are"


def test_samples_before_and_after_the_file(root, networks, tmp_path):
    """An output folder of sample.py holds the features of its samples as tensors."""
    folder, features = tmp_path / "out", torch.randn(4, FEATURES)
    (folder / "sampled_videos").mkdir(parents=True), (folder / "chunks").mkdir(), (folder / "gt").mkdir()
    for path in (root / "samples").iterdir():
        (folder / "sampled_videos" / path.name).write_bytes(path.read_bytes())
    (folder / "gt" / "000000.mp4").write_bytes(path.read_bytes())  # not a sample
    settings = {"protocol": "styleganv_fvd2048_16f", "i3d": "0" * 64, "i3d_eps": 1e-3}
    (folder / "settings.json").write_text(json.dumps(settings))
    np.savez(folder / "chunks" / "0-3.npz", index=np.arange(4), fake=features.numpy())
    assert len(list_videos(str(folder))) == 4
    flags = [str(root / "UCF-101_test"), str(folder), "--rows", "mp4", "--num_frames", "20", "--output", str(tmp_path)]
    main([*flags, *FLAGS])
    row = by_name(read_record(tmp_path / "audit.json")["results"]["rows"], "as tensors")
    real = extractor(20).features(list_videos(str(root / "UCF-101_test")), Choice(1e-3, "square", 32, "coordtok", 1, 0),
                                  "real")
    assert row["value"] == pytest.approx(distance(real, features[:, None], "N-1"), rel=1e-6)
    paths = sorted(map(str, (folder / "sampled_videos").iterdir()))
    i3d = networks[1e-3]
    torch.testing.assert_close(audit.stored_features(folder, paths[::-1], i3d, "square"), features.flip(0)[:, None])
    with pytest.raises(DamagedFile, match="lacks 1 of the samples, among them 000009"):
        audit.stored_features(folder, [*paths, "000009.mp4"], i3d, "square")
    assert audit.stored_features(root / "samples", paths, i3d, "square") is None
    assert audit.stored_features(folder, paths, i3d, "short_side") is None
    for other in ({"i3d_eps": 1e-5}, {"i3d": "1" * 64}, {"protocol": "larp_k600fp50k"}):
        (folder / "settings.json").write_text(json.dumps(settings | other))
        assert audit.stored_features(folder, paths, i3d, "square") is None


def test_files_that_are_in_both_lists(root, networks, tmp_path):
    videos = list_videos(str(root / "UCF-101_train"))
    (tmp_path / "copy.avi").write_bytes(Path(videos[2].path).read_bytes())
    (tmp_path / "other.avi").write_bytes(Path(videos[2].path).read_bytes()[::-1])  # of the same size
    copies = list_videos(str(tmp_path))
    assert in_both(videos, copies) == [videos[2].path]
    assert in_both(copies, videos) == [str(tmp_path / "copy.avi")] and in_both(videos, videos[:2]) == [
        video.path for video in videos[:2]]


def test_nearest_real_clips():
    real = torch.tensor([[0.0, 0], [1, 0], [0, 3]])
    places, ratio = nearest(real, torch.tensor([[0.9, 0], [0.0, 2.9], [0, 2.8]]))
    assert places.tolist() == [1, 2, 2] and ratio == pytest.approx(0.1)  # medians of .1 .1 .2, of 1 1 3


def test_the_curve_falls_to_the_distance_of_all():
    real, fake = torch.randn(200, 1, 8), torch.randn(200, 1, 8) + 0.2
    points = curve(real, fake, "N-1", seed=0)
    assert [size for size, _, _ in points] == [50, 100, 150]
    values = [value for _, value, _ in points] + [distance(real, fake, "N-1")]
    assert values == sorted(values, reverse=True)
    assert all(low < value < high for _, value, (low, high) in points)


def test_an_interval_of_a_shift_is_of_the_same_clips():
    """A shift that is the same for any clips has a narrow interval, though the distances' are wide."""
    real, fake = torch.randn(40, 1, 4), torch.randn(40, 1, 4) + 1
    plain, scaled = (audit.resampled(real, fake, "N-1", 0), audit.resampled(1.01 * real, 1.01 * fake, "N-1", 0))
    np.testing.assert_allclose(scaled, 1.01**2 * plain, rtol=1e-5)
    assert len(set(plain)) == audit.NUM_RESAMPLES


def test_mp4_loses_more_at_a_higher_crf():
    clip = torch.rand(3, 10, 32, 32)
    errors = [(through_mp4(clip, crf) - clip).square().mean().item() for crf in (5, 23, 40)]
    assert errors == sorted(errors) and 0 < errors[0] < errors[2]


def test_the_self_test_gives_the_shift(networks, monkeypatch, capsys):
    monkeypatch.setattr(audit, "noise_distance", lambda i3d, batch_size: {1e-3: 10.138087, 1e-5: 10.1661}[i3d.eps])
    assert main(["--self_test"]) == 0
    assert "shift by eps 1e-05: +0.0280, published +0.0279" in capsys.readouterr().out
    monkeypatch.setattr(audit, "noise_distance", lambda i3d, batch_size: 10.138087)
    assert main(["--self_test"]) == 1


def test_mistakes_are_named(root, networks, tmp_path, capsys):
    train = str(root / "UCF-101_train")
    assert other_split(train) == str(root / "UCF-101_test") and other_split(other_split(train)) == train
    assert other_split(str(root / "samples")) is None
    with pytest.raises(ValueError, match="real: 0 of 6 videos give a clip of 99 frames"):
        main([train, train, "--num_frames", "99", "--output", str(tmp_path), *FLAGS])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main([train, str(root / "nowhere"), *FLAGS])
    for flags, message in (([train], "give two folders"), ([train, train, "--num_clips", "1"], "2 or more"),
                           ([train, train, "--rows", "colour"], "invalid choice")):
        with pytest.raises(SystemExit):
            main(flags)
        assert message in capsys.readouterr().err
