"""Precision, optimizers, schedules and the moving average of weights."""
import contextlib
import copy
import math

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast and loss scaling of a run. `auto` is bf16 on a GPU that supports it, else fp32."""

    def __init__(self, name: str, device: torch.device):
        if name == "auto":
            name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
        self.name, self.device = name, device
        self.scaler = self.make_scaler()

    def make_scaler(self) -> torch.amp.GradScaler:
        """A loss scaler for one optimizer. Each optimizer needs its own, since a scaler lowers its scale when the
        gradients of its optimizer overflow. It is disabled, and does nothing, unless the precision is fp16, whose
        exponents are too small for gradients."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.name])


def trained(groups) -> list:
    """Parameters, or parameter groups, without the frozen ones, which get no states."""
    kept = [{**one, "params": [p for p in one["params"] if p.requires_grad]} if isinstance(one, dict) else one
            for one in groups]
    return [one for one in kept if isinstance(one, dict) or one.requires_grad]


def adamw(groups, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.AdamW:
    """AdamW with the fused kernel. groups: parameters, or parameter groups; frozen ones are left out."""
    return torch.optim.AdamW(trained(groups), lr=lr, weight_decay=weight_decay, betas=betas, fused=True)


def adam(groups, lr: float, betas: tuple[float, float]) -> torch.optim.Adam:
    """Adam with the fused kernel. groups: parameters, or parameter groups; frozen ones are left out."""
    return torch.optim.Adam(trained(groups), lr=lr, betas=betas, fused=True)


def groups_by_name(model: nn.Module, lr: float, multipliers: dict[str, float]) -> list[dict]:
    """Parameter groups by learning rate: `lr` times the value of the key in `multipliers` that a parameter's name
    starts with, or `lr` if there is none.

    The released LARP trainer sets every group to the base rate at each step, so its prior_lr_mult has no effect; here
    it has (see `set_rates`).
    """
    named = dict(model.named_parameters())
    groups = []
    for prefix, multiplier in [*multipliers.items(), ("", 1.0)]:
        chosen = [named.pop(name) for name in list(named) if name.startswith(prefix)]
        if chosen:
            groups.append({"params": chosen, "lr": lr * multiplier})
    return groups


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: the weights of linear layers decay; embeddings, positions, norms and biases do not."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decayed = [p for p in model.parameters() if id(p) in linear]
    others = [p for p in model.parameters() if id(p) not in linear]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def set_rates(optimizer: torch.optim.Optimizer, rates: list[float], multiplier: float) -> None:
    """Set the learning rate of each group to its base rate in `rates` times `multiplier`."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * multiplier


def update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_norm: float = 0.0) -> None:
    """One optimizer step on the gradients of a scaled loss, clipped to the norm `max_norm` (0: no clipping). The
    gradients are freed afterwards."""
    if max_norm > 0:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def ramp(step: int, steps: int, start: float, end: float) -> float:
    """Linear from `start` to `end` over `steps` steps, then constant."""
    return end if step >= steps else start + (end - start) * step / steps


def cosine_with_warmup(step: int, warmup: int, total: int, floor: float) -> float:
    """Multiplier of the learning rate: linear from `floor` to 1 over `warmup` steps, then a half cosine back."""
    if step < warmup:
        return floor + (1 - floor) * step / warmup
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2


class EMA:
    """Exponential moving average of a model's parameters, in a copy that starts equal and is never trained.

    torch.optim.swa_utils.AveragedModel would change checkpoints and numbers: it saves the weights under "module." with
    a counter beside them, and its first update copies the weights instead of averaging them.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - self.decay)
        for mine, live in zip(self.model.buffers(), model.buffers()):
            mine.copy_(live)
