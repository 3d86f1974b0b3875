"""Stochastic interpolants between noise and planes: paths, training loss, ODE and SDE samplers, likelihood.

SiT: arXiv 2401.08740. t = 0 is noise x0 ~ N(0, 1), t = 1 data x1, and x_t = alpha(t) x1 + sigma(t) x0. Formulas are
written for one tensor and mapped over the planes. A model here is any callable model(planes, t, **kwargs) -> Planes
that predicts the velocity, the score or the noise; t is (B,), float32 or float64 also under autocast. Guidance comes
in as the model: partial(sit.forward_with_cfg, cfg_scale=4.0).
"""
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.console import Progress
from models.configs import LAST_STEPS, PREDICTIONS
from models.triplane import Planes


class Coefficients(NamedTuple):
    """Coefficients of a path at times t, shaped as t. d_ marks the derivative by t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def wronskian(self) -> Tensor:
        """alpha' sigma - alpha sigma'. It is finite and positive also where the ratios of the usual formulas, alpha /
        alpha' and alpha' / alpha, are not. The paper's D0 is sigma wronskian / alpha."""
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma


def linear_path(t: Tensor) -> Coefficients:
    return Coefficients(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))


def gvp_path(t: Tensor) -> Coefficients:
    """Generalised variance preserving: alpha^2 + sigma^2 = 1, at constant angular speed."""
    angle, speed = t * math.pi / 2, math.pi / 2
    return Coefficients(angle.sin(), angle.cos(), speed * angle.cos(), -speed * angle.sin())


def vp_path(t: Tensor, beta_min: float = 0.1, beta_max: float = 20.0) -> Coefficients:
    """Variance preserving, the linear beta schedule of score SDEs (arXiv 2011.13456). sigma' is infinite at t = 1."""
    s = 1 - t
    log_alpha = -(s**2) * (beta_max - beta_min) / 4 - s * beta_min / 2
    d_log_alpha = s * (beta_max - beta_min) / 2 + beta_min / 2
    alpha = log_alpha.exp()
    sigma = (-torch.expm1(2 * log_alpha)).sqrt()  # sqrt(1 - alpha^2), without its cancellation near t = 1
    return Coefficients(alpha, sigma, alpha * d_log_alpha, -(alpha**2) * d_log_alpha / sigma)


def to_velocity(prediction: str, output: Tensor, x: Tensor, c: Coefficients) -> Tensor:
    """The velocity E[alpha' x1 + sigma' x0 | x_t = x] that a prediction implies (SiT, section 2)."""
    if prediction == "velocity":
        return output
    if prediction == "score":
        return (c.d_alpha * x + c.sigma * c.wronskian * output) / c.alpha
    return (c.d_alpha * x - c.wronskian * output) / c.alpha


def to_score(prediction: str, output: Tensor, x: Tensor, c: Coefficients) -> Tensor:
    """The score, the gradient of log p_t at x, that a prediction implies (SiT, section 2)."""
    if prediction == "score":
        return output
    if prediction == "noise":
        return -output / c.sigma
    return (c.alpha * output - c.d_alpha * x) / (c.sigma * c.wronskian)


def euler_maruyama_step(drift: Callable, x: Planes, kick: Planes, t: float, dt: float) -> Planes:
    """Euler-Maruyama: one drift. kick: sqrt(2 D dt) times standard normal noise."""
    return x.map(lambda x, f, k: x + dt * f + k, drift(x, t), kick)


def heun_step(drift: Callable, x: Planes, kick: Planes, t: float, dt: float) -> Planes:
    """Stochastic Heun: the noise first, then the trapezoidal rule, as SiT: two drifts."""
    x = x.map(torch.add, kick)
    first = drift(x, t)
    second = drift(x.map(lambda x, f: x + dt * f, first), t + dt)
    return x.map(lambda x, f, g: x + dt * (f + g) / 2, first, second)


PATHS = {"Linear": linear_path, "GVP": gvp_path, "VP": vp_path}

LOSS_WEIGHTS = {
    None: lambda c: 1.0,
    "velocity": lambda c: (c.wronskian / c.alpha) ** 2,  # (D0 / sigma)^2
    "likelihood": lambda c: c.wronskian / (c.alpha * c.sigma),  # D0 / sigma^2
}

