import copy
import json
import pickle
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from models.larp_tokenizer import LARPTokenizer
from models.layers import set_checkpointing, sincos_1d, sincos_3d
from models.pretrained import WeightsError

TINY = {
    "bottleneck": {"args": {"bottleneck_dim": 4, "regularizer": {"args": {"codebook_size": 32}}}},
    "prior_model": {"name": "none"},
    "bottleneck_token_num": 6,
    "input_size": 16,
    "frame_num": 8,
    "encoder_hidden_size": 32,
    "decoder_hidden_size": 16,
    "encoder_num_heads": 2,
    "decoder_num_heads": 2,
    "encoder_depth": 1,
    "decoder_depth": 1,
}
PRIOR = {"name": "gptc-XXS", "no_dropout": True}


def tokenizer(**options) -> LARPTokenizer:
    """Tiny, and its last layer not 0, so that the codes reach the pixels."""
    torch.manual_seed(0)
    model = LARPTokenizer(**{**TINY, **options}).eval()
    torch.nn.init.xavier_uniform_(model.final_layer.linear.weight)
    return model


def with_quantizer(**args) -> dict:
    """Options of a tokenizer whose quantiser has `args`."""
    return {"bottleneck": {"args": {"bottleneck_dim": 4, "regularizer": {"args": {"codebook_size": 32, **args}}}}}


@pytest.fixture
def video():
    return torch.rand(2, 3, 8, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "tolerance"), [("larp_tokenizer_tiny", 1e-5), ("larp_tokenizer_L_long", 2e-5)])
@torch.no_grad()
def test_reference_case(reference, name, tolerance):
    """The authors' codes, losses, reconstruction and prior, at a tiny and at the released size."""
    case, expected = reference.case(name)
    model = LARPTokenizer(**case["config"]).eval()
    assert asdict(model.config) == case["config"]
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == case["parameters"] | case["buffers"]
    model.load_weights(reference.state_dict(case["parameters"]), name)
    assert (model.final_layer.norm_final.eps, model.encoder.blocks[0].norm1.eps) == (1e-6, 1e-5)  # below the tolerance
    c, clips = model.config, 2 if name.endswith("tiny") else 1
    video = reference.noise(case["input_tag"], (clips, 3, c.frame_num, c.input_size, c.input_size)).sigmoid()

    out = model(video, ratio=0.0, deterministic=True)
    found = {
        "loss_commit": out.logs["commitment"],
        "loss_q": out.loss_q,
        "loss_latent_ce_step0": out.loss_prior,
        "prior_ce_round1": out.logs["prior_first_round"],
        "recon": out.video.flatten()[expected["recon_at"]] if "recon_at" in expected else out.video,
    }
    if name.endswith("tiny"):
        vectors = model.bottleneck.lookup(out.codes)
        found["projected_z"] = model.bottleneck.in_linear(model.encode_latents(video))
        found["encoded"] = model.bottleneck.expand(vectors)
        found["prior_pred"] = torch.cat([vectors[:, :1], model.prior_model(vectors[:, :-1])], dim=1)
    assert torch.equal(out.codes, expected.pop("indices"))
    expected.pop("recon_at", None)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value.reshape(expected[key].shape), expected[key], rtol=0, atol=tolerance, msg=key)


@torch.no_grad()
def test_three_verbs_agree(video):
    model = tokenizer()
    codes = model.encode(video)
    out = model(video, deterministic=True)
    assert codes.shape == (2, 6) and codes.dtype == torch.long
    assert torch.equal(codes, out.codes)
    assert torch.equal(model.decode(codes), out.video)
    assert out.video.shape == video.shape
    assert out.loss_prior is None and out.logs.keys() == {"commitment", "codebook"}


