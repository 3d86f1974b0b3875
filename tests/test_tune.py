"""Fine-tuning in all four trainers: training/tune.py, training/coordtok_steps.py."""
import pytest
import torch
from helpers import logged, losses, mistake, run, run_here, tiny_larp

from models.coordtok import CoordTok
from models.larp_tokenizer import LARPTokenizer
from models.sit import SiT
from training import checkpoint, tune

PARTS = {  # what --train takes of each script, and the starts of the names of what it then trains
    "coordtok_1": ("decoder", ("decoder.",)),
    "larp_tokenizer": ("decoder", ("decoder", "final_layer.", "bottleneck.out_linear.")),
    "sit": ("final_layer", ("final_layer",)),
    "larp_ar": ("layers.1.", ("layers.1.",)),
}


def tuned(monkeypatch, tmp_path, script, flags, source, *more, name="tuned", steps=2):
    """The last checkpoint of a run that starts from `source`."""
    run_here(monkeypatch, script, *flags, "--save_dir", tmp_path, "--exp_name", name, "--num_iters", steps,
             "--init_from", source, *more)
    return checkpoint.load(tmp_path / name / "checkpoints")


@pytest.fixture
def trained(monkeypatch, scripts, tmp_path):
    """Makes two steps of a script, with large steps so that every weight is its own, and returns the run's folder."""

    def make(name):
        script, flags = scripts[name]
        run_here(monkeypatch, script, *flags, "--save_dir", tmp_path, "--exp_name", f"first_{name}", "--num_iters", 2)
        return tmp_path / f"first_{name}"

    return make


@pytest.mark.parametrize("name", PARTS)
def test_frozen_parameters_stay_and_have_no_states(monkeypatch, scripts, trained, tmp_path, name):
    """Of a hundred steps, from a run's folder; all that is trained has moved."""
    (script, flags), (part, starts) = scripts[name], PARTS[name]
    first = trained(name)
    before = checkpoint.load(first / "checkpoints")
    source = before["ema"] if name == "sit" else before["model"]
    more = ["--perceptual_weight", 0, "--accum_iter", 1] if name == "larp_tokenizer" else []  # for speed
    after = tuned(monkeypatch, tmp_path, script, [*flags, "--save_every", 1000, "--lr", 1e-2], first, "--train", part,
                  *more, steps=100)
    assert after["step"] == 100
    model = {"coordtok_1": CoordTok, "larp_tokenizer": LARPTokenizer, "sit": SiT}.get(name)
    moved = {key for key, value in after["model"].items() if not torch.equal(value, source[key])}
    expected = {key for key in source if key.startswith(starts)}
    assert moved and moved <= expected
    assert len(after["optimizer"]["state"]) == sum(map(len, (g["params"] for g in after["optimizer"]["param_groups"])))
    if model:
        names = {key for key, _ in model(**after["config"]).named_parameters()}
        assert len(after["optimizer"]["state"]) == len(names & expected)


@pytest.mark.parametrize("name", ["coordtok_1", "coordtok_2", "larp_tokenizer", "sit", "larp_ar"])
def test_starts_from_the_weights_with_fresh_optimizer(monkeypatch, scripts, trained, tmp_path, name):
    """At a rate of 0 the weights are the source's, at step 2."""
    script, flags = scripts[name]
    if name == "coordtok_2":
        flags = [flag for i, flag in enumerate(flags) if "--first_step_ckpt" not in flags[max(0, i - 1) : i + 1]]
    first = trained("coordtok_1" if name == "coordtok_2" else name)
    exported = tmp_path / "exported"
    checkpoint.export(checkpoint.load(first / "checkpoints"), exported)
    suffix = "_second" * (name == "coordtok_2")
    run_here(monkeypatch, script, *flags, "--save_dir", tmp_path, "--exp_name", "tuned", "--num_iters", 1,
             "--init_from", exported, "--lr", 0)
    after, before = (checkpoint.load(tmp_path / each / "checkpoints") for each in (f"tuned{suffix}", first.name))
    assert after["step"] == 1
    source = before["ema"] if name == "sit" else before["model"]
    assert all(torch.equal(value, source[key]) for key, value in after["model"].items())
    if name == "sit":
        assert all(torch.equal(value, before["statistics"][key]) for key, value in after["statistics"].items())


