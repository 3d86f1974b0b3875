"""models/interpolant.py, and the samples' generators of common/rng.py."""
import copy
import itertools
import math
import pickle
import sys
from functools import partial

import pytest
import torch

import models.interpolant
from common.rng import sample_generators
from models.interpolant import (
    ADAPTIVE,
    DIFFUSION_FORMS,
    FIXED_GRID,
    LAST_STEPS,
    LOSS_WEIGHTS,
    PATHS,
    PREDICTIONS,
    SDE_METHODS,
    Interpolant,
    draw_noise,
    noise_stream,
)
from models.sit import SiT
from models.triplane import Planes

TINY = {"input_size": (8, 4), "in_channels": 2, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
SHAPES = ((2, 4, 4), (2, 8, 4), (2, 8, 4))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """With tensors this small, threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_close(got, expected, atol=0.0):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def normal(batch: int, shapes=SHAPES) -> Planes:
    return Planes(*(torch.randn(batch, *shape) for shape in shapes))


@pytest.fixture(scope="module")
def sit() -> SiT:
    torch.manual_seed(1)
    model = SiT(**TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


class Counted:
    """Any model, with the number of its calls."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.model(*args, **kwargs)


# The reference case.


@pytest.fixture(scope="module")
def released(reference):
    """(model, inputs by tag, expected tensors, batch keywords) of the case sit_tiny."""
    case, tensors = reference.case("sit_tiny")
    model = SiT(**case["config"]).eval()
    manifest = {name: shape for name, shape in case["parameters"].items() if name != "pos_embed_xy"}
    model.load_state_dict(reference.state_dict(manifest), strict=False)

    def planes(tag: str, start: int = 0) -> Planes:
        shapes = enumerate(case["shapes"], start)
        return Planes(*(reference.noise(f"{case['tag']}{tag}{i}", shape) for i, shape in shapes))

    return model, planes, tensors


@pytest.mark.parametrize("path", ["Linear", "GVP"])
def test_reference_loss(released, path):
    model, planes, tensors = released
    interpolant, x1, x0 = Interpolant(path), planes("x"), planes("x0")
    xt, ut = interpolant.interpolate(x1, x0, tensors["t"])
    assert_close(xt, [tensors[f"{path}.xt_{name}"] for name in Planes._fields], atol=1e-5)
    assert_close(ut, [tensors[f"{path}.ut_{name}"] for name in Planes._fields], atol=1e-5)
    loss, logs = interpolant.loss(model, x1, t=tensors["t"], noise=x0, y=tensors["y"])
    torch.testing.assert_close(loss, tensors[f"{path}.loss"], atol=1e-5, rtol=0)
    assert list(logs) == ["loss_xy", "loss_yt", "loss_xt"] and not any(value.requires_grad for value in logs.values())
    torch.testing.assert_close(sum(logs.values()) / 3, loss.mean())


@pytest.mark.parametrize("method, num_steps, coupled", [("euler", 8, False), ("heun3", 8, False), ("dopri5", 4, True)])
def test_reference_ode(released, method, num_steps, coupled):
    model, planes, tensors = released
    interpolant = Interpolant()
    sample = interpolant.sample_ode(model, planes("z"), method, num_steps, coupled=coupled, y=tensors["y"])
    assert_close(sample, [tensors[f"ode_{method}_{num_steps}.{name}"] for name in Planes._fields], atol=1e-5)


@pytest.mark.parametrize("method, form", list(itertools.product(["Euler", "Heun"], ["sigma", "decreasing"])))
def test_reference_sde(released, method, form):
    model, planes, tensors = released
    sample = Interpolant().sample_sde(
        model,
        planes("z"),
        method,
        num_steps=6,
        diffusion_form=form,
        step_noise=lambda step, x: planes("sde", 3 * step),
        y=tensors["y"],
    )
    assert_close(sample, [tensors[f"sde_{method}_{form}_Mean_6.{name}"] for name in Planes._fields], atol=1e-5)


# A known distribution: data N(mean, std^2), whose velocity, score and noise fields are closed expressions. They are
# written here from the paths' definitions, with numerical derivatives, apart from the formulas under test.

MEAN, STD = Planes(0.5, -0.3, 1.0), Planes(0.6, 1.2, 0.8)


def alpha_sigma(path: str, t: float) -> tuple[float, float]:
    if path == "Linear":
        return t, 1 - t
    if path == "GVP":
        return math.sin(math.pi * t / 2), math.cos(math.pi * t / 2)
    alpha = math.exp(-((1 - t) ** 2) * 19.9 / 4 - (1 - t) * 0.1 / 2)
    return alpha, math.sqrt(1 - alpha**2)


def gaussian_model(path: str, prediction: str):
    """The exact field of the data distribution; t is one for the whole batch."""

    def model(planes, t):
        t = t[0].item()
        alpha, sigma = alpha_sigma(path, t)
        low, high = max(t - 1e-5, 0.0), min(t + 1e-5, 1.0)
        (alpha0, sigma0), (alpha1, sigma1) = alpha_sigma(path, low), alpha_sigma(path, high)
        d_alpha, d_sigma = (alpha1 - alpha0) / (high - low), (sigma1 - sigma0) / (high - low)

        def field(x, mean, std):
            centred = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
            if prediction == "score":
                return -centred
            if prediction == "noise":
                return sigma * centred
            return d_alpha * mean + (alpha * d_alpha * std**2 + sigma * d_sigma) * centred

        return planes.map(field, MEAN, STD)

    return model


def assert_gaussian(planes: Planes, tolerance: float, what: str):
    """Within `tolerance` of the mean (in standard deviations) and of the standard deviation (relative)."""
    for plane, mean, std in zip(planes, MEAN, STD):
        off = abs(plane.mean().item() - mean) / std, abs(plane.std().item() / std - 1)
        assert max(off) < tolerance, f"{what}: mean off by {off[0]:.3f} standard deviations, these by {off[1]:.3f}"


def standardised(shape: tuple[int, ...]) -> torch.Tensor:
    """Normal noise whose own mean and deviation are exact, so that little is left of the Monte-Carlo error."""
    x = torch.randn(shape)
    return (x - x.mean()) / x.std()


PLANES = Planes((1, 1, 60, 50), (1, 1, 60, 50), (1, 1, 60, 50))


@pytest.mark.parametrize("path, prediction", list(itertools.product(PATHS, PREDICTIONS)))
def test_ode_reaches_the_data_and_returns(path, prediction):
    interpolant, model = Interpolant(path, prediction), gaussian_model(path, prediction)
    noise = PLANES.map(standardised)
    for method in ADAPTIVE + FIXED_GRID:
        solver = {"method": method, "num_steps": 100 if method == "euler" else 20, "atol": 1e-4, "rtol": 1e-4}
        if "adams" in method:
            solver["options"] = {"max_order": 4}  # its order of 12 is not stable here
        sample = interpolant.sample_ode(model, noise, **solver)
        assert_gaussian(sample, 0.05, f"{path} {prediction} {method}")
        if method not in ("dopri5", "euler", "rk4", "explicit_adams"):
            continue
        back = interpolant.sample_ode(model, sample, **solver, reverse=True)
        off = max((a - b).abs().max().item() for a, b in zip(back, noise))
        assert off < 0.2, f"{path} {prediction} {method}: noise off by {off}"


@pytest.mark.parametrize("path, prediction, method", list(itertools.product(PATHS, PREDICTIONS, SDE_METHODS)))
def test_sde_reaches_the_data(path, prediction, method):
    interpolant, model = Interpolant(path, prediction), gaussian_model(path, prediction)
    noise = PLANES.map(standardised)
    for form, last_step in itertools.product(DIFFUSION_FORMS, LAST_STEPS):
        sample = interpolant.sample_sde(
            model,
            noise,
            method,
            num_steps=30,
            diffusion_form=form,
            last_step=last_step,
            last_step_size=0.01,
            step_noise=lambda step, x: x.map(lambda plane: standardised(plane.shape)),
        )
        assert_gaussian(sample, 0.12, f"{path} {prediction} {method} {form} {last_step}")


def test_last_steps_by_hand():
    """From x at t = 0.8 on the Linear path: sigma 0.2, D = 2 sigma."""
    seen, fields = [], [gaussian_model("Linear", kind) for kind in ("velocity", "score")]

    def model(planes, t):
        seen.append((planes, t))
        return fields[0](planes, t)

    for last_step in ("Mean", "Euler", "Tweedie"):
        sampler = {"num_steps": 3, "diffusion_norm": 2.0, "last_step": last_step, "last_step_size": 0.2}
        sample = Interpolant().sample_sde(model, normal(2), **sampler)
        x, t = seen[-1]
        assert t.tolist() == pytest.approx([0.8, 0.8])
        v, s = (field(x, t) for field in fields)
        expected = {
            "Mean": x.map(lambda x, v, s: x + 0.2 * (v + 0.4 * s), v, s),
            "Euler": x.map(lambda x, v: x + 0.2 * v, v),
            "Tweedie": x.map(lambda x, s: x / 0.8 + 0.04 / 0.8 * s, s),
        }[last_step]
        assert_close(sample, expected, atol=1e-4)


@pytest.mark.parametrize("path, prediction", list(itertools.product(PATHS, PREDICTIONS)))
def test_likelihood_is_the_density(path, prediction):
    x = Planes(*(mean + std * torch.randn(2, 1, 3, 3) for mean, std in zip(MEAN, STD)))
    interpolant, model = Interpolant(path, prediction), gaussian_model(path, prediction)
    expected = sum(
        torch.distributions.Normal(mean, std).log_prob(plane).flatten(1).sum(dim=1)
        for plane, mean, std in zip(x, MEAN, STD)
    )
    for solver in ({"method": "dopri5", "rtol": 1e-5}, {"method": "rk4", "num_steps": 25}):
        got = interpolant.likelihood(model, x, **solver)
        torch.testing.assert_close(got, expected, atol=0.06, rtol=0)  # of 27 values; the margins cost this much


def test_likelihood_needs_the_whole_divergence(sit):
    """Averaged over all signs of two values, Hutchinson's estimate is the trace: here of a model that mixes values."""
    matrix = torch.tensor([[0.3, 0.9], [-0.4, 0.5]])

    def model(planes, t):
        return Planes(planes.xy @ matrix, 0 * planes.yt, 0 * planes.xt)

    x = Planes(*(torch.randn(4, 1, 1, 2) for _ in range(3)))
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])[:, None, None]
    x = x.map(lambda plane: plane[:1].expand(4, -1, -1, -1))
    got = Interpolant().likelihood(model, x, "rk4", 50, probe=Planes(signs, signs, signs)).mean()
    noise = x.xy[0] @ torch.linalg.matrix_exp(-matrix)
    squares = sum((plane**2).sum() for plane in (noise, x.yt[0], x.xt[0]))
    torch.testing.assert_close(got, -squares / 2 - 3 * math.log(2 * math.pi) - 0.8, atol=1e-4, rtol=0)


