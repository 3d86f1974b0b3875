"""models/hub.py: every form of a model, in every flag that takes one."""
import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from helpers import TINY_COORDTOK, mistake, run_here, tiny_larp
from hub_stub import Hub, serve

import sample
import sampling.larp
import sampling.sit
import train_ar
import train_coordtok
import train_sit
from eval import eval_coordtok, eval_larp_tokenizer
from eval.report import read_record, write_record
from models import pretrained
from models.coordtok import CoordTok
from models.hub import Pretrained
from models.interpolant import Interpolant
from models.larp_ar import LARPGenerator
from models.sit import SiT
from models.triplane import Planes
from training import checkpoint, tune
from training.latents import LatentStats
from training.load import load_sit, weights_sha256

COORDTOK = {
    "video_shape": (8, 32, 32), "enc_embed_dim": 32, "enc_num_layers": 1, "enc_num_heads": 2, "enc_patch_size_xy": 8,
    "enc_patch_size_t": 4, "enc_patch_num_layers": 1, "latent_resolution_xy": 8, "latent_resolution_t": 8,
    "latent_n_features": 4, "latent_patch_size_xy": 4, "latent_patch_size_t": 4, "dec_embed_dim": 32,
    "dec_num_layers": 1, "dec_num_heads": 2,
}
SIT = {"input_size": (8, 8), "in_channels": 4, "depth": 6, "hidden_size": 128, "num_heads": 2, "patch_size": 4}
ARCHITECTURE = TINY_COORDTOK[: TINY_COORDTOK.index("--num_views")]
LOG = "".join(f"{plane}_{kind}: tensor([1., 2., 3., 4.])\n" for plane in Planes._fields for kind in ("mean", "std"))
STATS = LatentStats(*(Planes(*(torch.tensor([1.0, 2, 3, 4]) for _ in range(3))) for _ in range(2)))
FORMS = ("hub id", "exported folder", "run folder", "checkpoint file", "folder of checkpoints", "authors' file")


def models() -> dict[str, Pretrained]:
    torch.manual_seed(0)
    made = {"coordtok": CoordTok(**COORDTOK, padding="released"), "sit": SiT(**SIT),
            "larp_tokenizer": tiny_larp(32, 8, 12),
            "larp_ar": LARPGenerator(dim=32, n_layer=12, n_head=2, multiple_of=8, vocab_size=64, max_seq_len=12)}
    for parameter in made["sit"].parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(made["larp_ar"].output.weight)
    return made


def states(made: dict[str, Pretrained]) -> dict[str, dict]:
    """What checkpoints of them hold."""
    flags = {"model": "SiT-XS/4", "num_classes": 1, "class_dropout_prob": 0.0, "path_type": "Linear", "lr": 1e-4,
             "prediction": "velocity", "sample_eps": None, "first_model_ckpt": "the right one"}
    more = {
        "coordtok": {"args": {"lr": 1e-4}}, "larp_tokenizer": {"args": {"lr": 2e-4}},
        "sit": {"interpolant": asdict(Interpolant()), "statistics": STATS.state_dict(), "classes": [], "args": flags,
                "tokenizer": weights_sha256(made["coordtok"]), "ema": made["sit"].state_dict()},
        "larp_ar": {"tokenizer": weights_sha256(made["larp_tokenizer"]), "classes": ["PanLeft", "ZoomIn"],
                    "num_cond_frames": 0, "args": {"lr": 3e-4}},
    }
    return {kind: {"kind": kind, "config": asdict(model.config), "model": model.state_dict(), **more[kind]}
            for kind, model in made.items()}


