"""SiT on CoordTok's planes: a diffusion transformer whose input and output are the three coordinate planes of a clip.

SiT: arXiv 2401.08740; on planes: CoordTok, arXiv 2411.14762, section 3.3. Shapes: B batch, C channels of a plane,
R_t and R_xy its resolutions, p patch size, D width, N = N_xy + 2 N_t tokens with N_xy = (R_xy/p)^2 and
N_t = R_t R_xy / p^2. Module names are those of the released weights.
"""
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from models.configs import SiTConfig
from models.hub import Pretrained, Stored, one_version
from models.inputs import check_integers
from models.interpolant import Interpolant
from models.layers import Blocks, sincos_2d
from models.pretrained import read_released, read_sit_statistics
from models.triplane import Planes


def timestep_sinusoids(t: Tensor, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """(B,) times -> (B, dim) sinusoids, cos half before sin half, dtype of `t`.

    Products and cosines only: autocast leaves them in t's float32. In bfloat16 neighbouring times would be equal.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=t.device, dtype=t.dtype))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int, num_sinusoids: int = 256):
        super().__init__()
        self.num_sinusoids = num_sinusoids
        self.mlp = nn.Sequential(nn.Linear(num_sinusoids, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) raw times in [0, 1] -> (B, D)."""
        first: Any = self.mlp[0]
        return self.mlp(timestep_sinusoids(t, self.num_sinusoids).to(first.weight.dtype))


class LabelEmbedder(nn.Module):
    """A table of classes; with dropout its last row stands for "no label"."""

    def __init__(self, num_classes: int, dim: int, dropout_prob: float):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), dim)

    def forward(self, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """(B,) long labels, (B,) bool of those to hide -> (B, D). See `SiT.forward`."""
        if drop is not None and self.dropout_prob == 0:
            raise ValueError("labels cannot be dropped: this SiT has no 'no label' row (class_dropout_prob is 0)")
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(len(y), device=y.device) < self.dropout_prob
        if drop is not None:
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(B, N, D) scaled and shifted by (B, D) each."""
    return x * (1 + scale[:, None]) + shift[:, None]


class SiTBlock(nn.Module):
    """Pre-norm transformer block conditioned by adaLN-zero (DiT, arXiv 2212.09748)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        tanh_gelu: Any = partial(nn.GELU, approximate="tanh")  # timm types it as a class
        self.mlp = Mlp(dim, 4 * dim, act_layer=tanh_gelu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D), c (B, D) -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens to the values of their patches, conditioned by adaLN."""

    def __init__(self, dim: int, patch_size: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D), c (B, D) -> (B, N, p p channels), order p, p, channels."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


# The flags that decide a tensor's shape, by the start of its name.
FLAGS_BEHIND = {
    "x_embedder": "model, latent_n_features",
    "final_layer": "model, latent_n_features",
    "pos_embed": "model, latent_resolution_xy, latent_resolution_t",
    "y_embedder": "num_classes, class_dropout_prob",
    "blocks": "model",
}


class SiT(Pretrained):
    """SiT over the tokens of three planes. Keyword arguments are the fields of `SiTConfig`. Of a trained one, `facts`
    hold the settings of its interpolant, the statistics of its latents, class names and its tokenizer's hash."""

    kind = "sit"
    default_version = "ema"
    behind = FLAGS_BEHIND

    def __init__(self, **config):
        super().__init__()
        self.config = cfg = SiTConfig(**config)
        p, dim = cfg.patch_size, cfg.hidden_size
        r_t, r_xy = cfg.input_size
        channels = cfg.in_channels * (2 if cfg.learn_sigma else 1)

        self.x_embedder_xy = PatchEmbed((r_xy, r_xy), p, cfg.in_channels, dim)
        self.x_embedder_yt = PatchEmbed((r_t, r_xy), p, cfg.in_channels, dim)
        self.x_embedder_xt = PatchEmbed((r_t, r_xy), p, cfg.in_channels, dim)
        self.register_buffer("pos_embed_xy", sincos_2d(dim, r_xy // p, r_xy // p)[None])
        self.pos_embed_t = nn.Parameter(torch.empty(1, (r_t // p) * (r_xy // p), dim))  # yt and xt share it
        self.type_embed = nn.Parameter(torch.empty(1, 3, dim))  # which plane
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(cfg.num_classes, dim, cfg.class_dropout_prob)
        self.blocks = Blocks(SiTBlock(dim, cfg.num_heads) for _ in range(cfg.depth))
        self.final_layer_xy = FinalLayer(dim, p, channels)
        self.final_layer_yt = FinalLayer(dim, p, channels)
        self.final_layer_xt = FinalLayer(dim, p, channels)
        self.initialize_weights()

    @property
    def plane_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(C, height, width) of each plane."""
        r_t, r_xy = self.config.input_size
        return tuple((self.config.in_channels, rows, r_xy) for rows in (r_xy, r_t, r_t))

    def initialize_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedder in (self.x_embedder_xy, self.x_embedder_yt, self.x_embedder_xt):
            nn.init.xavier_uniform_(embedder.proj.weight.view(self.config.hidden_size, -1))  # the linear layer it is
            nn.init.zeros_(embedder.proj.bias)
        nn.init.zeros_(self.pos_embed_t)
        nn.init.normal_(self.type_embed)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        # adaLN-zero: every block starts as the identity, and the model as the constant 0.
        finals = (self.final_layer_xy, self.final_layer_yt, self.final_layer_xt)
        for layer in [m.adaLN_modulation[-1] for m in (*self.blocks, *finals)] + [final.linear for final in finals]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, planes: Planes, t: Tensor, y: Tensor, drop: Tensor | None = None) -> Planes:
        """The prediction (the velocity, unless trained for another) at noisy planes.

        planes: xy (B, C, R_xy, R_xy), yt and xt (B, C, R_t, R_xy), standardised latents with noise.
        t: (B,) float32 or float64 in [0, 1]; 0 is noise, 1 data.
        y: (B,) long labels below num_classes (num_classes itself is "no label", where the model has dropout).
        drop: (B,) bool, the labels to hide; None draws them with class_dropout_prob in training mode from torch's
            global generator, and hides none in evaluation mode.
        Returns planes shaped as given. Raises ValueError on planes of other sizes.
        """
        for name, plane, shape in zip(Planes._fields, planes, self.plane_shapes):
            if plane.shape[1:] != shape:
                raise ValueError(
                    f"plane {name} is {tuple(plane.shape)}, this SiT expects (batch, {', '.join(map(str, shape))}): "
                    "its tokenizer must have the same latent resolutions and channels"
                )
        if not self.training:
            check_integers("labels", y, self.config.num_classes + (self.config.class_dropout_prob > 0))
        xy, yt, xt = planes                                                              # (B, C, R, R_xy)
        type_xy, type_yt, type_xt = self.type_embed.split(1, dim=1)                      # (1, 1, D)
        xy = self.x_embedder_xy(xy) + self.pos_embed_xy + type_xy                        # (B, N_xy, D)
        yt = self.x_embedder_yt(yt) + self.pos_embed_t + type_yt                         # (B, N_t, D)
        xt = self.x_embedder_xt(xt) + self.pos_embed_t + type_xt                         # (B, N_t, D)
        sizes = [xy.shape[1], yt.shape[1], xt.shape[1]]
        x = torch.cat([xy, yt, xt], dim=1)                                               # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y, drop)                                # (B, D)
        x = self.blocks(x, c)                                                            # (B, N, D)
        xy, yt, xt = x.split(sizes, dim=1)                                               # (B, N_xy or N_t, D)
        xy = self.final_layer_xy(xy, c)                                                  # (B, N_xy, p p C or 2C)
        yt = self.final_layer_yt(yt, c)                                                  # (B, N_t, p p C or 2C)
        xt = self.final_layer_xt(xt, c)                                                  # (B, N_t, p p C or 2C)
        return Planes(xy, yt, xt).map(self._unpatchify, self.plane_shapes)               # (B, C, R, R_xy)

    def _unpatchify(self, tokens: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """(B, N, p p C or 2C) -> (B, C, height, width); the second half of the channels (learn_sigma) is dropped."""
        p = self.config.patch_size
        plane = rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=shape[1] // p, p=p, q=p)
        return plane[:, : shape[0]]

    def forward_with_cfg(
        self, planes: Planes, t: Tensor, y: Tensor, cfg_scale: float, interval: tuple[float, float] = (0.0, 1.0)
    ) -> Planes:
        """Classifier-free guidance (arXiv 2207.12598), uncond + cfg_scale (cond - uncond), from one network call on the
        doubled batch. Where t lies outside `interval` (arXiv 2404.07724) the result is the conditional one.

        planes, t, y, returns: as `forward`. Raises ValueError where the model was trained without label dropout.
        """
        self.check_guidance(cfg_scale)
        unlabelled = torch.full_like(y, self.config.num_classes)
        doubled = Planes(*(torch.cat([plane, plane]) for plane in planes))
        output = self(doubled, torch.cat([t, t]), torch.cat([y, unlabelled]))
        # A tensor, not a branch: reading t on the host would wait for the device at every step.
        scale = torch.where((interval[0] <= t) & (t <= interval[1]), cfg_scale, 1.0)[:, None, None, None]
        halves = (plane.chunk(2) for plane in output)
        return Planes(*(without + scale * (with_label - without) for with_label, without in halves))

    def check_guidance(self, cfg_scale: float) -> None:
        """ValueError where a scale asks for guidance, and the model was trained without label dropout."""
        if cfg_scale != 1 and self.config.class_dropout_prob == 0:
            raise ValueError(
                f"cfg_scale {cfg_scale} needs a SiT trained with --class_dropout_prob above 0, this one has 0: "
                "leave guidance off"
            )

    @classmethod
    def from_released(cls, path: str | Path, **config) -> "SiT":
        """The EMA weights of the authors' .pt file, in evaluation mode. `config` as in `SiTConfig`, whose defaults are
        the released model's. Raises ValueError, naming the first tensors, where file and architecture disagree.

        The statistics that standardise its latents are in the log.txt of the run: see models/pretrained.py.
        """
        return cls.from_stored(Stored(*cls.read_authors(path), Path(path)), config)

    @staticmethod
    def read_authors(path: str | Path, version: str = "ema") -> tuple[None, dict[str, Tensor], dict]:
        """(None: the file has no architecture, weights, facts) of the authors' .pt file; the statistics are of log.txt,
        where it is beside the file or in the folder above."""
        path = Path(path)
        one_version(path, version, "ema")
        content = read_released(path, "ema")
        args = content["args"] if isinstance(content.get("args"), dict) else {}
        names = {"path": "path_type", "prediction": "prediction", "loss_weight": "loss_weight",
                 "train_eps": "train_eps", "sample_eps": "sample_eps"}
        interpolant = Interpolant(**{name: args[key] for name, key in names.items() if key in args})
        facts: dict[str, Any] = {"interpolant": asdict(interpolant), "classes": [], "args": args}
        if log := next((log for log in sit_logs(path) if log.is_file()), None):
            facts["statistics"] = read_sit_statistics(log)
        return None, content["ema"], facts


def sit_logs(path: Path) -> list[Path]:
    """Where the log.txt of an authors' checkpoint may be."""
    return [path.with_name("log.txt"), path.parent.with_name("log.txt")]
