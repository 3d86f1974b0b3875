"""sample.py with a LARP generator, by class and by given frames: shards, processes, kills, the report, mistakes. Holds
sampling/larp.py and sampling/generator.py too."""
import csv
import json
import re
import shutil
import signal
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import error_line, known, run, start, tiny_larp, wait
from PIL import Image

import data.clips
import sample
from common.cli import one_line_errors
from data.clips import ClipDataset
from data.lists import list_csv
from data.video import FrameError, read_frames, to_bytes
from eval.protocols import PROTOCOLS
from models.larp_ar import LARPGenerator
from models.larp_tokenizer import LARPTokenizer
from models.pretrained import weights_sha256
from sampling import larp
from sampling.real_clips import real_batches, segments
from sampling.store import chunk_indices
from training import checkpoint
from training.load import TrainedLARP, load_larp_ar

FRAMES, SIZE, CODES, BOOK = 12, 32, 12, 32
GENERATOR = {"dim": 32, "n_layer": 2, "n_head": 2, "num_classes": 2, "vocab_size": BOOK, "max_seq_len": CODES}
FP = GENERATOR | {"frame_prediction": True, "cls_token_num": CODES + 1}


def random_weights(model):
    """Large enough that samples differ."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders laid out as the released repositories: LARP-L-long-tokenizer, -AR and -AR-FP."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hywang66")
    tokenizer = tiny_larp(SIZE, FRAMES, CODES, BOOK)
    torch.nn.init.constant_(tokenizer.final_layer.linear.bias, 0.5)  # few pixels are clamped
    tokenizer.save_pretrained(folder / "LARP-L-long-tokenizer")
    random_weights(LARPGenerator(**GENERATOR)).save_pretrained(folder / "LARP-L-long-AR")
    random_weights(LARPGenerator(**FP)).save_pretrained(folder / "LARP-L-long-AR-FP")
    return folder


@pytest.fixture(scope="module")
def lists(data, tmp_path_factory):
    """Folder of ucf101_train.csv and k600_val.csv of the demo data, as data/metadata.py writes them."""
    folder = tmp_path_factory.mktemp("lists")
    run("data/metadata.py", "ucf101", "--root", data / "UCF-101", "--out", folder)
    shutil.copy(folder / "ucf101_train.csv", folder / "k600_val.csv")
    return folder


@pytest.fixture
def published(models, lists):
    """{name: the published command line, but for its --output_dir}, with paths in place of ids and less to sample."""
    tokenizer = f"--tokenizer {models}/LARP-L-long-tokenizer"
    small = "--num_samples 5 --save png --num_workers 0"
    return {
        "class": f"--ar_model {models}/LARP-L-long-AR {tokenizer} --num_samples 10000 --sample_batch_size 64 "
        f"--cfg_scale 1.25 --dtype bfloat16 --dataset_csv {lists}/ucf101_train.csv --dataset_split_seed 42 "
        f"{small}".split(),
        "fp": f"--fp --num_cond_frames 5 --ar_model {models}/LARP-L-long-AR-FP {tokenizer} --num_samples 50000 "
        f"--sample_batch_size 64 --dtype bfloat16 --dataset_csv {lists}/k600_val.csv --dataset_split_seed 42 "
        f"{small}".split(),
    }


class TinyI3D:
    """In I3D's place: 400 fixed projections of the clip's pixels at 8x8, which is all that these tests need."""

    weights_sha256 = "tiny"

    @classmethod
    def from_weights(cls, path=None, eps=1e-3):
        return cls()

    def to(self, device):
        return self

    def __call__(self, video, resize):
        assert video.min() >= 0 and video.max() <= 1 and resize == "square"
        pixels = torch.nn.functional.interpolate(video, (FRAMES, 8, 8)).flatten(1)
        weight = torch.randn(pixels.shape[1], 400, generator=torch.Generator().manual_seed(0))
        return torch.cat([clip[None] @ weight for clip in pixels])


@pytest.fixture
def sampled(published, tmp_path, monkeypatch):
    """Runs a published command in this process; flags given go over it. Returns the output folder."""
    def sampled(name, kind, *more, fvd=False):
        line = [*published[kind], "--output_dir", tmp_path / name, *more, *["--no_fvd"] * (not fvd)]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, line)])
        monkeypatch.setattr(sample, "I3D", TinyI3D)
        sample.main()
        return tmp_path / name
    return sampled


def pixels(folder, index, kind="sampled_videos"):
    frames = sorted((folder / kind / f"{index:06d}").iterdir())
    return np.stack([np.asarray(Image.open(path)) for path in frames])


def assert_same_samples(one, two, num=5):
    for index in range(num):
        assert np.array_equal(pixels(one, index), pixels(two, index)), f"sample {index}"


def rows(folder):
    chunks = [dict(np.load(path)) for path in sorted(folder.glob("chunks/*.npz"))]
    order = np.concatenate([chunk["index"] for chunk in chunks]).argsort()
    return {name: np.concatenate([chunk[name] for chunk in chunks])[order]
            for name in chunks[0] if name != "left_out"}


@pytest.mark.parametrize("kind", ["class", "fp"])
def test_samples_do_not_depend_on_batches(sampled, kind):
    one = sampled("one", kind, "--sample_batch_size", 1, "--num_samples", 8)
    assert pixels(one, 0).shape == (FRAMES, SIZE, SIZE, 3)
    assert (pixels(one, 0) != pixels(one, 1)).mean() > 0.3, "samples differ"
    for batch_size in (3, 8):
        other = sampled(f"by {batch_size}", kind, "--sample_batch_size", batch_size, "--num_samples", 8)
        assert_same_samples(one, other, 8)
        assert np.array_equal(rows(one)["nll"], rows(other)["nll"])


def test_samples_do_not_depend_on_processes_or_kills(published, sampled, tmp_path):
    one = sampled("one", "fp", "--num_samples", 8)
    more = (*published["fp"], "--no_fvd", "--num_samples", 8, "--sample_batch_size", 2, "--output_dir")
    run("sample.py", *more, tmp_path / "two", processes=2)
    assert_same_samples(one, tmp_path / "two", 8)

    running = start("sample.py", *more, tmp_path / "killed")
    wait(running, lambda: any(tmp_path.glob("killed/chunks/*.npz")))
    running.send_signal(signal.SIGKILL)
    running.communicate()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("killed/chunks/*.npz")}
    sampled("killed", "fp", "--sample_batch_size", 3, "--num_samples", 8)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what is there is not made again"
    assert_same_samples(one, tmp_path / "killed", 8)


def test_what_cannot_be_written_stops_the_run(sampled, capsys, tmp_path):
    """With one line, and with the batch before it whole."""
    (tmp_path / "out" / "sampled_videos" / "000003" / "000.png").mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        sampled("out", "fp", "--num_samples", 8, "--sample_batch_size", 2)
    assert stopped.value.code == 1
    assert re.search(r"^error: .*Is a directory.*000003/000\.png.*$", capsys.readouterr().err, re.M)
    (chunk,) = tmp_path.glob("out/chunks/*.npz")
    assert chunk_indices(chunk) == [0, 1]


def test_the_stages_share_the_time(sampled, capsys):
    sampled("out", "fp", "--sample_batch_size", 2, fvd=True)
    said = capsys.readouterr().out
    (line,) = re.findall(r"^time: [\d.]+ s: (.*) \(writing, in the background: [\d.]+ s\)$", said, re.M)
    stages = dict(stage.rsplit(" ", 1) for stage in line.replace(" %", "").split(", "))
    assert [*stages] == [
        "finding real clips", "waiting for real clips", "sampling", "I3D", "motion", "waiting for writing"
    ]
    assert sum(map(int, stages.values())) == pytest.approx(100, abs=3)


@pytest.mark.parametrize("kind", ["class", "fp"])
def test_three_shards_out_of_order_report_as_one_run(sampled, tmp_path, kind, capsys):
    one = sampled("one", kind, "--num_samples", 8, fvd=True)
    shards = ("--num_samples", 3, "--num_samples_total", 8, "--starting_index")
    sampled("three", kind, *shards, 6, "--sample_batch_size", 1, fvd=True)
    sampled("three", kind, *shards, 0, "--sample_batch_size", 2, fvd=True)
    assert "some are missing: 3 to 5" in capsys.readouterr().out
    sampled("three", kind, *shards, 3, fvd=True)
    assert_same_samples(one, tmp_path / "three", 8)
    single, merged = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "three"))
    assert merged["record"] == single["record"]
    assert known(merged["results"]) == pytest.approx(known(single["results"]), rel=1e-6)
    assert single["results"]["fvd"] > 0 and single["results"]["nll"] > 0

    with open(tmp_path / "fvd_report.csv") as file:
        table = list(csv.DictReader(file))
    assert list(table[0])[:12] == ["ar_model", "tokenizer", "num_samples", "cfg_scale", "temperature", "top_k", "top_p",
                                   "dtype", "NLL_sampled", "fvd", "protocol", "report"]
    assert len(table) == 2 and {row["report"] for row in table} == {str(tmp_path / name / "report.json")
                                                                   for name in ("one", "three")}
    assert float(table[0]["NLL_sampled"]) == pytest.approx(single["results"]["nll"])
    assert {row["dataset_split_seed"] for row in table} == {"42"}


def test_class_conditional_protocol(sampled, models, lists, tmp_path):
    """The labels are those of the published segments; codes and their likelihood those of the model as published."""
    folder = sampled("out", "class", "--num_samples", 4, fvd=True)
    record = json.loads((folder / "report.json").read_text())["record"]
    assert record["title"] == "larp_gfvd10k*" and record["seed"] == 42 and record["num_generated"] == 4
    assert record["resize"] == PROTOCOLS["larp_gfvd10k"].resize and record["divisor"] == "N"
    assert record["sampler"]["tokenizer_dtype"] == "float16" and record["sampler"]["dtype"] == "bfloat16"
    assert record["split"] == "train"

    files = list_csv(str(lists / "ucf101_train.csv"))
    clips = ClipDataset(files, FRAMES, SIZE, "larp", short="repeat", damaged="skip")
    keys = segments(clips, 4, 42, tmp_path)
    made = rows(folder)
    labels = [files[key.index].label for key in keys]
    assert made["label"].tolist() == labels
    [(places, real)] = real_batches(clips, keys, [[0, 1, 2, 3]], 0, torch.device("cpu"))
    assert np.allclose(made["real"], TinyI3D()(real, "square"))

    model = LARPGenerator.from_pretrained(models / "LARP-L-long-AR").bfloat16()
    tokenizer = LARPTokenizer.from_pretrained(models / "LARP-L-long-tokenizer").half()
    codes, nll = model.generate(torch.tensor(labels), 1.25, seeds=[(0, i) for i in range(4)], return_nll=True)
    assert np.array_equal(made["nll"], nll)
    with torch.no_grad():
        video = to_bytes(torch.cat([tokenizer.decode(clip[None]) for clip in codes]).float())
    for i in range(4):
        assert np.array_equal(pixels(folder, i), video[i].permute(1, 2, 3, 0))


def test_frame_prediction_protocol(sampled, models, lists, tmp_path, monkeypatch):
    """Codes of the given frames are drawn as published, or the best; both sides are measured at 64x64."""
    sizes, measure = [], TinyI3D.__call__
    monkeypatch.setattr(TinyI3D, "__call__", lambda i3d, video, resize: sizes.append(video.shape[2:]) or
                        measure(i3d, video, resize))
    folder = sampled("out", "fp", "--num_samples", 3, "--save", "png", "mp4", "--det", fvd=True)
    assert set(sizes) == {(FRAMES, 64, 64)}
    report = json.loads((folder / "report.json").read_text())
    record = report["record"]
    assert record["title"] == "larp_k600fp50k*" and record["size"] == 64 and record["num_cond_frames"] == 5
    assert record["sampler"]["condition_codes"] == "best" and record["sampler"]["tokenizer_dtype"] == "float32"
    assert not [change for change in record["deviations"] if "size" in change or "cond" in change]

    files = list_csv(str(lists / "k600_val.csv"))
    clips = ClipDataset(files, FRAMES, SIZE, "larp", short="repeat", damaged="skip")
    keys = segments(clips, 3, 42, tmp_path)
    [(_, real)] = real_batches(clips, keys, [[0, 1, 2]], 0, torch.device("cpu"))
    model = LARPGenerator.from_pretrained(models / "LARP-L-long-AR-FP").bfloat16()
    tokenizer = LARPTokenizer.from_pretrained(models / "LARP-L-long-tokenizer")
    given = real[:, :, [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4]]
    cond = model.frame_condition(torch.cat([tokenizer.encode(clip[None]) for clip in given]))
    codes = model.generate(cond, seeds=[(0, i) for i in range(3)])
    with torch.no_grad():
        video = torch.cat([tokenizer.decode(clip[None]) for clip in codes]).clamp(0, 1)
    for i in range(3):
        assert np.array_equal(pixels(folder, i), to_bytes(video)[i].permute(1, 2, 3, 0))
        assert np.array_equal(pixels(folder, i, "gt"), to_bytes(real)[i].permute(1, 2, 3, 0))
        assert read_frames(str(folder / "gt" / f"{i:06d}.mp4"), range(FRAMES)).shape == (FRAMES, SIZE, SIZE, 3)
    mse = (video - real)[:, :, :5].square().mean((1, 3, 4))  # of each frame
    assert report["results"]["psnr_given"] == pytest.approx(-10 * mse.log10().mean().item(), rel=1e-4)
    assert Image.open(folder / "sheet.png").height > 3 * 2 * SIZE, "given above generated"

    drawn = sampled("drawn", "fp", "--num_samples", 3)
    assert json.loads((drawn / "report.json").read_text())["record"]["sampler"]["condition_codes"] == "drawn"
    assert (pixels(drawn, 0) != pixels(folder, 0)).mean() > 0.1


def test_fewer_segments_than_samples_and_damaged_ones(sampled, lists, tmp_path, monkeypatch):
    """Segments come round again but are measured once; what cannot be decoded is left out by frame prediction."""
    lines = (lists / "k600_val.csv").read_text().splitlines()
    (tmp_path / "k600_val.csv").write_text("\n".join(lines[:5]))
    damaged = lines[1].split(",")[1]

    def read(path, *rest, whole=data.clips.read_chosen):
        if path == damaged:
            raise FrameError(f"{path}: bad frames")
        return whole(path, *rest)

    monkeypatch.setattr("data.clips.read_chosen", read)
    few = ("--dataset_csv", tmp_path / "k600_val.csv", "--num_samples", 6)
    for kind, num_made in ("fp", 4), ("class", 6):
        flags = [] if kind == "fp" else ["--class_label", 0]
        one = sampled(f"{kind} one", kind, *few, *flags, "--sample_batch_size", 1, fvd=True)
        six = sampled(f"{kind} six", kind, *few, *flags, fvd=True)
        reports = [json.loads((folder / "report.json").read_text()) for folder in (one, six)]
        assert reports[0]["record"] == reports[1]["record"] and damaged in (one / "quarantine.txt").read_text()
        assert known(reports[0]["results"]) == pytest.approx(known(reports[1]["results"]), rel=1e-6)
        assert reports[0]["record"]["num_generated"] == len(list((one / "sampled_videos").iterdir())) == num_made
        assert reports[0]["record"]["num_real"] == 3


def test_models_without_a_list(sampled, models, data):
    """A class by its label needs no data; --video_name takes real clips from a folder."""
    folder = sampled("label", "class", "--class_label", 1, "--dataset_csv", "nowhere.csv", "--num_samples", 2)
    assert rows(folder)["label"].tolist() == [1, 1]
    folder = sampled("folder", "class", "--dataset_csv", "", "--video_name", "UCF-101_test", "--data_root", data,
                     "--num_samples", 2, "--stats_only")
    assert not list((folder / "sampled_videos").iterdir())
    assert json.loads((folder / "report.json").read_text())["record"]["split"] == "test"


def test_a_rollout_is_one_video_of_the_given_and_all_new_frames(sampled):
    """It does not depend on the batch, begins as a single clip, and is marked as a departure."""
    one = sampled("one", "fp", "--num_samples", 3, fvd=True)  # the real clips are of short videos, all from the start
    three = sampled("three", "fp", "--num_samples", 3, "--rollout", 3)
    assert pixels(three, 0).shape == (FRAMES + 2 * 7, SIZE, SIZE, 3) == pixels(three, 0, "gt").shape
    for index in range(3):
        assert np.array_equal(pixels(three, index)[:FRAMES], pixels(one, index))
        assert np.array_equal(pixels(three, index, "gt")[:FRAMES], pixels(one, index, "gt"))
        assert (pixels(three, index)[FRAMES : FRAMES + 7] != pixels(three, index)[FRAMES + 7 :]).any()
    alone = sampled("alone", "fp", "--num_samples", 3, "--rollout", 3, "--sample_batch_size", 1)
    assert_same_samples(alone, three, 3)
    report = json.loads((three / "report.json").read_text())
    assert report["record"]["num_frames"] == FRAMES + 2 * 7 and report["results"]["seams_rollout"] > 0
    assert {f"num_frames: {FRAMES + 2 * 7} instead of 16", "rollout: a sample is 3 clips, each continuing the one "
            "before, instead of 1"} <= {*report["record"]["deviations"]}
    plain = json.loads((one / "report.json").read_text())
    assert not [line for line in plain["record"]["deviations"] if "rollout" in line]


class Ramp(torch.nn.Module):
    """A tokenizer whose codes are the frames' grey levels, and a generator that lets them go on rising by `step`."""

    def __init__(self, step=2):
        super().__init__()
        book = SimpleNamespace(args=SimpleNamespace(codebook_size=256))
        book = SimpleNamespace(args=SimpleNamespace(regularizer=book))
        self.config = SimpleNamespace(
            frame_num=16, input_size=16, patch=(4, 8, 8), bottleneck_token_num=16, bottleneck=book,  # the tokenizer's
            frame_prediction=True, num_classes=0, max_seq_len=16, vocab_size=256)
        self.step, self.forgets, self.seeds = step, False, []

    def encode(self, video, deterministic, generators):
        return (video.mean((1, 3, 4)) * 255).round().long()

    def decode(self, codes):
        return (codes / 255).view(-1, 1, 16, 1, 1).expand(-1, 3, -1, 16, 16)

    def frame_condition(self, codes):
        assert (codes[:, 4:] == codes[:, 4:5]).all(), "the last given frame is held"
        return codes

    def generate(self, cond, seeds, return_nll, **draw):
        self.seeds += seeds
        start = torch.full_like(cond[:, :1], 9) if self.forgets else cond[:, :1]
        return start + self.step * torch.arange(16), torch.zeros(len(cond))


