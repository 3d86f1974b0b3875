"""Precision, optimisers, schedules and the moving average of weights."""
import contextlib
import copy
import math

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast and loss scaling of one run. `auto` is bf16 where a GPU has it, else fp32."""

    def __init__(self, name: str, device: torch.device):
        if name == "auto":
            name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
        self.name, self.device = name, device
        # Only fp16 has too small an exponent for gradients; a disabled scaler passes everything through.
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.name])


def adamw(groups, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.AdamW:
    """AdamW with the fused kernel. groups: parameters, or parameter groups."""
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, betas=betas, fused=True)


def cosine_with_warmup(step: int, warmup: int, total: int, floor: float) -> float:
    """Multiplier of the learning rate: linear from `floor` to 1 over `warmup` steps, then a half cosine back."""
    if step < warmup:
        return floor + (1 - floor) * step / warmup
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2


class EMA:
    """Exponential moving average of a model's parameters, in a copy that starts equal and is never trained."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - self.decay)
        for mine, live in zip(self.model.buffers(), model.buffers()):
            mine.copy_(live)
