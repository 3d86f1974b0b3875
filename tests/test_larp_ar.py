"""models/larp_ar.py and models/decoding.py.

tests/fused_decoding.py holds models/decode_kernels.py, which needs a GPU, to it.
"""
import copy
import json
import pickle
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, environment
from torch.utils._python_dispatch import TorchDispatchMode

from models.decoding import Linear, draw, sampling_probs
from models.larp_ar import SIZES, LARPGenerator, code_loss
from models.layers import set_checkpointing
from models.pretrained import WeightsError

TINY = {"n_layer": 3, "n_head": 4, "dim": 64, "num_classes": 7, "vocab_size": 64, "max_seq_len": 24}
FP = TINY | {"frame_prediction": True, "cls_token_num": 25}
LABELS = torch.tensor([3, 0, 6, 5, 1, 2, 2, -1])


@pytest.fixture(autouse=True)
def one_thread():
    """Threads would only wait for one another on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_generator(**config) -> LARPGenerator:
    """With weights large enough that predictions differ."""
    generator = LARPGenerator(**TINY | config).eval()
    for parameter in generator.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return generator


def random_condition(generator: LARPGenerator, num: int = 8) -> torch.Tensor:
    if generator.config.frame_prediction:
        return generator.frame_condition(torch.randint(generator.config.vocab_size, (num, 24)))
    return LABELS[:num]


@pytest.fixture(params=["larp_ar_tiny", "larp_ar_fp_tiny"])
def case(request, reference):
    description, tensors = reference.case(request.param)
    generator = LARPGenerator(**description["config"]).eval()
    generator.load_state_dict(reference.state_dict(description["parameters"]))
    return generator, description, tensors


def test_reference_logits_and_loss(case):
    generator, _, tensors = case
    logits = generator(tensors["tokens"][:, :-1], tensors["cond"])
    torch.testing.assert_close(logits, tensors["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(generator(tensors["tokens"], tensors["cond"]), logits)
    loss, logs = code_loss(logits, tensors["tokens"])
    torch.testing.assert_close(loss, tensors["loss"][0], atol=1e-5, rtol=0)
    assert logs["loss"] == loss and not logs["loss"].requires_grad


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"top_k": 1}])
def test_reference_greedy_sequences(case, greedy):
    generator, _, tensors = case
    names = [name for name in tensors if name.startswith("greedy")]
    assert names
    for name in names:
        scale, interval = name.removeprefix("greedy_cfg").split("_interval")
        codes = generator.generate(tensors["cond"][: len(tensors[name])], float(scale), int(interval), **greedy)
        assert codes.equal(tensors[name]), name


def test_reference_filtered_distributions(case, reference):
    generator, description, tensors = case
    rows = 2 * reference.noise(description["row_tag"], (4, generator.config.vocab_size))
    names = [name for name in tensors if name.startswith("probs")]
    assert names
    for name in names:
        top_k, top_p, temperature = (float(part[1:]) for part in name.split("_")[1:])
        probs = sampling_probs(rows, temperature, int(top_k), top_p)
        torch.testing.assert_close(probs, tensors[name], atol=1e-6, rtol=0)


def test_released_names_and_sizes(reference):
    counts = reference.case("parameter_counts")[0]
    with torch.device("meta"):
        for name in ("llama-abs-S", "llama-abs-B", "llama-abs-L", "llama-abs-LP"):
            model = LARPGenerator(**SIZES[name])
            assert sum(parameter.numel() for parameter in model.parameters()) == counts[name]
        fp = LARPGenerator(**SIZES["llama-abs-LP"], frame_prediction=True, cls_token_num=1025)
    assert sum(parameter.numel() for parameter in fp.parameters()) == counts["llama-abs-LP frame prediction"]
    manifest = reference.case("larp_ar_LP_manifest")[0]
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == manifest


def test_initial_predictions_are_uniform():
    generator = LARPGenerator(**TINY | {"initializer_range": 0.5})
    codes = torch.randint(64, (2, 24))
    assert code_loss(generator(codes, LABELS[:2]), codes)[0].item() == pytest.approx(torch.tensor(64.0).log().item())
    assert generator.layers[1].feed_forward.w2.weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert generator.abs_pe.std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("config", [{}, {"n_kv_head": 2}, {"n_kv_head": 1}, {"use_fixed_pe": True}, FP])
@pytest.mark.parametrize("bag", [True, False])
def test_cached_decoding_equals_forward(config, bag, monkeypatch):
    """At every position: the negative log-likelihood sums over all, and greedy codes are the forward's argmax."""
    generator = random_generator(**config)
    cond = random_condition(generator)
    generator.generate(cond)
    if not bag:  # attends as on a GPU
        monkeypatch.setattr("models.decoding.value_rows", lambda *_: None)
    generator.cache.buffer.fill_(1e4)  # what an earlier clip left must not be seen
    codes, nll = generator.generate(cond, seeds=range(8), return_nll=True)
    expected = F.cross_entropy(generator(codes, cond).mT, codes, reduction="none").mean(1)
    torch.testing.assert_close(nll, expected, atol=1e-5, rtol=0)
    greedy = generator.generate(cond, temperature=0)
    assert greedy.equal(generator(greedy, cond).argmax(-1))


