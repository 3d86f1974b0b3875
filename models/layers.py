"""Building blocks that several models share."""
import itertools
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.console import print_main


def vit_block(dim: int, num_heads: int, qkv_bias: bool, eps: float, mlp_ratio: float = 4.0) -> Block:
    """timm's pre-norm ViT block with exact GELU. `eps` is explicit: timm's default changed from 1e-5 to 1e-6."""
    norm: Any = partial(nn.LayerNorm, eps=eps)  # timm types it as a class
    return Block(dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, norm_layer=norm)


class Blocks(nn.ModuleList):
    """Blocks that run one after another; the arguments after `x` go to each.

    checkpointing: the backward pass recomputes each block's activations instead of keeping them.
    compiled_on_cpu: whether compiling them gains on a CPU too. Nearly all of a ViT block's time there is in products,
        attention and norms, each of them one kernel anyway.
    """

    checkpointing = False
    compiled_on_cpu = False

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        for block in self:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *args, use_reentrant=False, **kwargs)
            else:
                x = block(x, *args, **kwargs)
        return x


def set_checkpointing(model: nn.Module, enabled: bool) -> None:
    """Switch activation checkpointing of every `Blocks` in `model`."""
    for module in model.modules():
        if isinstance(module, Blocks):
            module.checkpointing = enabled


class Fused(nn.Module):
    """A module of memory-bound operations, which `compile_blocks` compiles whole."""


def compile_blocks(device: torch.device, *models: nn.Module, **options) -> None:
    """Compile every block and every `Fused` of the models in place, so that the names of weights do not change; on a
    CPU only what gains there, and a message where nothing does. Blocks of one kind share compiled code, so the compile
    time does not grow with depth. device: that the models will run on. options: of torch.compile."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # kinds x shapes x modes
    parts: list[nn.Module] = []
    for module in itertools.chain(*(model.modules() for model in models)):
        if isinstance(module, Blocks) and (module.compiled_on_cpu or device.type != "cpu"):
            parts += module
        elif isinstance(module, Fused):
            parts.append(module)
    for part in parts:
        part.compile(dynamic=False, **options)
    if not parts:
        print_main("--compile has no effect: nothing of this model gains by it on a CPU")


class TubeletEmbedding(nn.Conv3d):
    """A 3-D convolution whose stride equals its kernel, computed as a matrix product: cuDNN takes many times as long
    for the gradient of the weights."""

    def __init__(self, in_channels: int, dim: int, size: tuple[int, int, int]):
        super().__init__(in_channels, dim, size, stride=size)

    def forward(self, video: Tensor) -> Tensor:
        """video: (B, C, T, H, W), multiples of the tubelet's size. Returns (B, L, D) in t, h, w order."""
        t, h, w = self.kernel_size
        tubelets = rearrange(video, "b c (t p) (h q) (w r) -> b (t h w) (c p q r)", p=t, q=h, r=w)
        return F.linear(tubelets, self.weight.flatten(1), self.bias)


def sincos_1d(dim: int, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Sinusoidal position table, sin half before cos half.

    dim: even width. positions: (N,) any real dtype. Returns (N, dim) float32, computed in float64.
    """
    if dim % 2:
        raise ValueError(f"a sin-cos table needs an even width, got {dim}")
    omega = base ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = positions.to(torch.float64)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def sincos_2d(dim: int, height: int, width: int, base: float = 10000.0) -> Tensor:
    """(height * width, dim) float32 table of a grid in h, w order: the first half of the width encodes w, the second h
    (as in MAE, arXiv 2111.06377). `dim` is a multiple of four."""
    if dim % 4:
        raise ValueError(f"a 2-D sin-cos table needs a width that is a multiple of 4, got {dim}")
    h, w = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([sincos_1d(dim // 2, w.flatten(), base), sincos_1d(dim // 2, h.flatten(), base)], dim=1)


def sincos_3d(dim: int, frames: int, height: int, width: int, base: float = 10000.0) -> Tensor:
    """(frames * height * width, dim) float32 table in t, h, w order: the 2-D table plus the full-width 1-D table of t,
    added (LARP, arXiv 2410.21264)."""
    space = sincos_2d(dim, height, width, base)
    time = sincos_1d(dim, torch.arange(frames), base)
    return (time[:, None] + space[None]).flatten(0, 1)