def test_four_rollouts_of_11_frames_go_on_without_a_seam(monkeypatch):
    """5 given and 4 x 11 new frames of a model that continues what it is given: every frame is known."""
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ar_model", "A", "--tokenizer", "T", "--output_dir", "O", "--fp",
                                      "--num_cond_frames", "5", "--rollout", "4", "--seed", "3"])
    args, ramp = sample.parse_args(), Ramp()
    monkeypatch.setattr(larp, "load_larp_tokenizer", lambda *_: ramp)
    monkeypatch.setattr(larp, "load_larp_ar", lambda *_: TrainedLARP(ramp, None, [], None))
    generator = larp.larp_generator(args, torch.device("cpu"))
    assert generator.num_frames == 5 + 4 * 11 and generator.settings["rollout"] == generator.rollout == 4
    expected = torch.tensor([[10], [40]]) + 2 * torch.arange(5 + 4 * 11)
    given = expected.clone()
    given[:, 5:] = 0  # only the given frames count
    real = (given / 255)[:, None, :, None, None].expand(-1, 3, -1, 16, 16)
    video, values = generator.generate([0, 1], [-1, -1], real)
    assert torch.equal((video.mean((1, 3, 4)) * 255).round().long(), expected)
    assert values["seams_rollout"].tolist() == pytest.approx([1, 1], rel=1e-3)
    assert ramp.seeds == [(3, i, clip) for clip in range(4) for i in (0, 1)]
    ramp.forgets = True
    assert generator.generate([0, 1], [-1, -1], real)[1]["seams_rollout"].min() > 5


