import copy
import pickle

import pytest
import torch

from models.configs import SIT_SIZES, plain
from models.layers import set_checkpointing
from models.sit import SiT, SiTConfig, timestep_sinusoids
from models.triplane import Planes

TINY = {"input_size": (8, 4), "in_channels": 2, "hidden_size": 16, "depth": 2, "num_heads": 2}


def tiny(**changes) -> SiT:
    """A tiny model whose output is not the constant 0 that it starts as."""
    model = SiT(**{**TINY, **changes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(model: SiT, batch: int = 2) -> tuple[Planes, torch.Tensor, torch.Tensor]:
    planes = Planes(*(torch.randn(batch, *shape) for shape in model.plane_shapes))
    return planes, torch.rand(batch), torch.arange(batch) % model.config.num_classes


def assert_close(got, expected, atol=0.0):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_reference_velocity(reference):
    case, tensors = reference.case("sit_tiny")
    model = SiT(**case["config"]).eval()
    state = reference.state_dict({k: v for k, v in case["parameters"].items() if k != "pos_embed_xy"})
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == case["parameters"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["pos_embed_xy"], [])
    x = Planes(*(reference.noise(f"{case['tag']}x{i}", shape) for i, shape in enumerate(case["shapes"])))
    with torch.no_grad():
        velocity = model(x, tensors["t"], tensors["y"])
    assert_close(velocity, [tensors[f"velocity_{name}"] for name in Planes._fields], atol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_output_has_the_input_shape(patch_size, learn_sigma):
    model = tiny(patch_size=patch_size, learn_sigma=learn_sigma)
    x, t, y = inputs(model)
    assert [plane.shape for plane in model(x, t, y)] == [plane.shape for plane in x]
    assert_close(model(tuple(x), t, y), model(x, t, y))


def test_starts_as_zero():
    model = SiT(**TINY)
    assert all((plane == 0).all() for plane in model(*inputs(model)))


def test_every_plane_reaches_every_plane():
    model = tiny()
    x, t, y = inputs(model)
    x = x.map(lambda plane: plane.requires_grad_())
    for output in model(x, t, y):
        assert all((g != 0).all() for g in torch.autograd.grad(output.sum(), x, retain_graph=True))


def test_published_sizes():
    millions = {"SiT-S/2": 33.2, "SiT-S/8": 34.8, "SiT-B/2": 132.2, "SiT-L/4": 462.2, "SiT-XL/8": 684.3}
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in SiT(**SIT_SIZES[name]).parameters()) for name in millions}
    assert {name: round(count / 1e6, 1) for name, count in counts.items()} == millions
    assert list(SIT_SIZES)[:12] == [f"SiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)]
    assert SiTConfig() == SiTConfig(**SIT_SIZES["SiT-L/2"])


def test_time_stays_float32_under_autocast():
    model, seen = tiny(), []
    model.t_embedder.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, _, y = inputs(model)
    t = torch.tensor([0.5, 0.5 + 1e-4])  # one number in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        model(x, t, y)
    assert seen[0].dtype == torch.float32 and not torch.equal(seen[0][0], seen[0][1])
    assert timestep_sinusoids(t)[:, 0].tolist() == t.cos().tolist()  # cosines first, highest frequency 1


def test_label_dropout():
    model = tiny(num_classes=3, class_dropout_prob=0.5)
    x, t, _ = inputs(model, 4)
    y, drop = torch.tensor([0, 1, 2, 1]), torch.tensor([True, False, True, False])
    assert_close(model(x, t, y, drop), model(x, t, torch.tensor([3, 1, 3, 1])))
    assert y.tolist() == [0, 1, 2, 1]
    embedder, many = model.y_embedder, torch.zeros(2000, dtype=torch.long)
    assert (embedder(many) == embedder(many)[0]).all()  # evaluation drops nothing
    embedder.train()
    dropped = (embedder(many) == embedder.embedding_table.weight[3]).all(dim=1).float().mean()
    assert abs(dropped - 0.5) < 0.06
    with pytest.raises(ValueError, match="no 'no label' row"):
        tiny()(x, t, torch.zeros_like(y), drop)


def test_guidance_equals_two_calls_and_makes_one():
    model, calls = tiny(num_classes=3, class_dropout_prob=0.1), []
    x, _, y = inputs(model, 3)
    t = torch.tensor([0.1, 0.5, 0.9])
    with_label, without = model(x, t, y), model(x, t, torch.full_like(y, 3))
    model.register_forward_hook(lambda module, args, output: calls.append(len(args[1])))
    guided = without.map(lambda u, c: u + 3 * (c - u), with_label)
    assert_close(model.forward_with_cfg(x, t, y, 3.0), guided, atol=1e-5)
    assert calls == [6]
    inside = torch.tensor([False, True, False])[:, None, None, None]
    expected = guided.map(lambda g, c: torch.where(inside, g, c), with_label)
    assert_close(model.forward_with_cfg(x, t, y, 3.0, interval=(0.4, 0.6)), expected, atol=1e-5)
    with pytest.raises(ValueError, match="--class_dropout_prob"):
        tiny().forward_with_cfg(x, t, y, 3.0)


def test_checkpointing_changes_no_gradient():
    model = tiny()
    x, t, y = inputs(model)
    gradients = []
    for enabled in (False, True):
        set_checkpointing(model, enabled)
        model.zero_grad()
        sum((plane**2).sum() for plane in model(x, t, y)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert_close(*gradients, atol=1e-6)


def test_copies_stand_alone():
    model = tiny()
    args = inputs(model)
    expected = model(*args)
    clones = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    torch.nn.init.zeros_(model.type_embed)
    for clone in clones:
        assert_close(clone(*args), expected)


def test_from_released_reads_the_ema(tmp_path):
    live, ema = tiny(), tiny()
    file = tmp_path / "0600000.pt"
    torch.save({"model": live.state_dict(), "ema": ema.state_dict(), "opt": {}, "args": {}}, file)
    args = inputs(live)
    assert_close(SiT.from_released(file, **TINY)(*args), ema(*args))
    with pytest.raises(ValueError, match="x_embedder_xy.*--latent_n_features") as error:
        SiT.from_released(file, **{**TINY, "in_channels": 4})
    assert "\n" not in str(error.value)
    torch.save({"model": live.state_dict()}, file)
    with pytest.raises(ValueError, match="no ema in it"):
        SiT.from_released(file, **TINY)


@pytest.mark.parametrize(
    "change, flag",
    [
        ({"input_size": (8, 5)}, "--latent_resolution_t"),
        ({"num_heads": 3}, "--model"),
        ({"num_classes": 0}, "--num_classes"),
        ({"class_dropout_prob": 1.5}, "--class_dropout_prob"),
    ],
)
def test_config_errors_name_the_flag(change, flag):
    with pytest.raises(ValueError, match=flag) as error:
        SiT(**{**TINY, **change})
    assert "\n" not in str(error.value)


def test_planes_of_another_tokenizer():
    model = tiny()
    x, t, y = inputs(model)
    with pytest.raises(ValueError, match=r"plane yt is \(2, 2, 6, 4\), this SiT expects \(batch, 2, 8, 4\)"):
        model(x._replace(yt=x.yt[:, :, :6]), t, y)


def test_the_clip_before_is_an_option_that_starts_as_nothing():
    without = tiny()
    assert "condition_on_previous" not in plain(without.config) and SiTConfig(**plain(without.config)) == without.config
    torch.manual_seed(1)
    model = SiT(**TINY, condition_on_previous=True).eval()
    assert SiTConfig(**plain(model.config)) == model.config
    new = model.state_dict().keys() - without.state_dict().keys()
    assert new == {"no_previous", *(f"previous_embedder_{plane}.proj.{part}" for plane in Planes._fields
                                    for part in ("weight", "bias"))}
    model.load_state_dict({**model.state_dict(), **without.state_dict()})
    x, t, y = inputs(model)
    before = Planes(*(torch.randn(plane.shape) for plane in x))
    expected = without(x, t, y)
    for got in (model(x, t, y), model(x, t, y, previous=before)):
        assert all(torch.equal(a, b) for a, b in zip(got, expected))
    with pytest.raises(ValueError, match="trained without --condition_on_previous"):
        without(x, t, y, previous=before)
    with pytest.raises(ValueError, match="plane xt is"):
        model(x, t, y, previous=Planes(before.xy, before.yt, before.xy))


def test_every_plane_of_the_clip_before_counts_unless_the_clip_is_the_first():
    model = tiny(condition_on_previous=True)
    x, t, y = inputs(model)
    before = Planes(*(torch.randn(plane.shape) for plane in x))
    first = torch.tensor([True, False])
    mixed = model(x, t, y, previous=before, first=first)
    assert_close([plane[:1] for plane in mixed], [plane[:1] for plane in model(x, t, y)], atol=1e-6)
    assert_close([plane[1:] for plane in mixed], [plane[1:] for plane in model(x, t, y, previous=before)], atol=1e-6)
    for name in Planes._fields:
        other = model(x, t, y, previous=before._replace(**{name: getattr(before, name) + 1}), first=first)
        assert torch.equal(other.xy[0], mixed.xy[0]) and (other.xy[1] - mixed.xy[1]).abs().max() > 1e-3
    sum(plane.sum() for plane in mixed).backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "as DDP needs"


def test_guidance_keeps_the_clip_before():
    model = tiny(num_classes=3, class_dropout_prob=0.5, condition_on_previous=True)
    x, t, y = inputs(model)
    before = Planes(*(torch.randn(plane.shape) for plane in x))
    with_label, without = (model(x, t, y, drop=torch.full((2,), hide), previous=before) for hide in (False, True))
    expected = without.map(lambda u, c: u + 3 * (c - u), with_label)
    assert_close(model.forward_with_cfg(x, t, y, 3.0, previous=before), expected, atol=1e-4)