def authors(kind: str, model: Pretrained) -> dict:
    weights = model.state_dict()
    if kind == "coordtok":
        return {"model": {f"module.{name}": value for name, value in weights.items()}, "epoch": 1}
    if kind == "sit":
        return {"model": weights, "ema": weights, "opt": {}, "args": argparse.Namespace(model="SiT-XS/4", lr=1e-4)}
    return {"model": {"name": "llama-abs-S", "args": asdict(model.config), "sd": weights}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> SimpleNamespace:
    """made: the models by kind. named[kind][form]: what names one. Hub ids are of a stub on localhost."""
    root, made, named = tmp_path_factory.mktemp("sources"), models(), {}
    server, address = serve()
    for kind, state in states(made).items():
        folder = root / kind
        path = checkpoint.save(folder / "checkpoints", 1, state)
        checkpoint.export(checkpoint.load(path), folder / "exported")
        (folder / "authors").mkdir()
        torch.save(authors(kind, made[kind]), folder / "authors" / "0600000.pt")
        (folder / "authors" / "log.txt").write_text(LOG)
        type(made[kind]).from_pretrained(path).push_to_hub(f"someone/{kind}", endpoint=address, token="any")
        named[kind] = dict(zip(FORMS, (f"someone/{kind}", folder / "exported", folder, path, folder / "checkpoints",
                                       folder / "authors" / "0600000.pt")))
    with pytest.MonkeyPatch.context() as patch:
        download = partial(huggingface_hub.snapshot_download, endpoint=address, cache_dir=root / "cache")
        patch.setattr(pretrained, "snapshot_download", download)
        yield SimpleNamespace(made=made, named=named, root=root)
    server.shutdown()


def architecture(kind: str, form: str) -> dict | None:
    """What an authors' file does not say."""
    return {"coordtok": COORDTOK, "sit": SIT}.get(kind) if form == "authors' file" else None


def check_equal(model: Pretrained, made: Pretrained) -> None:
    assert model.config == made.config and not model.training
    expected = made.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["coordtok", "sit", "larp_tokenizer", "larp_ar"])
def test_every_form_loads_and_saves(sources, tmp_path, kind, form):
    """Bit for bit, with what is known of the model."""
    made = sources.made[kind]
    loaded = type(made).from_pretrained(sources.named[kind][form], config=architecture(kind, form))
    check_equal(loaded, made)
    loaded.save_pretrained(tmp_path)
    again = type(made).from_pretrained(tmp_path)
    check_equal(again, made)
    if form != "authors' file":
        assert again.facts["args"]["lr"] == states(sources.made)[kind]["args"]["lr"]
    if kind == "larp_ar" and form != "authors' file":
        assert again.facts["classes"] == ["PanLeft", "ZoomIn"] and again.facts["num_cond_frames"] == 0
        assert again.facts["tokenizer"] == weights_sha256(sources.made["larp_tokenizer"])
    if kind == "sit":
        assert all(torch.equal(value, STATS.state_dict()[name]) for name, value in again.facts["statistics"].items())
        expected = None if form == "authors' file" else weights_sha256(sources.made["coordtok"])
        assert again.facts["tokenizer"] == expected and again.facts["interpolant"]["prediction"] == "velocity"


FLAGS = {  # a script's flag: (script, the module that loads, its function, kind, the command line with the flag last)
    "first_step_ckpt": (train_coordtok, tune, "start_tokenizer", "coordtok",
                        [*ARCHITECTURE, "--save_dir", "OUT", "--is_second_step", "--first_step_ckpt"]),
    "first_model_ckpt": (train_sit, train_sit, "load_coordtok", "coordtok",
                         [*ARCHITECTURE, "--save_dir", "OUT", "--first_model_ckpt"]),
    "sampling's first_model_ckpt": (sample, sampling.sit, "load_coordtok", "coordtok",
                                    [*ARCHITECTURE, "--output_dir", "OUT", "--sit_model", "x", "--first_model_ckpt"]),
    "sit_model": (sample, sampling.sit, "load_sit", "sit",
                  ["--output_dir", "OUT", "--model", "SiT-XS/4", "--first_model_ckpt", "COORDTOK", "--sit_model"]),
    "tokenizer": (train_ar, train_ar, "load_larp_tokenizer", "larp_tokenizer", ["--save_dir", "OUT", "--tokenizer"]),
    "sampling's tokenizer": (sample, sampling.larp, "load_larp_tokenizer", "larp_tokenizer",
                             ["--output_dir", "OUT", "--ar_model", "none", "--tokenizer"]),
    "ar_model": (sample, sampling.larp, "load_larp_ar", "larp_ar",
                 ["--output_dir", "OUT", "--tokenizer", "TOKENIZER", "--ar_model"]),
    "eval_coordtok's tokenizer": (eval_coordtok, eval_coordtok, "load_coordtok", "coordtok",
                                  [*ARCHITECTURE, "--tokenizer"]),
    "eval_larp_tokenizer's tokenizer": (eval_larp_tokenizer, eval_larp_tokenizer, "load_larp_tokenizer",
                                        "larp_tokenizer", ["--tokenizer"]),
}