@pytest.fixture
def trained(models, tmp_path):
    """Checkpoints of ours: class-conditional with an average, and frame prediction of three frames."""
    tokenizer = weights_sha256(LARPTokenizer.from_pretrained(models / "LARP-L-long-tokenizer"))
    for name, config in {"class": GENERATOR, "fp": FP}.items():
        model, average = (random_weights(LARPGenerator(**config)) for _ in range(2))
        checkpoint.save(tmp_path / "runs" / name / "checkpoints", 1, {
            "kind": "larp_ar", "config": asdict(model.config), "model": model.state_dict(), "tokenizer": tokenizer,
            "ema": {"0.99": average.state_dict()}, "classes": ["PanLeft", "ZoomIn"] if name == "class" else [],
            "num_cond_frames": 3 if name == "fp" else 0,
        })
    return tmp_path / "runs"


def test_our_checkpoints_carry_their_task(sampled, trained, published, tmp_path):
    folder = sampled("class", "class", "--ar_model", trained / "class", "--num_samples", 2)
    average = sampled("average", "class", "--ar_model", trained / "class", "--num_samples", 2, "--version", "ema_0.99")
    assert (pixels(folder, 0) != pixels(average, 0)).mean() > 0.1
    assert load_larp_ar(str(trained / "class"), "ema_0.99").class_names == ["PanLeft", "ZoomIn"]
    state = checkpoint.load(trained / "class" / "checkpoints")
    checkpoint.save(tmp_path / "few", 1, {**state, "classes": ["PanLeft"]})  # of the model's two
    folder = sampled("unnamed", "class", "--ar_model", tmp_path / "few", "--class_label", 1, "--num_samples", 1)
    assert (folder / "sheet.png").exists()
    published["fp"] = published["fp"][3:]
    folder = sampled("fp", "fp", "--ar_model", trained / "fp" / "checkpoints", "--num_samples", 2)
    assert json.loads((folder / "report.json").read_text())["record"]["num_cond_frames"] == 3


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("class", ["--fp", "--num_cond_frames", "5"], "is class-conditional: leave --frame_prediction"),
        ("fp", ["--cfg_scale", "1.25"], "predicts frames, without classes: leave --class_label and --cfg_scale out"),
        ("fp", ["--num_cond_frames", "12"], "--num_cond_frames is 12, expected 1 to 11"),
        ("fp", ["--ar_model", "RUN"], "--num_cond_frames 5 was given, but .*fp has 3"),
        ("class", ["--rollout", "2"], "--rollout is 2, but .* is class-conditional, so its clips cannot continue"),
        ("class", ["--class_label", "2"], "--class_label is 2, expected 0 to 1"),
        ("class", ["--dataset_csv", "null128.csv"], "null128.csv has label 100, but the model has 2 classes"),
        ("class", ["--dataset_csv", "nowhere.csv"], "no list nowhere.csv"),
        ("class", ["--protocol", "larp_k600fp50k"], "is not for this model: choose larp_gfvd10k"),
        ("class", ["--ar_model", "TOKENIZER"], "holds a larp_tokenizer model, expected a larp_ar checkpoint"),
        ("class", ["--tokenizer", "GENERATOR"], "holds a larp_ar model, expected a larp_tokenizer checkpoint"),
        ("class", ["--tokenizer", "OTHER"], "makes 12 codes of 32, but clips .* have 12 of 16"),
        ("class", ["--ar_model", "RUN", "--tokenizer", "SAME"], "was trained on a tokenizer of SHA-256"),
        ("class", ["--ar_model", "RUN", "--video_name", "RENAMED", "--dataset_csv", ""], "label 1 is Spin in RENAMED"),
        ("class", ["--version", "ema_0.9"], "holds one set of weights, not 'ema_0.9'"),
    ],
)
def test_mistakes_are_named(sampled, models, trained, data, tmp_path, kind, flags, message):
    tiny_larp(SIZE, FRAMES, CODES, 16).save_pretrained(tmp_path / "OTHER")
    random_weights(tiny_larp(SIZE, FRAMES, CODES, BOOK)).save_pretrained(tmp_path / "SAME")
    for name, folder in {"PanLeft": "PanLeft", "ZoomIn": "Spin"}.items():
        (tmp_path / "RENAMED" / folder).mkdir(parents=True)
        video = next((data / "UCF-101" / name).iterdir())
        shutil.copy(video, tmp_path / "RENAMED" / folder / "video.avi")
    there = {"RUN": trained / kind, "TOKENIZER": models / "LARP-L-long-tokenizer", "OTHER": tmp_path / "OTHER",
             "GENERATOR": models / "LARP-L-long-AR", "SAME": tmp_path / "SAME"}
    with pytest.raises((ValueError, OSError), match=message):
        sampled("out", kind, "--data_root", tmp_path, *[there.get(flag, flag) for flag in flags])