def test_two_processes_tune_as_one_and_resume_is_exact(data, coordtok, tmp_path):
    """With a frozen encoder and without a search for unused parameters."""
    flags = ["--data_root", data, "--save_dir", tmp_path, "--point_per_vid", 16, "--num_views", 4, "--num_val", 0,
             "--log_every", 1, "--init_from", coordtok, "--train", "decoder", "--num_workers", 1, "--save_every", 2]
    run("train_coordtok.py", *flags, "--exp_name", "one", "--num_iters", 4)
    run("train_coordtok.py", *flags, "--exp_name", "two", "--num_iters", 4, processes=2)
    run("train_coordtok.py", *flags, "--exp_name", "cut", "--num_iters", 2)
    run("train_coordtok.py", *flags, "--exp_name", "cut", "--num_iters", 4, "--resume", "auto")
    one = losses(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(one, abs=1e-5)
    assert losses(tmp_path / "cut") == one
    whole, cut = (checkpoint.load(tmp_path / name / "checkpoints") for name in ("one", "cut"))
    assert all(torch.equal(value, cut["model"][name]) for name, value in whole["model"].items())


def test_mistakes(monkeypatch, capsys, data, scripts, coordtok, tmp_path):
    script, flags = scripts["coordtok_1"]
    flags = [*flags, "--save_dir", tmp_path, "--num_iters", 1, "--init_from", coordtok]

    def says(*more, script=script, flags=flags):
        return mistake(monkeypatch, capsys, script, *flags, *more)

    assert "--img_size 64 was given" in (line := says("--img_size", 64)) and "--interpolate_positions" in line
    line = says("--enc_embed_dim", 64)
    assert "--enc_embed_dim 64 was given" in line and "--interpolate_positions" not in line
    assert says("--train", "decodr").endswith("or among encoder, decoder, " + ", ".join(
        f"weight_tokens_{plane}" for plane in ("xy", "yt", "xt")))
    assert "leave one of them out" in says("--is_second_step", "--first_step_ckpt", coordtok)
    script, flags = scripts["sit"]
    run_here(monkeypatch, script, *flags, "--save_dir", tmp_path, "--exp_name", "sit", "--num_iters", 1)
    flags = [*flags, "--save_dir", tmp_path, "--num_iters", 1, "--init_from", tmp_path / "sit"]
    line = says("--num_classes", 2, script=script, flags=flags)
    assert "num_classes 1 there, 2 here" in line and "--new_classes" in line
    assert "path Linear there, GVP here" in says("--path_type", "GVP", script=script, flags=flags)
    line = says("--model", "SiT-S/2", script=script, flags=flags)
    assert "--model is SiT-S/2, but" in line and line.endswith("has SiT-XS/4: give --model SiT-XS/4")
    run_here(monkeypatch, script, *flags, "--exp_name", "classes", "--num_classes", 2, "--new_classes")
    renamed = tmp_path / "data" / "renamed"
    for name in ("Apple", "Pear"):
        (renamed / name).mkdir(parents=True)
        (renamed / name / "x.mp4").touch()
    line = says("--num_classes", 2, "--init_from", tmp_path / "classes", "--data_root", renamed.parent, "--video_name",
                "renamed", script=script, flags=flags)
    assert "label 0 is Apple in" in line and "PanLeft to the model" in line and "or add --new_classes" in line
    assert checkpoint.load(tmp_path / "classes" / "checkpoints")["config"]["num_classes"] == 2
    assert "--train ['x_embedder'] was given" in says(
        "--exp_name", "sit", "--resume", "--train", "x_embedder", script=script, flags=flags)
    script, flags = scripts["larp_ar"]
    run_here(monkeypatch, script, *flags, "--save_dir", tmp_path, "--exp_name", "ar", "--num_iters", 1)
    flags = [*flags, "--save_dir", tmp_path, "--num_iters", 1, "--init_from", tmp_path / "ar"]
    tiny_larp(32, 8, 16).save_pretrained(tmp_path / "longer")
    line = says("--tokenizer", tmp_path / "longer", script=script, flags=flags)
    assert "max_seq_len 12 there, 16 here" in line and "--interpolate_positions" in line
    run_here(monkeypatch, script, *flags, "--exp_name", "longer_ar", "--tokenizer", tmp_path / "longer",
             "--interpolate_positions", "--num_classes", 3, "--new_classes")
    line = says("--tokenizer", tmp_path / "longer", "--init_from", tmp_path / "longer_ar", "--data_root",
                renamed.parent, "--video_name", "renamed", script=script, flags=flags)
    assert "label 0 is Apple in" in line and "or add --new_classes" in line
    after = checkpoint.load(tmp_path / "longer_ar" / "checkpoints")
    assert after["config"]["max_seq_len"] == 16 and after["model"]["abs_pe"].shape[1] == 16


def test_tables_are_interpolated():
    rows = torch.arange(3.0).view(1, 3, 1) * torch.ones(1, 3, 2)
    assert torch.equal(tune.interpolate(rows, (3,), (5,))[:, 0], torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]))
    t, h, w = torch.meshgrid(torch.linspace(0, 1, 2), torch.linspace(0, 1, 3), torch.linspace(0, 1, 2), indexing="ij")
    flat = torch.stack([t, h, w], dim=-1).view(1, 12, 3)
    fitted = tune.interpolate(flat, (2, 3, 2), (4, 6, 5))
    assert fitted.shape == (4, 6, 5, 3)
    expected = torch.stack(torch.meshgrid(*(torch.linspace(0, 1, n) for n in (4, 6, 5)), indexing="ij"), dim=-1)
    assert torch.allclose(fitted, expected, atol=1e-6)


