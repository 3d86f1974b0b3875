"""sample.py with a CoordTok-SiT: shards, processes, kills, the authors' files, the report (sampling/results.py)."""
import argparse
import csv
import json
import shutil
import signal
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers import error_line, known, run, start, wait
from PIL import Image

import sample
from data.clips import ClipDataset
from data.lists import list_folder
from data.video import probe, to_bytes
from eval.i3d import I3D
from models.configs import SIT_SIZES
from models.coordtok import CoordTok
from models.interpolant import Interpolant
from models.pretrained import WeightsError, weights_sha256
from models.sit import SiT
from models.triplane import Planes
from sampling.real_clips import drawn_clips, real_batches
from sampling.store import chunk_indices
from training import checkpoint
from training.latents import LatentStats

TOKENIZER = {
    "video_shape": (10, 16, 16), "enc_embed_dim": 16, "enc_num_layers": 1, "enc_num_heads": 2, "enc_patch_size_xy": 8,
    "enc_patch_size_t": 5, "enc_patch_num_layers": 1, "latent_resolution_xy": 4, "latent_resolution_t": 8,
    "latent_n_features": 2, "latent_patch_size_xy": 4, "latent_patch_size_t": 4, "dec_embed_dim": 16,
    "dec_num_layers": 1, "dec_num_heads": 2,
}
STATS = LatentStats(*(Planes(*(torch.tensor(pair) for _ in range(3))) for pair in ([0.25, -0.5], [1.5, 0.75])))


def save_sit(folder, tokenizer, **config):
    """A checkpoint of a SiT of random weights."""
    sit = SiT(in_channels=2, hidden_size=16, depth=1, num_heads=2, num_classes=2,
              **{"input_size": (8, 4), "class_dropout_prob": 0.1, **config})
    for parameter in sit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    flags = {"model": "tiny", "num_classes": 2, "class_dropout_prob": 0.1, "path_type": "Linear",
             "prediction": "velocity", "sample_eps": None, "first_model_ckpt": "the right one"}
    return checkpoint.save(folder, 1, {
        "kind": "sit", "config": asdict(sit.config), "interpolant": asdict(Interpolant()), "args": flags,
        "tokenizer": weights_sha256(tokenizer), "statistics": STATS.state_dict(), "classes": ["PanLeft", "ZoomIn"],
        "model": sit.state_dict(), "ema": sit.state_dict(),
    })


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(SiT, tokenizer): paths of two checkpoints of random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    tokenizer = CoordTok(**TOKENIZER)
    path = checkpoint.save(folder / "coordtok", 1, {
        "kind": "coordtok", "config": asdict(tokenizer.config), "model": tokenizer.state_dict()})
    return save_sit(folder / "sit", tokenizer), path


@pytest.fixture
def base(models, data):
    return ["--sit_model", models[0], "--first_model_ckpt", models[1], "--data_root", data, "--num_sampling_steps", 6,
            "--num_workers", 0, "--save", "png", "--num_samples", 5]


@pytest.fixture
def sampled(base, tmp_path, monkeypatch):
    """Runs the script in this process; flags given go over the fixture's. Returns the output folder."""
    def sampled(name, *more, fvd=False):
        line = [*base, "--output_dir", tmp_path / name, *more, *["--no_fvd"] * (not fvd)]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, line)])
        sample.main()
        return tmp_path / name
    return sampled


def pixels(folder, index):
    frames = sorted((folder / "sampled_videos" / f"{index:06d}").iterdir())
    return np.stack([np.asarray(Image.open(path)) for path in frames]).astype(int)


def assert_same_samples(one, two, num=5):
    for index in range(num):
        assert abs(pixels(one, index) - pixels(two, index)).max() <= 1, f"sample {index}: more than rounding"