def test_what_an_earlier_call_left_does_no_harm():
    generator = random_generator()
    cond = random_condition(generator)
    with torch.inference_mode():
        expected = generator.generate(cond, seeds=range(8))
    assert generator.generate(cond, seeds=range(8)).equal(expected), "the cache was made in inference mode"
    expected = generator.generate(cond, temperature=0)
    generator.cache.buffer.fill_(torch.nan)
    assert generator.generate(cond, temperature=0).equal(expected)


@pytest.mark.parametrize("config", [{"n_kv_head": 2}, FP])
def test_decoded_logits_equal_forward(config, monkeypatch):
    generator, seen = random_generator(**config), []
    cond, codes = random_condition(generator, 3), torch.randint(64, (3, 24))
    given = iter(codes.T)

    def record(logits, *_):
        seen.append(logits)
        return logits.softmax(-1)

    monkeypatch.setattr("models.decoding.sampling_probs", record)
    monkeypatch.setattr("models.decoding.draw", lambda *_: next(given))
    generator.generate(cond)
    torch.testing.assert_close(torch.stack(seen, 1), generator(codes, cond), atol=1e-5, rtol=0)


def test_grouped_heads_equal_repeated_ones():
    grouped, full = random_generator(n_kv_head=2), random_generator()
    state = grouped.state_dict()
    for name, value in state.items():
        if "wqkv" in name:
            q, k, v = value.split([64, 32, 32])
            k, v = (part.view(2, 16, 64).repeat_interleave(2, 0).flatten(0, 1) for part in (k, v))
            state[name] = torch.cat([q, k, v])
    full.load_state_dict(state)
    codes = torch.randint(64, (8, 24))
    torch.testing.assert_close(grouped(codes, LABELS), full(codes, LABELS), atol=1e-5, rtol=0)
    assert grouped.generate(LABELS, seeds=range(8)).equal(full.generate(LABELS, seeds=range(8)))


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, torch.float32),
        ({"n_kv_head": 2}, torch.float32),
        (FP, torch.float32),
        ({}, torch.bfloat16),
        (FP, torch.bfloat16),
        ({}, torch.float16),
    ],
)
def test_a_clip_is_the_same_in_any_batch(config, dtype):
    """Not one bit of the likelihood differs, in whatever order, with a cache that is new, used or too large."""
    generator = random_generator(**config).to(dtype)
    cond, seeds = random_condition(generator), [(42, i) for i in range(8)]
    cfg_scale = 1.0 if "frame_prediction" in config else 2.0
    codes, nll = generator.generate(cond, cfg_scale, seeds=seeds, return_nll=True)
    for part in (slice(5, 8), slice(0, 1), slice(7, 8), slice(1, 6), slice(2, 5)):
        some, some_nll = generator.generate(cond[part], cfg_scale, seeds=seeds[part], return_nll=True)
        assert some.equal(codes[part]) and some_nll.equal(nll[part])
        if part.stop == 1:
            generator.cache = None