def test_coordtok_at_another_resolution_and_length(monkeypatch, scripts, coordtok, tmp_path):
    """A CoordTok of 8 frames of 32x32 goes on with 12 of 64x64, and planes of other sizes."""
    script, flags = scripts["coordtok_1"]
    sizes = "--img_size 64 --num_frames 12 --latent_resolution_t 12 --latent_resolution_xy 12".split()
    after = tuned(monkeypatch, tmp_path, script, [*flags, *sizes, "--lr", 0], coordtok,
                  "--interpolate_positions", steps=1)
    model = CoordTok(**after["config"])
    model.load_weights(after["model"], "here")
    assert model.render(model.eval().encode(torch.rand(1, 3, 12, 64, 64))).shape == (1, 3, 12, 64, 64)
    before = checkpoint.load(coordtok / "checkpoints")["model"]
    for name in ("decoder.transformer.pos_embed", "weight_tokens_yt", "encoder.cross_pos_emb"):
        one, two = (state[name].flatten(0, -2) for state in (before, after["model"]))
        assert len(two) > len(one) and torch.equal(two[0], one[0]) and torch.allclose(two[-1], one[-1], atol=1e-6)


@pytest.mark.parametrize("learned", [True, False])
def test_larp_at_another_resolution_and_length(monkeypatch, scripts, tmp_path, learned):
    """A tokenizer of 8 frames of 32x32 goes on with 12 of 48x48."""
    script, flags = scripts["larp_tokenizer"]
    shape = ["--learned_encoder_patch_pe", learned, "--learned_decoder_patch_query_embed", learned]
    run_here(monkeypatch, script, *flags, *shape, "--save_dir", tmp_path, "--exp_name", "first", "--num_iters", 1)
    sizes = "--input_size 48 --frame_num 12 --bottleneck_token_num 20".split()
    after = tuned(monkeypatch, tmp_path, script, [*flags, *sizes, *shape, "--lr", 0], tmp_path / "first",
                  "--interpolate_positions", steps=1)
    model = LARPTokenizer(**after["config"])
    model.load_weights(after["model"], "here")
    assert model.decode(model.encode(torch.rand(1, 3, 12, 48, 48))).shape == (1, 3, 12, 48, 48)
    before = checkpoint.load(tmp_path / "first" / "checkpoints")["model"]
    name = "encoder_h_embed" if learned else "encoder_patch_pe"
    assert torch.equal(after["model"][name].flatten(0, -2)[0], before[name].flatten(0, -2)[0])
    assert torch.allclose(after["model"][name].flatten(0, -2)[-1], before[name].flatten(0, -2)[-1], atol=1e-6)


def test_tuning_raises_psnr_on_another_demo_set(monkeypatch, scripts, data, tmp_path):
    """Trained on one camera move and tuned on the other for 200 steps, all of it or the decoder alone."""
    script, flags = scripts["coordtok_1"]
    flags = [*flags, "--lr", 3e-3, "--save_dir", tmp_path, "--save_every", 1000, "--eval_every", 1000,
             "--accum_iter", 1]
    sets = [["--data_root", data / "UCF-101_train", "--video_name", name] for name in ("PanLeft", "ZoomIn")]
    run_here(monkeypatch, script, *flags, *sets[0], "--exp_name", "first", "--num_iters", 200)
    measured = [*flags, *sets[1], "--val_name", "ZoomIn", "--num_val", 3, "--init_from", tmp_path / "first"]

    def psnr(name, *more):
        run_here(monkeypatch, script, *measured, "--exp_name", name, *more)
        return max(logged(tmp_path / name, "val").items())[1]["psnr_frame"]

    before = psnr("before", "--lr", 0, "--num_iters", 1)
    assert psnr("all", "--num_iters", 200) > before + 1
    assert psnr("decoder", "--num_iters", 200, "--train", "decoder") > before + 0.5