# D(t) of the SDE, before the norm n; "decreasing" takes the norm inside. Any D >= 0 has the same marginals.
DIFFUSION_FORMS = {
    "constant": lambda t, c, n: n * torch.ones_like(t),
    "SBDM": lambda t, c, n: n * c.sigma * c.wronskian / c.alpha.clamp_min(1e-9),  # D0, infinite at alpha = 0
    "sigma": lambda t, c, n: n * c.sigma,
    "linear": lambda t, c, n: n * (1 - t),
    "decreasing": lambda t, c, n: (n * torch.cos(math.pi * t) + 1) ** 2 / 4,
    "increasing-decreasing": lambda t, c, n: n * torch.sin(math.pi * t) ** 2,
}

SDE_METHODS = {"Euler": euler_maruyama_step, "Heun": heun_step}

# Solvers that treat each sample independently. Adaptive ones choose one step size for the whole batch; implicit_adams
# iterates until the whole batch has converged.
INDEPENDENT = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams")

MAX_STEPS = 10_000  # of an adaptive method: hundreds of times what usual tolerances take

FIXED_GRID = (*INDEPENDENT, "implicit_adams", "fixed_adams")

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


def _check(name: str, value: Any, allowed: Iterable) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")


def check_sde(
    method: str = "Euler", num_steps: int = 250, diffusion_form: str = "sigma", diffusion_norm: float = 1.0,
    last_step: str | None = "Mean", last_step_size: float = 0.04,
) -> None:
    """ValueError where `Interpolant.sample_sde` does not take these settings."""
    _check("method", method, SDE_METHODS)
    _check("diffusion_form", diffusion_form, DIFFUSION_FORMS)
    _check("last_step", last_step, LAST_STEPS)
    if num_steps < 2 or not 0 <= last_step_size < 1 or diffusion_norm < 0:
        raise ValueError(
            f"num_steps {num_steps}, last_step_size {last_step_size}, diffusion_norm {diffusion_norm}: expected "
            "2 or more, [0, 1), 0 or more: change --num-sampling-steps (in training "
            "--val_sampling_steps), --last-step-size or --diffusion-norm"
        )