class Loaded(Exception):
    pass


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_takes_every_form(sources, monkeypatch, tmp_path, flag, form):
    """The script runs up to where it has the model."""
    script, module, function, kind, line = FLAGS[flag]
    load, found = getattr(module, function), []

    def stop(*args):
        model = load(*args)
        found.append(getattr(model, "model", model))
        raise Loaded

    monkeypatch.setattr(module, function, stop)
    given = {"OUT": tmp_path, "COORDTOK": sources.named["coordtok"]["checkpoint file"],
             "TOKENIZER": sources.named["larp_tokenizer"]["checkpoint file"]}
    with pytest.raises(Loaded):
        run_here(monkeypatch, script, *(given.get(word, word) for word in line), sources.named[kind][form])
    check_equal(found[0], sources.made[kind])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["coordtok", "sit", "larp_tokenizer", "larp_ar"])
def test_the_command_exports_every_form(sources, monkeypatch, tmp_path, capsys, kind, form):
    """And says what it wrote; the model card loads it."""
    line = ["checkpoint", sources.named[kind][form], tmp_path / "out"]
    if given := architecture(kind, form):
        line += ["--config", *(f"{name}={json.dumps(value)}" for name, value in given.items())]
    monkeypatch.setattr(sys, "argv", [str(word) for word in line])
    checkpoint.main()
    said = capsys.readouterr().out
    assert f"{kind}" in said and all(f"{name} (" in said for name in ("model.safetensors", "config.json", "README.md"))
    assert {path.name for path in (tmp_path / "out").iterdir()} - {"facts.json"} == {
        "model.safetensors", "config.json", "README.md"}
    card = (tmp_path / "out" / "README.md").read_text()
    snippet = [line for line in card.splitlines() if line.startswith("from ") or "from_pretrained" in line]
    names = {}
    exec("\n".join(snippet).replace("FOLDER_OR_HUB_ID", str(tmp_path / "out")), names)
    check_equal(names["model"], sources.made[kind])