@pytest.mark.parametrize("packed", [True, False])
def test_rows_of_linear_do_not_depend_on_their_number(packed):
    layer, x = Linear(2048, 768), torch.randn(16, 1, 2048)
    layer.start_decoding()
    layer.packed = layer.packed if packed else None
    full = layer(x)
    torch.testing.assert_close(full, F.linear(x, layer.weight), atol=1e-5, rtol=0)
    assert all(layer(x[:num]).equal(full[:num]) for num in range(1, 16))


def test_number_of_threads_does_not_matter():
    generator, results = random_generator(), []
    for num in (1, 2, 3):
        torch.set_num_threads(num)
        results.append(generator.generate(LABELS[:3], 1.5, seeds=range(3), return_nll=True))
    assert all(a.equal(b) for result in results[1:] for a, b in zip(result, results[0]))


def test_seeds():
    generator = random_generator()
    one = generator.generate(LABELS, seeds=torch.arange(8))
    assert one.equal(generator.generate(LABELS, seeds=range(8)))
    assert not one.equal(generator.generate(LABELS, seeds=range(1, 9)))
    torch.manual_seed(5)
    free = generator.generate(LABELS)
    assert not free.equal(generator.generate(LABELS))
    torch.manual_seed(5)
    assert free.equal(generator.generate(LABELS))
    with pytest.raises(ValueError, match="3 seeds for 8 clips"):
        generator.generate(LABELS, seeds=[1, 2, 3])


def test_guidance_interval():
    """Equal to full guidance in the first interval + 2 codes; the rest follows the conditional model."""
    generator = random_generator()
    full = generator.generate(LABELS, 6.0, temperature=0)
    part, nll = generator.generate(LABELS, 6.0, 4, temperature=0, return_nll=True)
    assert part[:, :6].equal(full[:, :6]) and not part.equal(full)
    logits = generator(part, LABELS)
    assert part[:, 6:].equal(logits.argmax(-1)[:, 6:])
    torch.testing.assert_close(nll, F.cross_entropy(logits.mT, part, reduction="none").mean(1), atol=1e-5, rtol=0)


def test_sampling_rules_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    torch.testing.assert_close(sampling_probs(logits, top_k=3), torch.tensor([[0.5, 0.3, 0.1, 0.1]]))  # a tie stays
    torch.testing.assert_close(sampling_probs(logits, top_k=2), torch.tensor([[0.625, 0.375, 0, 0]]))
    torch.testing.assert_close(sampling_probs(logits, top_p=0.6), torch.tensor([[0.625, 0.375, 0, 0]]))  # the crossing
    torch.testing.assert_close(sampling_probs(logits, top_p=0.4), torch.tensor([[1.0, 0, 0, 0]]))
    torch.testing.assert_close(sampling_probs(logits, temperature=0.5), torch.tensor([[25, 9, 1, 1]]) / 36)
    probs = torch.tensor([[0, 0.5, 0, 0.5]]).expand(5, 4)
    uniform = torch.tensor([0, 0.4999, 0.5, 0.9999, 1 - 2**-53], dtype=torch.float64)
    assert draw(probs, uniform).tolist() == [1, 1, 3, 3, 3]


def test_draws_follow_the_distribution():
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(20000, 4)
    frequency = draw(probs, torch.rand(20000, dtype=torch.float64)).bincount() / 20000
    torch.testing.assert_close(frequency, probs[0], atol=0.015, rtol=0)


def test_label_dropout_and_negative_labels():
    generator = random_generator(token_dropout_p=0, resid_dropout_p=0, ffn_dropout_p=0, class_dropout_prob=0.5)
    codes = torch.randint(64, (8, 24))
    none = generator(codes, torch.full((8,), 7))
    assert generator(codes, torch.full((8,), -1)).equal(none)
    drop = torch.arange(8) % 2 == 0
    dropped = generator.train()(codes, LABELS, drop)
    torch.testing.assert_close(dropped[drop], none[drop])
    torch.testing.assert_close(dropped[~drop], generator.eval()(codes, LABELS)[~drop])
    labels = LABELS.clone()
    assert not generator.train()(codes, LABELS).equal(generator(codes, LABELS))  # drawn anew
    assert labels.equal(LABELS)