@dataclass(frozen=True)
class Interpolant:
    """A path, what the model predicts, and how losses are weighted.

    loss_weight acts on score and noise predictions; a velocity's weight is always 1.
    train_eps, sample_eps: margins. Times are drawn and integrated on [eps, 1 - eps] (VP: [0, 1 - eps]), because score
        and noise predictions are divided by alpha and sigma, which vanish at the ends, and VP's velocity target is
        infinite at t = 1. None: 0 for the velocity on Linear and GVP; else 1e-3, but 1e-5 to train with VP.
    """

    path: str = "Linear"
    prediction: str = "velocity"
    loss_weight: str | None = None
    train_eps: float | None = None
    sample_eps: float | None = None

    def __post_init__(self):
        _check("path", self.path, PATHS)
        _check("prediction", self.prediction, PREDICTIONS)
        _check("loss_weight", self.loss_weight, LOSS_WEIGHTS)
        for name, default in (("train_eps", 1e-5 if self.path == "VP" else 1e-3), ("sample_eps", 1e-3)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default if self._singular else 0.0)
            eps = getattr(self, name)
            if not 0 <= eps < 0.5 or (self._singular and eps == 0):
                raise ValueError(
                    f"{name} is {eps}, expected {'above 0' if self._singular else '0 or more'} and below 0.5 for the "
                    f"{self.prediction} on the {self.path} path: change --{name.replace('_', '-')}"
                )

    @property
    def _singular(self) -> bool:
        """Whether a formula divides by 0 at an end of [0, 1]."""
        return self.path == "VP" or self.prediction != "velocity"

    def _interval(self, eps: float | None) -> tuple[float, float]:
        assert eps is not None  # set in __post_init__
        return (0.0 if self.path == "VP" else eps), 1 - eps

    def interpolate(self, x1: Planes, x0: Planes, t: Tensor) -> tuple[Planes, Planes]:
        """x_t and its velocity alpha' x1 + sigma' x0, for data x1, noise x0 and (B,) times."""
        c = PATHS[self.path](t[:, None, None, None])  # (B, 1, 1, 1), to broadcast over a plane
        x0 = Planes(*x0)
        xt = x0.map(lambda noise, data: c.alpha * data + c.sigma * noise, x1)
        return xt, x0.map(lambda noise, data: c.d_alpha * data + c.d_sigma * noise, x1)

    def training_times(self, uniform: Tensor) -> Tensor:
        """(B,) numbers in [0, 1] to times between the training margins."""
        low, high = self._interval(self.train_eps)
        return low + (high - low) * uniform

    def loss(
        self,
        model: Callable[..., Planes],
        planes: Planes,
        t: Tensor | None = None,
        noise: Planes | None = None,
        generator: torch.Generator | None = None,
        **model_kwargs,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Regression loss, the mean over each plane and then over the three.

        planes: data, (B, C, R, R) each. t: (B,) times, clamped to the margins; drawn uniformly between them if None.
        noise: shaped as planes; drawn if None. generator: for both draws, on the planes' device; None is torch's own.
        Returns (B,) losses, one a sample, and detached scalars: the mean loss of each plane.
        """
        planes = Planes(*planes)
        # At least float32: the 8 bits of bfloat16 are too few to distinguish times.
        dtype = torch.promote_types(planes.xy.dtype, torch.float32)
        if t is None:
            t = self.training_times(
                torch.rand(len(planes.xy), generator=generator, device=planes.xy.device, dtype=dtype)
            )
        t = t.to(dtype).clamp(*self._interval(self.train_eps))
        if noise is None:
            noise = planes.map(lambda x: torch.randn(x.shape, generator=generator, device=x.device, dtype=dtype))
        xt, velocity = self.interpolate(planes, noise, t)
        output = Planes(*model(xt, t, **model_kwargs))
        c = PATHS[self.path](t[:, None, None, None])
        if self.prediction == "velocity":
            errors = output.map(lambda out, target: (out - target) ** 2, velocity)
        else:
            weight = LOSS_WEIGHTS[self.loss_weight](c)
            if self.prediction == "score":  # of p(x_t | x1): -x0 / sigma
                errors = output.map(lambda out, x0: weight * (c.sigma * out + x0) ** 2, noise)
            else:
                errors = output.map(lambda out, x0: weight * (out - x0) ** 2, noise)
        by_plane = errors.map(lambda error: error.mean(dim=(1, 2, 3)))  # (B,) each
        logs = {f"loss_{name}": loss.detach().mean() for name, loss in by_plane._asdict().items()}
        return torch.stack(by_plane).mean(dim=0), logs

    @torch.no_grad()
    def sample_ode(
        self,
        model: Callable[..., Planes],
        noise: Planes,
        method: str = "dopri5",
        num_steps: int = 250,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        reverse: bool = False,
        coupled: bool = False,
        options: dict | None = None,
        progress: bool = False,
        **model_kwargs,
    ) -> Planes:
        """Solve the probability flow dx = v dt from noise to data, or with `reverse` from data to noise.

        noise: start of the integration, (B, C, R, R) each, float32 or float64.
        method, atol, rtol, options: of torchdiffeq.odeint. Fixed-step methods take num_steps - 1 steps; adaptive ones
            choose their own and ignore num_steps.
        coupled: methods with a common step size or stopping rule solve the batch as one system: quicker, but a sample
            then depends on its neighbours. By default they solve one sample at a time; fixed steps always batch.
        progress: show a bar of network calls. model_kwargs: to the model; tensors hold one row a sample.
        Returns planes shaped as noise.
        """
        noise = Planes(*noise)

        def field(t: Tensor, x: tuple[Tensor, ...], rows: slice) -> Planes:
            return self._velocity(model, Planes(*x), t, _take(model_kwargs, rows))

        return Planes(*self._solve(field, noise, reverse, method, num_steps, atol, rtol, coupled, options, progress))

    def likelihood(
        self,
        model: Callable[..., Planes],
        planes: Planes,
        method: str = "dopri5",
        num_steps: int = 250,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        coupled: bool = False,
        options: dict | None = None,
        probe: Planes | None = None,
        progress: bool = False,
        **model_kwargs,
    ) -> Tensor:
        """Log-density of data under the probability flow, in nats, summed over all values of a sample's planes.

        log p(x1) = log N(x0; 0, 1) - integral of div v over t (arXiv 2011.13456, section 4.3), the divergence by
        Hutchinson's estimator e . (dv/dx) e with one probe e a sample, kept along the trajectory (FFJORD,
        arXiv 1810.01367). The planes are those that the model was trained on: standardising them adds its own term.

        probe: random signs shaped as planes; drawn if None. Others as `sample_ode`. Returns (B,).
        """
        planes = Planes(*planes).map(torch.detach)
        if probe is None:
            probe = planes.map(lambda x: torch.randint_like(x, 2) * 2 - 1)

        def field(t: Tensor, state: tuple[Tensor, ...], rows: slice) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                x = Planes(*state[:3]).map(lambda plane: plane.detach().requires_grad_())
                velocity = self._velocity(model, x, t, _take(model_kwargs, rows))
                signs = Planes(*(plane[rows] for plane in probe))
                gradients = torch.autograd.grad(velocity, x, signs)
            xy, yt, xt = ((g * e).flatten(1).sum(dim=1) for g, e in zip(gradients, signs))
            divergence = xy + yt + xt
            return *(plane.detach() for plane in velocity), divergence

        start = (*planes, planes.xy.new_zeros(len(planes.xy)))
        with torch.no_grad():
            *noise, change = self._solve(field, start, True, method, num_steps, atol, rtol, coupled, options, progress)
            log_normal = (-(plane**2 + math.log(2 * math.pi)) / 2 for plane in noise)
            return change + sum(values.flatten(1).sum(dim=1) for values in log_normal)

    @torch.no_grad()
    def sample_sde(
        self,
        model: Callable[..., Planes],
        noise: Planes,
        method: str = "Euler",
        num_steps: int = 250,
        diffusion_form: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: str | None = "Mean",
        last_step_size: float = 0.04,
        step_noise: Callable[[int, Planes], Planes] | None = None,
        progress: bool = False,
        **model_kwargs,
    ) -> Planes:
        """Solve dx = (v + D s) dt + sqrt(2 D) dW from noise to data. Velocity v and score s come from one network call;
        the released code makes two.

        noise: (B, C, R, R) each, float32 or float64. num_steps: time points, so num_steps - 1 solver steps.
        method: "Euler" (Maruyama), one network call a step, or "Heun", two. diffusion_form, diffusion_norm: D(t).
        last_step: from t = 1 - last_step_size to 1 without noise. "Mean" x + h (v + D s), "Euler" x + h v, "Tweedie"
            E[x1 | x], None stops there, with last_step_size taken as 0.
        step_noise: (step, planes) -> standard normal planes of that shape: see `noise_stream`. None draws from torch's
            global generator.
        progress: show a bar of solver steps. model_kwargs: to the model.
        Returns planes shaped as noise.

        The score is singular at t = 1, where sigma is 0: solver and last step keep sample_eps, or 1e-3 where that is 0,
        away from it. SBDM's D is infinite at t = 0 of Linear and GVP. Any D >= 0 has the same marginals, so it is kept
        to 1 / dt, beyond which explicit steps overshoot; other forms are taken as they are.
        """
        check_sde(method, num_steps, diffusion_form, diffusion_norm, last_step, last_step_size)
        x = Planes(*noise)
        h = max(last_step_size if last_step else 0.0, self.sample_eps or 1e-3)
        low, _ = self._interval(self.sample_eps)
        dt = (1 - h - low) / (num_steps - 1)

        def coefficients(time: float) -> tuple[Coefficients, Tensor]:
            """Of the path, and D, as CPU scalars: they need neither the device nor a wait for it."""
            t = torch.tensor(time, dtype=torch.float64)
            c = PATHS[self.path](t)
            diffusion = DIFFUSION_FORMS[diffusion_form](t, c, diffusion_norm)
            return c, diffusion.clamp(max=1 / dt) if diffusion_form == "SBDM" else diffusion

        def fields(x: Planes, time: float, c: Coefficients) -> tuple[Planes, Planes]:
            """(v, s) at x, from one network call."""
            t = torch.full((len(x.xy),), time, dtype=x.xy.dtype, device=x.xy.device)
            output = _call(model, x, t, model_kwargs)
            velocity = output.map(lambda out, x: to_velocity(self.prediction, out, x, c), x)
            return velocity, output.map(lambda out, x: to_score(self.prediction, out, x, c), x)

        def drift(x: Planes, time: float) -> Planes:
            c, diffusion = coefficients(time)
            velocity, score = fields(x, time, c)
            return velocity.map(lambda v, s: v + diffusion * s, score)

        for step in Progress(range(num_steps - 1), desc=f"SDE {method}", disable=not progress):
            time = low + step * dt
            _, diffusion = coefficients(time)
            scale = math.sqrt(2 * diffusion * dt)
            dw = x.map(torch.randn_like) if step_noise is None else step_noise(step, x)
            x = SDE_METHODS[method](drift, x, Planes(*(scale * w for w in dw)), time, dt)
        if last_step is None:
            return x
        c, diffusion = coefficients(1 - h)
        velocity, score = fields(x, 1 - h, c)
        if last_step == "Mean":
            return x.map(lambda x, v, s: x + h * (v + diffusion * s), velocity, score)
        if last_step == "Euler":
            return x.map(lambda x, v: x + h * v, velocity)
        return x.map(lambda x, s: (x + c.sigma**2 * s) / c.alpha, score)

    def _solve(
        self,
        field: Callable[[Tensor, tuple[Tensor, ...], slice], tuple[Tensor, ...]],
        state: tuple[Tensor, ...],
        reverse: bool,
        method: str,
        num_steps: int,
        atol: float,
        rtol: float,
        coupled: bool,
        options: dict | None,
        progress: bool,
    ) -> tuple[Tensor, ...]:
        """`state` taken from noise to data or back; field(t, state, rows) is its derivative for the samples `rows`."""
        from torchdiffeq import odeint  # here, since it imports scipy.integrate: half a second of every command's start

        if num_steps < 2:
            raise ValueError(f"num_steps is {num_steps}, expected at least 2 time points: change --num-sampling-steps")
        low, high = self._interval(self.sample_eps)
        ends = (high, low) if reverse else (low, high)
        times = torch.linspace(*ends, num_steps, dtype=state[0].dtype, device=state[0].device)
        options = dict(options or {})
        if method in FIXED_GRID:
            # Only the ends are asked for: torchdiffeq keeps the state at every requested time.
            options.setdefault("grid_constructor", lambda func, state, ends: times)
        elif method in ADAPTIVE:
            options.setdefault("max_num_steps", MAX_STEPS)
        if method in ADAPTIVE and self._singular:
            # These step past the end and interpolate back, here into the singularity; step_t makes them stop there.
            options.setdefault("step_t", times[-1:])
        together = coupled or method in INDEPENDENT
        solved = []
        with Progress(desc=f"ODE {method}", unit="call", disable=not progress) as bar:
            for rows in [slice(None)] if together else [slice(i, i + 1) for i in range(len(state[0]))]:

                def counted(t: Tensor, part: tuple[Tensor, ...], rows: slice = rows) -> tuple[Tensor, ...]:
                    bar.update()
                    return field(t, part, rows)

                # A tuple, not one long vector: torchdiffeq's error norm is the largest over the planes.
                start = tuple(part[rows] for part in state)
                try:
                    path = odeint(counted, start, times[[0, -1]], atol=atol, rtol=rtol, method=method, options=options)
                except AssertionError as error:  # torchdiffeq's: too many steps, steps of no length, or NaN
                    reason = str(error).splitlines()[0]
                    raise ValueError(f"{method} cannot solve the ODE to atol {atol} and rtol {rtol} ({reason}): raise "
                                     "--atol or --rtol, or where values are not finite give other weights") from error
                solved.append([part[-1] for part in path])
        return tuple(torch.cat(parts) for parts in zip(*solved))

    def _velocity(self, model: Callable[..., Planes], x: Planes, t: Tensor, kwargs: dict) -> Planes:
        """At one time for the whole batch: t is a scalar tensor."""
        output = _call(model, x, t.repeat(len(x.xy)), kwargs)
        c = PATHS[self.path](t)
        return output.map(lambda out, x: to_velocity(self.prediction, out, x, c), x)


def _call(model: Callable[..., Planes], x: Planes, t: Tensor, kwargs: dict) -> Planes:
    """The network's output in the solver's dtype: under autocast it is narrower."""
    return Planes(*model(x, t, **kwargs)).map(lambda out, x: out.to(x.dtype), x)


def _take(kwargs: dict, rows: slice) -> dict:
    """The rows of a batch's tensors and planes; other values are common to the batch."""

    def take(value: Any) -> Any:
        if isinstance(value, Planes):
            return value.map(lambda plane: plane[rows])
        return value[rows] if isinstance(value, Tensor) and value.ndim else value

    return {name: take(value) for name, value in kwargs.items()}


def draw_noise(generators: list[torch.Generator], shapes: Iterable[tuple[int, ...]]) -> Planes:
    """Standard normal planes, (B, *shape) float32 each; row i from generator i, in one draw for its three planes."""
    shapes = [tuple(shape) for shape in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    rows = torch.stack([torch.randn(sum(sizes), generator=g, device=g.device) for g in generators])
    return Planes(*(row.unflatten(1, shape) for row, shape in zip(rows.split(sizes, dim=1), shapes)))


def noise_stream(generators: list[torch.Generator]) -> Callable[[int, Planes], Planes]:
    """`step_noise` for `Interpolant.sample_sde` that draws from one generator for each sample, so that the noise of
    sample i does not depend on its batch."""
    return partial(_next_noise, generators)


def _next_noise(generators: list[torch.Generator], step: int, planes: Planes) -> Planes:
    noise = draw_noise(generators, (plane.shape[1:] for plane in planes))
    return noise.map(lambda noise, plane: noise.to(plane, non_blocking=True), planes)