@torch.no_grad()
def test_codes_are_drawn_from_the_generator(video):
    model = tokenizer(**with_quantizer(stochastic_temperature=1.0))
    draws = [model.encode(video, deterministic=False, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    outs = [model(video, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(outs[0].codes, draws[0]) and torch.equal(outs[0].video, outs[1].video)


@torch.no_grad()
def test_fewer_frames(video):
    """As a tokenizer trained on so few would, its tables being the first positions."""
    model, short = tokenizer(), tokenizer(frame_num=4)
    tables = ("encoder_patch_pe", "decoder_patch_query_embed")
    state = model.state_dict()
    short.load_state_dict({key: value for key, value in state.items() if key not in tables}, strict=False)
    codes = model.encode(video[:, :, :4])
    assert codes.shape == (2, 6) and torch.equal(codes, short.encode(video[:, :, :4]))
    torch.testing.assert_close(model.decode(codes, num_frames=4), short.decode(codes))
    assert model(video[:, :, :4]).video.shape == (2, 3, 4, 16, 16)


@torch.no_grad()
def test_decoder_has_its_own_patch_sizes(video):
    model = tokenizer(decoder_patch_size=4, decoder_temporal_patch_size=2)
    assert model.final_layer.linear.out_features == 2 * 4 * 4 * 3
    codes = model.encode(video)
    model.final_layer.linear.weight.zero_()
    model.final_layer.linear.bias.copy_(torch.arange(96.0))  # pt, p1, p2, c order
    out = model.decode(codes)
    assert out.shape == video.shape
    for t, h, w, c in [(0, 0, 0, 0), (3, 5, 6, 2), (6, 15, 8, 1)]:
        assert (out[:, c, t, h, w] == (((t % 2) * 4 + h % 4) * 4 + w % 4) * 3 + c).all()
    assert model.decode(codes, num_frames=2).shape == (2, 3, 2, 16, 16)


@torch.no_grad()
def test_learned_tables_and_type_vectors(video):
    flags = [
        "learned_encoder_patch_pe",
        "learned_decoder_latent_pe",
        "learned_decoder_patch_query_embed",
        "use_encoder_patch_token_type_embed",
        "use_encoder_latent_query_token_type_embed",
        "use_decoder_latent_token_type_embed",
        "use_decoder_patch_query_token_type_embed",
    ]
    model = tokenizer(**dict.fromkeys(flags, True), encoder_query_gaussian_init=False, latent_pe_scale_factor=100)
    assert not list(model.buffers())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "embed" in name and "x_emb" not in name}
    assert shapes == {
        "encoder_t_embed": (1, 2, 1, 1, 32),
        "encoder_h_embed": (1, 1, 2, 1, 32),
        "encode_w_embed": (1, 1, 1, 2, 32),
        "decoder_t_embed": (1, 2, 1, 1, 16),
        "decoder_h_embed": (1, 1, 2, 1, 16),
        "decoder_w_embed": (1, 1, 1, 2, 16),
        "encoder_latent_query_embed": (6, 32),
        "encoder_patch_token_type_embed": (1, 1, 32),
        "encoder_latent_query_token_type_embed": (1, 1, 32),
        "decoder_latent_token_type_embed": (1, 1, 16),
        "decoder_patch_query_token_type_embed": (1, 1, 16),
        "bottleneck.regularizer.embedding.weight": (32, 4),
    }
    assert torch.equal(model.encoder_h_embed[0, 0, :, 0], sincos_1d(32, torch.arange(2)))
    assert torch.equal(model.encoder_latent_query_embed, sincos_1d(32, torch.arange(6), base=100))
    assert model.decoder_latent_pe.shape == (1, 6, 16) and model.decoder_latent_pe.std() < 0.04
    before = model.encode_latents(video), model(video, deterministic=True).video
    for name in shapes:  # each has its say
        if name != "bottleneck.regularizer.embedding.weight":
            changed = copy.deepcopy(model)
            changed.get_parameter(name).add_(torch.randn(shapes[name]))
            after = changed.encode_latents(video), changed.decode(model.encode(video))
            side = 0 if name.startswith("encode") else 1
            assert (after[side] - before[side]).abs().max() > 1e-4, name


def test_initialisation_and_frozen_tables(video):
    model = LARPTokenizer(**TINY, learned_encoder_latent_query_embed=False)
    assert model.encoder_latent_query_embed.shape == (6, 32) and not model.encoder_latent_query_embed.requires_grad
    assert torch.equal(model.encoder_patch_pe[0], sincos_3d(32, 2, 2, 2))
    assert torch.equal(model.decoder_latent_pe[0], sincos_1d(16, torch.arange(6)))
    assert not model(video).video.any()  # the output layer starts at 0
    model = LARPTokenizer(**{**TINY, "encoder_hidden_size": 256, "query_init_std": 0.1, "prior_model": PRIOR})
    assert model.encoder_latent_query_embed.std().item() == pytest.approx(0.1, rel=0.1)
    assert model.decoder_patch_query_token_type_embed.std().item() == pytest.approx(0.02, rel=0.5)
    bound = (6 / (256 + 1024)) ** 0.5
    assert 0.99 * bound < model.encoder.blocks[0].mlp.fc1.weight.abs().max() <= bound
    head = model.prior_model.head.weight
    assert head.std().item() == pytest.approx((2 / sum(head.shape)) ** 0.5, rel=0.1)


def gradients(model: LARPTokenizer, loss: torch.Tensor) -> set[str]:
    """Which parts of the model `loss` trains."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_what_each_loss_trains(video):
    model = tokenizer(prior_model=PRIOR)
    out = model(video, ratio=0.5, deterministic=True)
    encoder = {name for name, _ in model.named_parameters() if name.startswith(("encode", "x_emb", "bottleneck.in_"))}
    decoder = {name for name, _ in model.named_parameters() if name.startswith(("deco", "final", "bottleneck.out_"))}
    prior = {name for name, _ in model.named_parameters() if name.startswith("prior_model")}
    prior = {name for name in prior if not name.endswith("attn.key.bias")}  # softmax does not see it: rounding alone
    codebook = {"bottleneck.regularizer.embedding.weight"}
    without_key_bias = {name for name in gradients(model, out.loss_prior) if not name.endswith("attn.key.bias")}
    assert without_key_bias == encoder | prior  # not the codebook
    assert gradients(model, F.l1_loss(out.video, video)) == encoder | decoder  # straight through, past the codebook
    assert gradients(model, out.loss_q) == encoder | codebook


def test_checkpointing_changes_no_gradient(video):
    model, found = tokenizer(prior_model=PRIOR).train(), []
    for enabled in (False, True):
        set_checkpointing(model, enabled)
        model.zero_grad()
        out = model(video, 0.5, generator=torch.Generator().manual_seed(0))
        (out.video.mean() + out.loss_q + out.loss_prior).backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


def test_copies_share_nothing(video):
    model = tokenizer(prior_model=PRIOR)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.config == model.config
        assert torch.equal(twin.encode(video), model.encode(video))
        with torch.no_grad():
            twin.x_embedder.proj.weight.zero_()
        assert model.x_embedder.proj.weight.any()


@torch.no_grad()
def test_cast_to_half(video):
    model = tokenizer().to(torch.bfloat16)
    out = model.decode(model.encode(video))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


@torch.no_grad()
def test_save_and_load(tmp_path, video):
    model = tokenizer(prior_model=PRIOR)
    model.save_pretrained(tmp_path)
    loaded = LARPTokenizer.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert torch.equal(loaded.decode(loaded.encode(video)), model.decode(model.encode(video)))
    assert json.loads((tmp_path / "config.json").read_text()) == asdict(model.config)
    assert "encoder_patch_pe" in load_file(tmp_path / "model.safetensors")
    card = (tmp_path / "README.md").read_text()
    assert "video-tokenizer" in card and "LARPTokenizer.from_pretrained" in card


@pytest.mark.parametrize("prior_weights", [True, False])
@torch.no_grad()
def test_folder_in_the_released_layout(reference, tmp_path, monkeypatch, prior_weights):
    """Their config.json as it is; their weights, with or without the prior's."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    case, expected = reference.case("larp_tokenizer_tiny")
    weights = reference.state_dict(case["parameters"])
    if not prior_weights:
        weights = {name: value for name, value in weights.items() if not name.startswith("prior_model.")}
    (tmp_path / "config.json").write_text(json.dumps(case["config"]))
    save_file(weights, tmp_path / "model.safetensors")
    model = LARPTokenizer.from_pretrained(str(tmp_path))
    c = model.config
    video = reference.noise(case["input_tag"], (2, 3, c.frame_num, c.input_size, c.input_size)).sigmoid()
    assert torch.equal(model.encode(video), expected["indices"])
    torch.testing.assert_close(model.decode(expected["indices"]), expected["recon"], rtol=0, atol=1e-5)
    assert torch.equal(model.prior_model.pos_emb, weights.get("prior_model.pos_emb", model.prior_model.pos_emb))


def test_weights_that_do_not_fit():
    model = tokenizer(prior_model=PRIOR)
    state = model.state_dict()
    tokenizer().load_weights(state, "file")  # a prior's weights without a prior
    with pytest.raises(ValueError, match="file: 1 tensors do not fit this model: prior_model.head.bias is missing"):
        model.load_weights({key: value for key, value in state.items() if key != "prior_model.head.bias"}, "file")
    with pytest.raises(ValueError, match="x_embedder.proj.bias is missing"):
        model.load_weights({key: value for key, value in state.items() if key != "x_embedder.proj.bias"}, "file")
    with pytest.raises(ValueError, match="extra is not expected"):
        model.load_weights({**state, "extra": torch.zeros(1)}, "file")


def test_frozen_tables_are_taken_from_the_file(tmp_path):
    model = tokenizer()
    model.encoder_patch_pe += 1
    model.save_pretrained(tmp_path)
    assert torch.equal(LARPTokenizer.from_pretrained(tmp_path).encoder_patch_pe, model.encoder_patch_pe)


def test_trainer_files(tmp_path):
    live, average = tokenizer(), tokenizer()
    with torch.no_grad():
        average.x_embedder.proj.bias += 1
    saved = {"name": "larp_tokenizer", "args": asdict(live.config), "sd": live.state_dict()}
    saved["ema_sd"] = {0.999: average.state_dict()}
    torch.save({"model": saved, "epoch": 3, "cfg": {}}, tmp_path / "epoch-last.pth")
    for ema, model in [(None, live), (0.999, average), ("0.999", average)]:
        loaded = LARPTokenizer.from_released_checkpoint(tmp_path / "epoch-last.pth", ema)
        assert not loaded.training and loaded.config == live.config
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="no average of decay 0.5 in it, found 0.999"):
        LARPTokenizer.from_released_checkpoint(tmp_path / "epoch-last.pth", 0.5)


def test_nothing_to_load_is_one_clear_line(tmp_path):
    messages = {"nobody/no-such-tokenizer": (WeightsError, "not a folder.*HF_HUB_OFFLINE=1"),
                "runs/2024/tokenizer": (FileNotFoundError, "no such file or folder; give one, or a .* id such as ")}
    for source, (kind, message) in messages.items():  # a hub id, and no id at all
        with pytest.raises(kind, match=f"^{source}: {message}") as caught:
            LARPTokenizer.from_pretrained(source, local_files_only=True, cache_dir=tmp_path / "cache")
        assert "\n" not in str(caught.value)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json in it"):
        LARPTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 3}, "config has unknown keys 'hidden'; known are bottleneck, prior_model"),
        ({"prior_model": {"rounds": 2}}, "config.prior_model has unknown keys 'rounds'"),
        (with_quantizer(temperature=1.0), "config.bottleneck.args.regularizer.args has unknown keys 'temperature'"),
        ({"bottleneck": {"name": "vae"}}, "bottleneck.name is 'bottleneck', got 'vae'"),
        ({"bottleneck": {"args": {"norm": "batch"}}}, "norm is 'none' or 'layer', got 'batch'"),
        ({"bottleneck": {"args": {"regularizer": {"name": "fsq"}}}}, "name is 'vq', got 'fsq'"),
        ({"bottleneck": []}, r"config.bottleneck holds keys and values, got \[\]"),
        ({"encoder_depth": "12"}, "config.encoder_depth is of type int, got '12'"),
        ({"encoder_depth": True}, "config.encoder_depth is of type int, got True"),
        ({"query_init_std": None}, "config.query_init_std is of type float, got None"),
        ({"learned_decoder_latent_pe": 1}, "config.learned_decoder_latent_pe is of type bool, got 1"),
        ({"encoder_name": "mamba"}, "encoder_name is 'transformer_encoder_parallel', the only one, got 'mamba'"),
        ({"patch_size": 7}, "input_size 16 is not a multiple of patch_size 7: change --input_size or --patch_size"),
        ({"decoder_num_heads": 3}, "--decoder_hidden_size or --decoder_num_heads"),
        ({"decoder_depth": 0}, "decoder_depth is at least 1, got 0: change --decoder_depth"),
        ({"bottleneck_token_num": 1, "prior_model": PRIOR}, "change --bottleneck_token_num"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        LARPTokenizer(**{**TINY, **options})


def test_ways_to_say_no_prior():
    for none in (None, {"name": None}, {"name": ""}, {"name": "No"}, {"name": "null"}):
        assert LARPTokenizer(**{**TINY, "prior_model": none}).prior_model is None


def test_input_errors(video):
    model = tokenizer()
    with pytest.raises(ValueError, match=r"takes clips \(B, 3, T, 16, 16\), got \(2, 3, 8, 8, 16\)"):
        model.encode(video[:, :, :, :8])
    for frames in (6, 12):
        with pytest.raises(ValueError, match=f"a multiple of 4 frames up to 8, got {frames}: change --num_frames"):
            model.encode(video.repeat(1, 1, 2, 1, 1)[:, :, :frames])
        with pytest.raises(ValueError, match=f"got {frames}"):
            model.decode(torch.zeros(1, 6, dtype=torch.long), frames)