def test_samples_do_not_depend_on_batches_processes_shards_or_kills(base, sampled, tmp_path):
    one = sampled("one", "--sample_batch_size", 1)
    assert pixels(one, 0).shape == (10, 16, 16, 3)
    assert abs(pixels(one, 0) - pixels(one, 1)).max() > 10, "samples differ"
    assert_same_samples(one, sampled("five", "--sample_batch_size", 5))

    run("sample.py", *base, "--no_fvd", "--output_dir", tmp_path / "two", "--sample_batch_size", 2, processes=2)
    assert_same_samples(one, tmp_path / "two")

    line = [*base, "--no_fvd", "--output_dir", tmp_path / "killed", "--sample_batch_size", 2]
    running = start("sample.py", *line)
    wait(running, lambda: any(tmp_path.glob("killed/chunks/*.npz")))
    running.send_signal(signal.SIGINT)
    running.communicate()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("killed/chunks/*.npz")}
    for path in kept:
        assert all((tmp_path / "killed/sampled_videos" / f"{i:06d}/009.png").exists() for i in chunk_indices(path))
    sampled("killed", "--sample_batch_size", 3)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what is there is not made again"
    assert_same_samples(one, tmp_path / "killed")
    assert_same_samples(sampled("ten", "--num_samples", 10), one)


def test_shards_in_any_order_report_once(sampled, capsys):
    shards = ("--num_samples", 3, "--num_samples_total", 7, "--starting_index")
    sampled("shards", *shards, 3)
    assert "3 of 7 samples" in (said := capsys.readouterr().out)
    assert "some are missing: 0 to 2, 6" in said
    sampled("shards", *shards, 6)
    folder = sampled("shards", *shards, 0)
    said = capsys.readouterr().out
    assert "report.json" in said and "fvd_report.csv" not in said  # which --no_fvd does not write
    record = json.loads((folder / "report.json").read_text())["record"]
    assert record["num_generated"] == 7
    assert record["title"] == "styleganv_fvd2048_16f*"
    assert record["sampler"]["method"] == "Euler"
    assert len(list((folder / "sampled_videos").iterdir())) == 7
    assert (folder / "sheet.png").exists()
    before = (folder / "report.json").stat().st_mtime_ns
    sampled("shards", *shards, 0)
    assert "reported in" in capsys.readouterr().out
    assert (folder / "report.json").stat().st_mtime_ns == before


def test_exported_models_are_sampled_as_their_checkpoints(sampled, models, tmp_path, monkeypatch):
    for path, name in zip(models, ("sit", "coordtok")):
        monkeypatch.setattr(sys, "argv", ["checkpoint", str(path), str(tmp_path / name)])
        checkpoint.main()
        names = {file.name for file in (tmp_path / name).iterdir()}
        assert names == {"README.md", "config.json", "model.safetensors"}
    exported = ("--sit_model", tmp_path / "sit", "--first_model_ckpt", tmp_path / "coordtok")
    one, two = sampled("one"), sampled("two", *exported)
    for index in range(5):
        assert (pixels(one, index) == pixels(two, index)).all()
    records = [json.loads((folder / "report.json").read_text())["record"]["sampler"] for folder in (one, two)]
    assert records[0] == records[1]
    with pytest.raises(ValueError, match="holds a coordtok model, expected a sit checkpoint"):
        sampled("three", "--sit_model", tmp_path / "coordtok")
    with pytest.raises(ValueError, match="--num_classes 3 was given, but .*sit has 2"):
        sampled("four", *exported, "--num_classes", 3)