def test_foreign_shards_are_named(sampled, trained):
    folder = sampled("out", "class", "--num_samples_total", 8)
    for flags, difference in [(["--top_k", 5], "top_k 0 there, 5 here"), (["--dataset_split_seed", 1],
                              "dataset_split_seed 42 there, 1 here"), (["--ar_model", trained / "class"],
                              "ar_model_sha256 .* there, .* here")]:
        with pytest.raises(ValueError, match=f"samples of other settings: .*{difference}"):
            sampled("out", "class", "--num_samples_total", 8, *flags)
    before = pixels(folder, 0)
    sampled("out", "class", "--num_samples_total", 8, "--temperature", 0.1, "--replace")
    assert (pixels(folder, 0) != before).any()


def test_no_network_gets_one_line(published, tmp_path, monkeypatch):
    """The published ids, as they are: what was tried, where to put the files, how to go offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    done = run("sample.py", "--ar_model", "hywang66/LARP-L-long-AR", "--tokenizer", "hywang66/LARP-L-long-tokenizer",
               "--output_dir", tmp_path / "out", fails=True)
    line = error_line(done)
    for part in ("hywang66/LARP-L-long-tokenizer: not a folder", str(tmp_path), "into a folder", "HF_HUB_OFFLINE=1"):
        assert part in line