# Loss.


@pytest.mark.parametrize("path, prediction, weight", list(itertools.product(PATHS, PREDICTIONS, LOSS_WEIGHTS)))
def test_loss_is_finite_to_the_ends(path, prediction, weight, sit):
    interpolant, x = Interpolant(path, prediction, weight), normal(3)
    y = torch.tensor([0, 1, 2])
    loss, _ = interpolant.loss(sit, x, t=torch.tensor([0.0, 0.5, 1.0]), y=y)
    assert loss.shape == (3,) and loss.isfinite().all()
    assert interpolant.loss(sit, x, y=y)[0].isfinite().all()


@pytest.mark.parametrize("path, prediction", list(itertools.product(PATHS, PREDICTIONS)))
def test_loss_weights(path, prediction):
    """A model that knows noise and data has no loss; one that is off by one has the weight alone, here from the
    definitions: D0 = alpha'/alpha sigma^2 - sigma sigma'."""
    x1, x0, t = normal(1), normal(1), 0.3
    alpha, sigma = alpha_sigma(path, t)
    step = 1e-5
    (alpha0, sigma0), (alpha1, sigma1) = alpha_sigma(path, t - step), alpha_sigma(path, t + step)
    d_alpha, d_sigma = (alpha1 - alpha0) / (2 * step), (sigma1 - sigma0) / (2 * step)
    d0 = d_alpha / alpha * sigma**2 - sigma * d_sigma
    weights = {None: 1.0, "velocity": (d0 / sigma) ** 2, "likelihood": d0 / sigma**2}
    exact = {
        "velocity": x1.map(lambda x1, x0: d_alpha * x1 + d_sigma * x0, x0),
        "score": x0.map(lambda x0: -x0 / sigma),
        "noise": x0,
    }[prediction]
    for name, weight in weights.items():
        interpolant = Interpolant(path, prediction, name)
        for error in (0.0, 1.0):
            model = lambda x, t, error=error: exact.map(lambda plane: plane + error)  # noqa: E731
            loss, _ = interpolant.loss(model, x1, t=torch.tensor([t]), noise=x0)
            expected = error * {"velocity": 1.0, "score": weight * sigma**2, "noise": weight}[prediction]
            assert loss.item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_loss_draws():
    seen = []

    def model(planes, t):
        seen.append(t)
        return planes

    x = normal(4000, ((1, 1, 1), (1, 2, 1), (1, 2, 1)))
    interpolant = Interpolant("Linear", "noise", train_eps=0.2)
    losses = [interpolant.loss(model, x, generator=torch.Generator().manual_seed(seed))[0] for seed in (3, 3, 4)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    assert 0.2 <= seen[0].min() < 0.21 and 0.79 < seen[0].max() <= 0.8 and abs(seen[0].mean() - 0.5) < 0.02
    assert interpolant.loss(model, x.map(torch.Tensor.bfloat16))[0].dtype == torch.float32
    assert seen[-1].dtype == torch.float32


# What a sample depends on, and what it costs.


@pytest.mark.parametrize("kind", ["euler", "dopri5", "implicit_adams", "Euler", "Heun"])
def test_sample_does_not_depend_on_its_batch(kind, sit):
    def sample(indices):
        generators = sample_generators(7, indices)
        noise = draw_noise(generators, sit.plane_shapes)
        y = torch.tensor(indices) % 3
        if kind in SDE_METHODS:
            return Interpolant().sample_sde(sit, noise, kind, 6, step_noise=noise_stream(generators), y=y)
        return Interpolant().sample_ode(sit, noise, kind, 8, y=y)

    together = sample([0, 1, 2, 3, 4])
    for i in (0, 3):
        assert_close(sample([i]), together.map(lambda plane: plane[i : i + 1]), atol=1e-5)  # noqa: B023
    assert not torch.allclose(together.xy[0], together.xy[3])


def test_coupled_dopri5_is_the_named_exception(sit):
    noise, y = normal(5), torch.zeros(5, dtype=torch.long)
    noise = noise.map(lambda plane: plane * torch.arange(1, 6)[:, None, None, None])
    model, interpolant = Counted(sit), Interpolant()
    alone = interpolant.sample_ode(sit, noise, y=y)
    coupled = interpolant.sample_ode(model, noise, coupled=True, y=y)
    assert model.calls < 40 and not torch.equal(alone.xy, coupled.xy)
    assert_close(alone, coupled, atol=2e-2)


@pytest.mark.parametrize("method, calls", [("Euler", 9), ("Heun", 18)])
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_one_network_call_a_drift(method, calls, last_step, sit):
    model, y = Counted(sit), torch.zeros(2, dtype=torch.long)
    Interpolant().sample_sde(model, normal(2), method, 10, last_step=last_step, y=y)
    assert model.calls == calls + (last_step is not None)
    model.calls = 0
    Interpolant().sample_ode(model, normal(2), "euler", 10, y=y)
    assert model.calls == 9


def test_noise_of_a_generator():
    shapes = ((2, 3, 3), (2, 5, 3), (2, 5, 3))
    first = draw_noise(sample_generators(0, [4, 5]), shapes)
    assert [plane.shape[1:] for plane in first] == list(shapes)
    assert_close(draw_noise(sample_generators(0, [5]), shapes), first.map(lambda plane: plane[1:]))
    generators = sample_generators(0, [4, 5])
    draw_noise(generators, shapes)
    second = noise_stream(generators)(0, first)
    values = [row for noise in (first, second) for plane in noise for row in plane.flatten(1)]
    values += [draw_noise(sample_generators(1, [4]), shapes).xy.flatten()]
    assert len({row[0].item() for row in values}) == 13  # no two draws alike


@pytest.mark.parametrize("tolerances", [(0.0, 0.0), (1e-14, 1e-14)])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_tolerances_that_cannot_be_met_end_in_one_line(monkeypatch, method, tolerances, sit):
    monkeypatch.setattr(models.interpolant, "MAX_STEPS", 30)
    atol, rtol = tolerances
    y, message = torch.zeros(1, dtype=torch.long), f"{method} cannot solve the ODE to atol {atol} .*raise --atol"
    with pytest.raises(ValueError, match=message) as error:
        Interpolant().sample_ode(sit, normal(1), method, atol=atol, rtol=rtol, y=y)
    assert "\n" not in str(error.value)


def test_a_network_that_is_not_finite_ends_the_ode_in_one_line():
    def broken(planes, t):
        return planes.map(lambda plane: plane * torch.nan)

    with pytest.raises(ValueError, match="give other weights") as error:
        Interpolant().sample_ode(broken, normal(1))
    assert "\n" not in str(error.value)


def test_progress_counts(sit, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)  # a bar, in place of a line now and then
    y = torch.zeros(2, dtype=torch.long)
    Interpolant().sample_sde(sit, normal(2), num_steps=5, progress=True, y=y)
    assert "/4" in capsys.readouterr().err
    Interpolant().sample_ode(sit, normal(2), "euler", 5, progress=True, y=y)
    assert "call" in capsys.readouterr().err
    Interpolant().sample_ode(sit, normal(2), "euler", 5, y=y)
    assert capsys.readouterr().err == ""


def test_guidance_samples(sit):
    torch.manual_seed(2)
    model = SiT(**TINY, class_dropout_prob=0.1).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    noise, y = normal(2), torch.tensor([0, 2])
    sampler = partial(Interpolant().sample_ode, noise=noise, method="euler", num_steps=4, y=y)
    assert_close(sampler(partial(model.forward_with_cfg, cfg_scale=1.0)), sampler(model), atol=1e-5)
    assert not torch.allclose(sampler(partial(model.forward_with_cfg, cfg_scale=4.0)).xy, sampler(model).xy)


def test_autocast_leaves_state_and_time_float32(sit):
    times = []

    def model(planes, t, y):
        times.append(t.dtype)
        with torch.autocast("cpu", torch.bfloat16):
            output = sit(planes, t, y)
        assert output.xy.dtype == torch.bfloat16
        return output

    y = torch.zeros(1, dtype=torch.long)
    for sample in (
        Interpolant().sample_ode(model, normal(1), "heun3", 3, y=y),
        Interpolant().sample_sde(model, normal(1), "Heun", 3, y=y),
    ):
        assert {plane.dtype for plane in sample} == {torch.float32}
    assert set(times) == {torch.float32}


def test_copies():
    interpolant = Interpolant("VP", "noise", "likelihood")
    assert copy.deepcopy(interpolant) == pickle.loads(pickle.dumps(interpolant)) == interpolant
    assert (interpolant.train_eps, interpolant.sample_eps) == (1e-5, 1e-3)
    assert (Interpolant().train_eps, Interpolant("GVP", "score").train_eps) == (0, 1e-3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Interpolant("linear"), "path is 'linear', expected one of 'Linear', 'GVP', 'VP'"),
        (lambda: Interpolant(prediction="v"), "expected one of 'velocity', 'score', 'noise'"),
        (lambda: Interpolant(loss_weight="none"), "expected one of None, 'velocity', 'likelihood'"),
        (lambda: Interpolant("VP", sample_eps=0), "sample_eps is 0, expected above 0.*--sample-eps"),
        (lambda: Interpolant(train_eps=0.5), "train_eps is 0.5, expected 0 or more and below 0.5.*--train-eps"),
        (lambda: Interpolant().sample_sde(None, normal(1), "euler"), "expected one of 'Euler', 'Heun'"),
        (lambda: Interpolant().sample_sde(None, normal(1), diffusion_form="cos"), "'sigma', 'linear', 'decreasing'"),
        (lambda: Interpolant().sample_sde(None, normal(1), last_step="None"), "'Mean', 'Euler', 'Tweedie', None"),
        (lambda: Interpolant().sample_sde(None, normal(1), last_step_size=1.0), "--last-step-size"),
        (lambda: Interpolant().sample_sde(None, normal(1), num_steps=1), "--num-sampling-steps"),
        (lambda: Interpolant().sample_ode(None, normal(1), num_steps=1), "--num-sampling-steps"),
        (lambda: Interpolant().sample_ode(None, normal(1), "dopri"), "Must be one of .*dopri5.*euler"),
    ],
)
def test_errors_are_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