def test_a_card_has_the_numbers_of_its_weights_alone(sources, monkeypatch, tmp_path, capsys):
    """With their protocol record."""
    sha256 = weights_sha256(sources.made["coordtok"])
    for name, sha in (("own", sha256), ("other", "0" * 64)):
        record = {"title": "larp_rfvd*", "description": "reconstruction", "num_real": 3, "num_generated": 4,
                  "model": f"logs/run {sha[:12]}"}
        write_record(tmp_path / f"{name}.json", record, {"psnr_frame": 31.25, "clips": 4})
    line = ["checkpoint", sources.named["coordtok"]["run folder"], tmp_path / "out", "--reports", tmp_path / "own.json"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in line])
    checkpoint.main()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| psnr_frame | 31.25 |" in card and "## Numbers under larp_rfvd*" in card and '"lr": 0.0001' in card
    tuned = CoordTok.from_pretrained(tmp_path / "out")
    assert tuned.facts["reports"] == [read_record(tmp_path / "own.json")]
    with torch.no_grad():
        tuned.weight_tokens_xy += 1
    tuned.save_pretrained(tmp_path / "tuned")
    assert "psnr_frame" not in (tmp_path / "tuned" / "README.md").read_text()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*map(str, line[:3]), "--reports", str(tmp_path / "other.json")])
    with pytest.raises(SystemExit):
        checkpoint.main()
    assert "a report is of logs/run 000000000000, not of these weights" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "content"), [
    ("README.md", "# My project"), ("config.json", '{"name": "mine"}'), ("config.json", "["), ("facts.json", "{}"),
    ("model.safetensors", "weights"),
])
def test_an_export_replaces_no_other_files(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path / name} is not of an earlier export, and would be lost: export t"):
        SiT(**SIT).save_pretrained(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == [content]


def test_an_export_replaces_one_of_its_kind(sources, tmp_path):
    """With its facts, which may be of other weights."""
    larp, sit = sources.made["larp_tokenizer"], sources.made["sit"]
    larp.facts = {"args": {"lr": 1}}
    larp.save_pretrained(tmp_path)
    assert (tmp_path / "facts.json").exists()
    with pytest.raises(ValueError, match="config.json is of an exported larp_tokenizer model, and would be lost"):
        sit.save_pretrained(tmp_path)
    larp.facts = {}
    larp.save_pretrained(tmp_path)
    assert not (tmp_path / "facts.json").exists()
    check_equal(type(larp).from_pretrained(tmp_path), larp)


@pytest.mark.parametrize("form", ["run folder", "folder of checkpoints"])
def test_an_export_hides_no_checkpoints(sources, form):
    folder = sources.named["coordtok"][form]
    with pytest.raises(ValueError, match="is a run's folder, whose checkpoints an export would hide: export to an"):
        checkpoint.export(checkpoint.load(sources.named["coordtok"]["checkpoint file"]), folder)
    assert not (folder / "config.json").exists()


def test_an_exported_sit_of_the_authors_samples(sources, tmp_path):
    """Its statistics and interpolant go with it."""
    sit = SiT.from_pretrained(sources.named["sit"]["authors' file"], config=SIT)
    sit.save_pretrained(tmp_path)
    args = argparse.Namespace(sit_model=str(tmp_path), first_model_ckpt="", sit_ckpt_iter=600000, sit_log=None)
    trained = load_sit(args, sources.made["coordtok"])
    assert torch.equal(trained.stats.mean.xy, STATS.mean.xy) and trained.interpolant == Interpolant()


def test_mistakes_get_one_line(sources, monkeypatch, capsys, tmp_path):
    def error(script, *flags):
        return mistake(monkeypatch, capsys, script, *flags)

    larp, coordtok = sources.named["larp_ar"], sources.named["coordtok"]
    assert "holds a larp_ar model, expected a coordtok" in error(eval_coordtok, "--tokenizer", larp["run folder"])
    assert "holds a coordtok model, expected a larp_tokenizer" in error(
        eval_larp_tokenizer, "--tokenizer", coordtok["run folder"])
    assert "neither in the cache" in error(eval_coordtok, "--tokenizer", "someone/nothing")
    (tmp_path / "run").mkdir()
    assert "no checkpoint and no config.json and no model.safetensors in it; expected a run's folder, which" in error(
        eval_coordtok, "--tokenizer", tmp_path / "run")
    assert "holds one set of weights" in error(
        eval_larp_tokenizer, "--version", "ema_0.9", "--tokenizer", sources.named["larp_tokenizer"]["exported folder"])
    with pytest.raises(ValueError, match="--enc_num_layers 3 was given, but .* has 1"):
        CoordTok.from_pretrained(coordtok["exported folder"], config={"enc_num_layers": 3})
    SiT(**SIT).save_pretrained(tmp_path)
    assert "has no statistics of its latents" in error(
        sample, "--output_dir", tmp_path / "out", "--first_model_ckpt", coordtok["run folder"], "--sit_model", tmp_path)
    assert "someone/coordtok" in Hub.repositories