def test_of_a_sit_the_average_is_exported(models, tmp_path):
    state = checkpoint.load(models[0])
    state["ema"] = {name: tensor + 1 for name, tensor in state["model"].items()}
    for version, name in ((None, "ema"), ("ema", "ema"), ("sd", "model")):
        checkpoint.export(state, tmp_path / "out", version)
        found = checkpoint.load(tmp_path / "out")
        assert all(torch.equal(found["ema"][key], tensor) for key, tensor in state[name].items())
    assert all(torch.equal(a, b) for a, b in zip(*(LatentStats.from_state_dict(each["statistics"]).std
                                                   for each in (state, found))))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for text in ("{}", json.dumps({**config, "kind": "larp_ar"}), json.dumps({**config, "statistics": None})[:-9],
                 json.dumps({name: value for name, value in config.items() if name != "classes"})):
        (tmp_path / "out" / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json (is not of an exp|cannot be read)|lacks classes|not whole"):
            checkpoint.load(tmp_path / "out")


def test_weights_that_are_not_finite_make_no_samples(sampled, models, tmp_path):
    state = checkpoint.load(models[0])
    state["ema"]["blocks.0.attn.qkv.weight"] = state["ema"]["blocks.0.attn.qkv.weight"].clone().fill_(torch.nan)
    path = checkpoint.save(tmp_path / "nan", 1, state)
    with pytest.raises(ValueError, match="step_0000001.pt: blocks.0.attn.qkv.weight is not finite"):
        sampled("out", "--sit_model", path)
    assert not (tmp_path / "out").exists()


def test_fvd_and_its_table(sampled, data, tmp_path, models):
    """Two shards measure real and generated clips; the last one reports as a single run would."""
    try:
        I3D.from_weights()
    except WeightsError as error:
        pytest.skip(str(error))
    long_enough = sum(probe(file.path).num_frames >= 10 for file in list_folder(data / "UCF-101"))
    total = long_enough + 1
    measured = ("--video_name", "UCF-101", "--stats_only", "--num_samples_total", total)
    sampled("sharded", *measured, "--starting_index", 3, "--num_samples", 9, "--sample_batch_size", 1, fvd=True)
    folder = sampled("sharded", *measured, "--num_samples", 3, "--sample_batch_size", 2, fvd=True)
    assert not list((folder / "sampled_videos").iterdir())
    rows = {name: np.concatenate([np.load(path)[name] for path in sorted(folder.glob("chunks/*.npz"))])
            for name in ("index", "real", "fake", "label")}
    report = json.loads((folder / "report.json").read_text())
    num_real = np.isfinite(rows["real"]).all(1).sum()
    assert num_real == report["record"]["num_real"] == long_enough
    assert report["results"]["motion_clips"] == total
    assert {"warping_error", "flicker_real", "frozen", "seams_xy", "seams_xy_real"} <= report["results"].keys()
    assert report["record"]["num_generated"] == total

    whole = sampled("whole", *measured, "--num_samples", total, fvd=True)
    again = json.loads((whole / "report.json").read_text())
    assert again["results"]["fvd"] == pytest.approx(report["results"]["fvd"], rel=1e-4)
    assert again["record"] == report["record"]
    with open(tmp_path / "fvd_report.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2
    assert {row["report"] for row in table} == {str(folder / "report.json"), str(whole / "report.json")}
    assert all(row["num_samples"] == str(total) and row["protocol"] == "styleganv_fvd2048_16f*" for row in table)


def test_a_rollout_is_one_video_of_clips_in_a_row(sampled, models, tmp_path):
    """It does not depend on batches and shards, begins as a single clip, and is marked as a departure."""
    tokenizer = CoordTok(**TOKENIZER)
    tokenizer.load_state_dict(checkpoint.load(models[1])["model"])
    long = ("--sit_model", save_sit(tmp_path / "long", tokenizer, condition_on_previous=True), "--num_samples", 3)
    one = sampled("one", *long)
    three = sampled("three", *long, "--rollout", 3)
    assert pixels(three, 0).shape == (30, 16, 16, 3)
    for index in range(3):
        assert abs(pixels(three, index)[:10] - pixels(one, index)).max() <= 1
        assert abs(pixels(three, index)[10:20] - pixels(one, index)).max() > 10
    shards = ("--rollout", 3, "--num_samples_total", 3, "--sample_batch_size", 1)
    sampled("shards", *long, *shards, "--starting_index", 1)
    assert_same_samples(sampled("shards", *long, *shards, "--num_samples", 1), three, 3)
    with pytest.raises(ValueError, match="samples of other settings: rollout 3 there, None here"):
        sampled("three", *long)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (one, three)]
    assert "rollout" not in reports[0]["record"]["sampler"] and "seams_rollout" not in reports[0]["results"]
    assert not [line for line in reports[0]["record"]["deviations"] if "rollout" in line]
    assert reports[1]["record"]["num_frames"] == 30 and reports[1]["results"]["seams_rollout"] > 0
    assert reports[1]["record"]["deviations"][-1].startswith("rollout: a sample is 3 clips, ")


@pytest.mark.parametrize("flags", [
    ["--sampling_method", "dopri5"], ["--sampling_method", "heun3", "--coupled"],
    ["--sampling_method", "euler", "--reverse", "--video_name", "UCF-101"],
    ["--sampling_method", "rk4", "--likelihood"],
])
def test_probability_flow(sampled, flags):
    flags = ["--mode", "ODE", "--num_samples", 3, "--cfg_scale", 2, "--guidance_interval", 0.2, 0.8, *flags]
    one = sampled("one", *flags, "--sample_batch_size", 1)
    three = sampled("three", *flags, "--sample_batch_size", 3)
    assert_same_samples(one, three, num=3)
    results = [json.loads((folder / "report.json").read_text())["results"] for folder in (one, three)]
    assert known(results[0]) == pytest.approx(known(results[1]), rel=1e-4)
    assert ("bits_per_dim" in results[0]) == ("--likelihood" in flags)


def test_reverse_takes_real_clips_there_and_back(sampled, data, models, tmp_path):
    """The noise that the reverse flow finds leads back to the tokenizer's reconstruction of the clip."""
    folder = sampled("back", "--mode", "ODE", "--sampling_method", "rk4", "--num_sampling_steps", 30, "--reverse",
                     "--video_name", "UCF-101", "--num_samples", 2, "--class_label", 1)
    tokenizer = CoordTok(**TOKENIZER)
    tokenizer.load_state_dict(checkpoint.load(models[1])["model"])
    clips = ClipDataset(list_folder(data / "UCF-101"), 10, 16, "coordtok", damaged="skip")
    [(places, real)] = real_batches(clips, drawn_clips(clips, 2), [[0, 1]], 0, torch.device("cpu"))
    assert places == [0, 1]
    with torch.no_grad():
        expected = to_bytes(tokenizer.render(tokenizer.encode(real))).permute(0, 2, 3, 4, 1).int().numpy()
    for index in range(2):
        assert abs(pixels(folder, index) - expected[index]).max() <= 3


def test_the_authors_run_folder_gives_the_same_samples(sampled, models, tmp_path):
    """Their checkpoint, with an argparse Namespace in it, and their log with coloured dates."""
    ema = checkpoint.load(models[0])["ema"]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    state = {"model": {}, "ema": ema, "opt": {}, "args": argparse.Namespace(model="SiT-T/2")}
    torch.save(state, tmp_path / "run" / "checkpoints" / "0600000.pt")
    lines = [f"[\x1b[34m2024-11-01 00:00:00\x1b[0m] {name}: {values}" for name, values in STATS.state_dict().items()]
    (tmp_path / "run" / "log.txt").write_text("\n".join(lines))
    SIT_SIZES["SiT-T/2"] = {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 2}
    try:
        architecture = [f"--{name}={value}" for name, value in TOKENIZER.items() if name != "video_shape"]
        theirs = ("--model", "SiT-T/2", "--num_classes", 2, "--class_dropout_prob", 0.1, *architecture)
        folder = sampled("theirs", "--sit_model", tmp_path / "run", *theirs)
        assert_same_samples(folder, sampled("ours"))
        alone = tmp_path / "alone.pt"
        shutil.copy(tmp_path / "run" / "checkpoints" / "0600000.pt", alone)
        with pytest.raises(FileNotFoundError, match="log.txt"):
            sampled("alone", "--sit_model", alone, *theirs)
        sampled("alone", "--sit_model", alone, "--sit_log", tmp_path / "run" / "log.txt", *theirs)
        with pytest.raises(ValueError, match="check --class_dropout_prob, --num_classes"):
            sampled("wrong", "--sit_model", tmp_path / "run", "--model", "SiT-T/2")
    finally:
        del SIT_SIZES["SiT-T/2"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampling_method", "euler"], "--sampling_method euler is none of the SDE samplers: Euler, Heun"),
        (["--mode", "ODE", "--sampling_method", "Heun"], "Heun is none of the ODE samplers: dopri5, "),
        (["--likelihood"], "give --mode ODE"),
        (["--rollout", "2"], "--rollout is 2, but .* was trained without --condition_on_previous"),
        (["--sit_model", "LONG", "--rollout", "2", "--mode", "ODE", "--likelihood"], "are of single clips"),
        (["--class_label", "2"], "--class_label is 2, expected 0 to 1"),
        (["--guidance_interval", "0.9", "0.1"], r"--guidance_interval is \[0.9, 0.1\], expected LOW below HIGH"),
        (["--num_samples", "0"], "--num_samples is 0, expected 1 or more"),
        (["--num_samples_total", "4", "--starting_index", "4"], "none of the samples 0 to 3"),
        (["--first_model_ckpt", "OTHER"], "not trained on the tokenizer .*OTHER: --first_model_ckpt was the right one"),
        (["--first_model_ckpt", "SMALLER"], "not trained on the tokenizer"),
        (["--sit_model", "MISFIT"], r"MISFIT.* has planes of \(8, 8\) with 2 channels, .*tokenizer .* of \(8, 4\)"),
        (["--sit_model", "TOKENIZER"], "holds a coordtok model, expected a sit checkpoint"),
        (["--sit_model", "UNGUIDED", "--cfg_scale", "2"], "trained with --class_dropout_prob above 0"),
        (["--model", "SiT-L/2"], "--model SiT-L/2 was given, but .* has tiny"),
        (["--mode", "ODE", "--reverse", "--num_samples", "9"], "a real clip each"),
        (["--sit_model", "/nowhere"], "/nowhere: no such file or folder; give one, or a Hugging Face hub id"),
    ],
)
def test_mistakes_are_named(sampled, models, tmp_path, flags, message):
    state = checkpoint.load(models[1])
    tokenizer = CoordTok(**TOKENIZER)
    tokenizer.load_state_dict(state["model"])
    state["model"]["weight_tokens_xy"] += 1
    checkpoint.save(tmp_path / "OTHER", 1, state)
    save_sit(tmp_path / "MISFIT", tokenizer, input_size=(8, 8))
    save_sit(tmp_path / "UNGUIDED", tokenizer, class_dropout_prob=0.0)
    smaller = CoordTok(**{**TOKENIZER, "latent_n_features": 1})
    checkpoint.save(tmp_path / "SMALLER", 1, {
        "kind": "coordtok", "config": asdict(smaller.config), "model": smaller.state_dict()})
    save_sit(tmp_path / "LONG", tokenizer, condition_on_previous=True)
    there = {"OTHER", "SMALLER", "MISFIT", "UNGUIDED", "LONG"}
    flags = [tmp_path / flag if flag in there else models[1] if flag == "TOKENIZER" else flag for flag in flags]
    with pytest.raises((ValueError, OSError), match=message):
        sampled("out", *flags)


def test_a_mistake_gets_one_line(base, tmp_path):
    done = run("sample.py", *base, "--output_dir", tmp_path, "--class_label", 9, fails=True)
    assert "--class_label is 9" in error_line(done)


def test_another_setting_needs_another_folder_or_replace(sampled):
    folder = sampled("out")
    before = pixels(folder, 0)
    with pytest.raises(ValueError, match="samples of other settings: .*seed 0 there, 1 here; choose another"):
        sampled("out", "--seed", 1)
    sampled("out", "--seed", 1, "--replace")
    assert abs(pixels(folder, 0) - before).max() > 10
    assert json.loads((folder / "report.json").read_text())["record"]["seed"] == 1