def test_dropouts_act_in_training_only():
    codes = torch.randint(64, (2, 24))
    for name in ("token_dropout_p", "attn_dropout_p", "resid_dropout_p", "ffn_dropout_p", "drop_path_rate"):
        off = dict.fromkeys(("token_dropout_p", "resid_dropout_p", "ffn_dropout_p", "class_dropout_prob"), 0.0)
        generator = random_generator(**off | {name: 0.5})
        assert generator(codes, LABELS[:2]).equal(generator(codes, LABELS[:2]))
        generator.train()
        assert not generator(codes, LABELS[:2]).equal(generator(codes, LABELS[:2])), name
        assert generator.generate(LABELS, seeds=range(8)).equal(generator.generate(LABELS, seeds=range(8)))
        assert generator.training
    rates = [layer.drop_path.drop_prob for layer in LARPGenerator(**TINY | {"drop_path_rate": 0.2}).layers]
    assert rates == pytest.approx([0, 0.1, 0.2])


def test_checkpointing_keeps_gradients():
    codes, gradients = torch.randint(64, (2, 24)), []
    generator = random_generator().train()
    for checkpointing in (False, True):
        set_checkpointing(generator, checkpointing)
        torch.manual_seed(1)
        generator.zero_grad()
        code_loss(generator(codes, LABELS[:2]), codes)[0].backward()
        gradients.append([parameter.grad.clone() for parameter in generator.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_generate_sees_trained_weights_and_leaves_no_trace():
    generator = random_generator()
    before = generator.generate(LABELS, seeds=range(8))
    buffer = generator.cache.buffer
    assert generator.generate(LABELS, seeds=range(8)).equal(before)
    assert generator.cache.buffer is buffer
    assert not any("cache" in name or "packed" in name for name in generator.state_dict())
    for other in (copy.deepcopy(generator), pickle.loads(pickle.dumps(generator))):
        assert other.cache is None and other.generate(LABELS, seeds=range(8)).equal(before)
    with torch.no_grad():
        generator.output.weight.neg_()
    assert not generator.generate(LABELS, seeds=range(8)).equal(before)
    codes = generator.generate(LABELS, seeds=range(8))
    code_loss(generator(codes, LABELS), codes)[0].backward()  # codes are ordinary tensors


class NoReading(TorchDispatchMode):
    """Forbids what makes the host wait for a device: reading a value, or a shape that depends on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero"), name
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("config", [{}, FP])
def test_generate_does_not_wait_for_the_device(monkeypatch, config):
    monkeypatch.setattr("models.larp_ar.check_integers", lambda *_, **__: None)  # looks at tensors on the CPU alone
    generator = random_generator(**config)
    cond, cfg_scale = random_condition(generator, 2), 1.0 if config else 2.0
    settings = {"cfg_interval": 3, "temperature": 0.9, "top_k": 10, "top_p": 0.9, "return_nll": True}
    with NoReading():
        generator.generate(cond, cfg_scale, **settings)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            cond.sum().item()


def test_guidance_below_one():
    """At 0 the condition does not count; between 0 and 1 it counts in part."""
    generator = random_generator(class_dropout_prob=0.1)
    labels, seeds = LABELS[:6], list(range(6))
    none, part, plain = (generator.generate(labels, scale, seeds=seeds) for scale in (0.0, 0.5, 1.0))
    assert torch.equal(none, generator.generate(torch.full_like(labels, -1), seeds=seeds))
    assert not torch.equal(part, plain) and not torch.equal(part, none)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_fused_decoding_equals_the_modules():
    """Triton's interpreter runs the kernels on the CPU; it must be chosen before they are imported."""
    done = subprocess.run(
        [sys.executable, "tests/fused_decoding.py"], cwd=ROOT, capture_output=True, text=True,
        env={**environment(), "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", [{"max_seq_len": 300}, {"max_seq_len": 300, "n_kv_head": 2}, FP])
def test_cuda_graphs_equal_eager(config):
    generator = random_generator(**config).cuda()
    cond, settings = random_condition(generator).cuda(), {"seeds": range(8), "return_nll": True}
    with torch.inference_mode():
        first = generator.generate(cond, **settings)
    captured = generator.generate(cond, **settings)
    assert all(a.equal(b) for a, b in zip(first, captured))
    generator.cuda_graphs = False
    eager = generator.generate(cond, **settings)
    assert captured[0].equal(eager[0])
    torch.testing.assert_close(captured[1], eager[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        eager[1], F.cross_entropy(generator(eager[0], cond).mT, eager[0], reduction="none").mean(1), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("config", [{"use_fixed_pe": True, "n_kv_head": 2}, FP])
def test_save_and_load(tmp_path, config):
    generator = random_generator(**config)
    generator.save_pretrained(tmp_path)
    loaded = LARPGenerator.from_pretrained(tmp_path)
    assert loaded.config == generator.config and not loaded.training
    codes, cond = torch.randint(64, (2, 24)), random_condition(generator, 2)
    assert loaded(codes, cond).equal(generator(codes, cond))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    with pytest.raises(ValueError, match=r"model.safetensors: 7 tensors do not fit.*layers\.2\..* is not expected"):
        LARPGenerator.from_pretrained(tmp_path)


def test_nothing_to_load_is_one_clear_line(tmp_path):
    with pytest.raises(WeightsError, match="^nobody/AR: not a folder.* cache .*HF_HUB_OFFLINE=1") as caught:
        LARPGenerator.from_pretrained("nobody/AR", local_files_only=True, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
    random_generator().save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="cannot be read as a model.s weights: .*; fetch it again"):
        LARPGenerator.from_pretrained(tmp_path)


def test_trainer_files(tmp_path):
    generator = random_generator()
    average = {name: value + 1 for name, value in generator.state_dict().items()}
    args = {key: value for key, value in TINY.items() if key != "n_layer"}
    model = {"name": "llama-abs-S", "args": args | {"n_layer": 3}, "ema_sd": {0.999: average}}
    model["sd"] = {f"module.{name}": value for name, value in generator.state_dict().items()}
    torch.save({"model": model, "epoch": 3}, tmp_path / "epoch-last.pth")
    loaded = LARPGenerator.from_released(tmp_path / "epoch-last.pth")
    assert loaded.config == generator.config and not loaded.training
    assert loaded.output.weight.equal(generator.output.weight)
    loaded = LARPGenerator.from_released(tmp_path / "epoch-last.pth", version="ema_0.999")
    assert loaded.output.weight.equal(average["output.weight"])
    with pytest.raises(ValueError, match="no version ema_0.9 in it; choose one of sd, ema_0.999"):
        LARPGenerator.from_released(tmp_path / "epoch-last.pth", version="ema_0.9")


def test_errors():
    for config, match in (
        ({"n_head": 5}, "dim 64 does not divide by n_head 5"),
        ({"n_kv_head": 3}, "n_head 4 does not divide by n_kv_head 3"),
        ({"cls_token_num": 2}, "cls_token_num is 2"),
        ({"frame_prediction": True}, "set it to max_seq_len . 1 = 25"),
        ({"token_dropout_p": 1.5}, "token_dropout_p is 1.5"),
    ):
        with pytest.raises(ValueError, match=match):
            LARPGenerator(**TINY | config)
    generator = LARPGenerator(**FP)
    with pytest.raises(ValueError, match="cfg_scale 2.0 needs a model trained with --class_dropout_prob above 0"):
        random_generator(class_dropout_prob=0.0).generate(LABELS[:2], cfg_scale=2.0)
    for scale in (2.0, 0.5):
        with pytest.raises(ValueError, match=f"cfg_scale is {scale}, but frame prediction"):
            generator.generate(random_condition(generator), scale)
    with pytest.raises(ValueError, match=r"cond is \(8,\); expected codes and a separator, \(8, 25\)"):
        generator.generate(LABELS.abs())
    with pytest.raises(ValueError, match="25 codes are more than max_seq_len 24"):
        generator(torch.zeros(8, 25, dtype=torch.long), random_condition(generator))
