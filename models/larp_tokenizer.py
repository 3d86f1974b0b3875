"""LARP's video tokenizer (arXiv 2410.21264): learned queries turn a clip into a sequence of discrete codes, and a
decoder turns the codes back into the clip. Parameter names and configuration are those of the released files."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn

from common.cli import is_none
from models.configs import LARPTokenizerConfig
from models.discriminator import xavier_linears
from models.hub import Pretrained, Stored
from models.inputs import check_integers, check_video
from models.layers import Blocks, TubeletEmbedding, sincos_1d, sincos_3d, vit_block
from models.patches import unpatchify
from models.pretrained import load_state, read_released
from models.prior import Prior
from models.quantizer import Bottleneck, Generators


def parse_config(cls: Any, data: Mapping[str, Any], where: str = "config") -> Any:
    """The dataclass `cls`, and those nested in it, from nested mappings. A key that is unknown, or a value of another
    type, is a ValueError. A nested None means that its `name` is None: `prior_model: null` is no prior."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} holds keys and values, got {data!r}")
    kinds = get_type_hints(cls)
    unknown = [key for key in data if key not in kinds]
    if unknown:
        raise ValueError(f"{where} has unknown keys {', '.join(map(repr, unknown))}; known are {', '.join(kinds)}")
    values = {}
    for key, value in data.items():
        kind = kinds[key]
        if is_dataclass(kind):
            values[key] = parse_config(kind, {"name": None} if value is None else value, f"{where}.{key}")
            continue
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{where}.{key} is of type {getattr(kind, '__name__', kind)}, got {value!r}")
        values[key] = value
    return cls(**values)


class TokenizerOutput(NamedTuple):
    """video: (B, 3, T, H, W) reconstruction, not clamped. codes: (B, N) long. loss_q: () the quantiser's loss.
    loss_prior: () or, without a prior, None. logs: detached scalars."""

    video: Tensor
    codes: Tensor
    loss_q: Tensor
    loss_prior: Tensor | None
    logs: dict[str, Tensor]


class LARPTokenizer(Pretrained):
    """`LARPTokenizer(**options)`, with the keys of LARPTokenizerConfig; `bottleneck` and `prior_model` are nested
    dicts as in the released config.json."""

    kind = "larp_tokenizer"

    # Each is a learned parameter or a frozen table, as the configuration says.
    encoder_patch_pe: Tensor
    encoder_latent_query_embed: Tensor
    decoder_latent_pe: Tensor
    decoder_patch_query_embed: Tensor

    def __init__(self, **options):
        super().__init__()
        self.config = c = parse_config(LARPTokenizerConfig, options)
        dim, out_dim, num_codes = c.encoder_hidden_size, c.decoder_hidden_size, c.bottleneck_token_num
        tubelet = (c.temporal_patch_size, c.patch_size, c.patch_size)
        pixels = c.decoder_temporal_patch_size * c.decoder_patch_size**2 * c.in_channels

        # Frozen tables are buffers. They are saved too, as in the released files.
        self.x_embedder = nn.Sequential(OrderedDict(proj=TubeletEmbedding(c.in_channels, dim, tubelet)))
        if c.learned_encoder_patch_pe:
            self.encoder_t_embed, self.encoder_h_embed, self.encode_w_embed = axis_tables(dim, c.grid)
        else:
            self.register_buffer("encoder_patch_pe", sincos_3d(dim, *c.grid)[None])  # (1, L, D)
        queries = sincos_1d(dim, torch.arange(num_codes), c.latent_pe_scale_factor)  # (N, D)
        if c.learned_encoder_latent_query_embed:
            self.encoder_latent_query_embed = nn.Parameter(queries)
        else:
            self.register_buffer("encoder_latent_query_embed", queries)
        self.encoder_patch_token_type_embed = type_vector(dim, c.use_encoder_patch_token_type_embed)
        self.encoder_latent_query_token_type_embed = type_vector(dim, c.use_encoder_latent_query_token_type_embed)
        self.encoder = transformer(dim, c.encoder_num_heads, c.encoder_depth)

        self.bottleneck = Bottleneck(c.bottleneck.args, dim, out_dim)

        positions = sincos_1d(out_dim, torch.arange(num_codes), c.latent_pe_scale_factor)[None]  # (1, N, D)
        if c.learned_decoder_latent_pe:
            self.decoder_latent_pe = nn.Parameter(positions)
        else:
            self.register_buffer("decoder_latent_pe", positions)
        if c.learned_decoder_patch_query_embed:
            self.decoder_t_embed, self.decoder_h_embed, self.decoder_w_embed = axis_tables(out_dim, c.decoder_grid)
        else:
            self.register_buffer("decoder_patch_query_embed", sincos_3d(out_dim, *c.decoder_grid)[None])  # (1, L, D)
        self.decoder_latent_token_type_embed = type_vector(out_dim, c.use_decoder_latent_token_type_embed)
        self.decoder_patch_query_token_type_embed = type_vector(out_dim, c.use_decoder_patch_query_token_type_embed)
        self.decoder = transformer(out_dim, c.decoder_num_heads, c.decoder_depth)
        self.final_layer = nn.Sequential(
            OrderedDict(norm_final=nn.LayerNorm(out_dim, eps=1e-6), linear=nn.Linear(out_dim, pixels))
        )
        self.initialize()
        self.prior_model = None  # after the rest: it initialises itself in its own way
        if not is_none(c.prior_model.name):
            self.prior_model = Prior(c.prior_model, c.bottleneck.args.bottleneck_dim, num_codes)

    def initialize(self) -> None:
        """Linears are Xavier-uniform, except the last, which is 0: training starts from a black clip. Queries, latent
        positions and type vectors are normal; other learned tables start from sin-cos tables."""
        c = self.config
        xavier_linears(self)
        nn.init.zeros_(self.final_layer.linear.weight)
        if c.learned_encoder_latent_query_embed and c.encoder_query_gaussian_init:
            nn.init.normal_(self.encoder_latent_query_embed, std=c.query_init_std)
        if c.learned_decoder_latent_pe:
            nn.init.normal_(self.decoder_latent_pe, std=0.02)

    def encode_latents(self, video: Tensor) -> Tensor:
        """video: (B, 3, T, H, W) in [0, 1]; T at most the trained frames. Returns (B, N, D), before the bottleneck."""
        c = self.config
        check_video(video, values=not self.training)
        if video.shape[1:2] + video.shape[3:] != (c.in_channels, c.input_size, c.input_size):
            raise ValueError(
                f"this tokenizer takes clips (B, {c.in_channels}, T, {c.input_size}, {c.input_size}), "
                f"got {tuple(video.shape)}: resize them, or change --input_size in training"
            )
        self.check_frames(video.shape[2], c.temporal_patch_size)
        table = (
            (self.encoder_t_embed + self.encoder_h_embed + self.encode_w_embed).flatten(1, 3)
            if c.learned_encoder_patch_pe
            else self.encoder_patch_pe
        )  # (1, L, D)
        x = self.x_embedder(video.to(table.dtype))  # (B, L, D)
        x = add(x + table[:, : x.shape[1]], self.encoder_patch_token_type_embed)
        queries = add(self.encoder_latent_query_embed[None], self.encoder_latent_query_token_type_embed)  # (1, N, D)
        x = torch.cat([x, queries.expand(len(x), -1, -1)], dim=1)  # (B, L + N, D)
        return self.encoder(x)[:, -c.bottleneck_token_num :]  # (B, N, D), there is no final norm

    def decode_vectors(self, vectors: Tensor, num_frames: int | None = None) -> Tensor:
        """vectors: (B, N, d) of codes. Returns (B, 3, num_frames, H, W), not clamped. The released code unpatchifies
        with the encoder's patch sizes, whatever the decoder's are; here the decoder's own sizes count."""
        c = self.config
        num_frames = c.frame_num if num_frames is None else num_frames
        self.check_frames(num_frames, c.decoder_temporal_patch_size)
        grid = (num_frames // c.decoder_temporal_patch_size, *c.decoder_grid[1:])
        table = (
            (self.decoder_t_embed + self.decoder_h_embed + self.decoder_w_embed).flatten(1, 3)
            if c.learned_decoder_patch_query_embed
            else self.decoder_patch_query_embed
        )  # (1, L, D)
        x = self.bottleneck.expand(vectors) + self.decoder_latent_pe  # (B, N, D)
        x = add(x, self.decoder_latent_token_type_embed)
        queries = add(table[:, : math.prod(grid)], self.decoder_patch_query_token_type_embed)  # (1, L, D)
        x = torch.cat([x, queries.expand(len(x), -1, -1)], dim=1)  # (B, N + L, D)
        x = self.final_layer(self.decoder(x)[:, c.bottleneck_token_num :])  # (B, L, pt * p * p * 3)
        return unpatchify(x, grid, c.decoder_temporal_patch_size, c.decoder_patch_size)  # (B, 3, T, H, W)

    @torch.no_grad()
    def encode(self, video: Tensor, deterministic: bool = True, generator: Generators = None) -> Tensor:
        """video: (B, 3, T, H, W) in [0, 1]; T at most the trained frames, all codes are used. deterministic: the best
        code instead of a draw. generator: of the draws; one, or one a clip (see models.quantizer.uniform).
        Returns (B, N) long."""
        return self.bottleneck(self.encode_latents(video), deterministic=deterministic, generator=generator).codes

    def decode(self, codes: Tensor, num_frames: int | None = None) -> Tensor:
        """codes: (B, N) long. num_frames: the first ones only. Returns (B, 3, num_frames, H, W) in about [0, 1], *not*
        clamped: clamp before measuring or writing."""
        check_integers("codes", codes, self.config.bottleneck.args.regularizer.args.codebook_size,
                       advice=": are they of another tokenizer?")
        if codes.shape[1:] != (self.config.bottleneck_token_num,):
            raise ValueError(f"codes are of shape {tuple(codes.shape)}, expected (B, "
                             f"{self.config.bottleneck_token_num}): give all codes of each clip")
        return self.decode_vectors(self.bottleneck.lookup(codes), num_frames)

    def forward(
        self,
        video: Tensor,
        ratio: float | Tensor = 0.0,
        deterministic: bool = False,
        temperature: float | Tensor | None = None,
        generator: Generators = None,
    ) -> TokenizerOutput:
        """What training needs.

        video: (B, 3, T, H, W) in [0, 1]. ratio: of the prior's scheduled sampling, see PriorConfig.sampling_ratio.
        deterministic, temperature: of the codes, see VectorQuantizer.forward. generator: of codes and prior.
        """
        latents = self.encode_latents(video)  # (B, N, D)
        quantized = self.bottleneck(
            latents, deterministic=deterministic, temperature=temperature, generator=generator
        )  # vectors (B, N, d)
        reconstruction = self.decode_vectors(quantized.vectors, video.shape[2])  # (B, 3, T, H, W)
        loss_prior, prior_logs = None, {}
        if self.prior_model is not None:
            codebook = self.bottleneck.regularizer.codebook()  # (K, d)
            loss_prior, prior_logs = self.prior_model.loss(
                quantized.vectors, quantized.codes, codebook, ratio, generator
            )
        return TokenizerOutput(
            reconstruction, quantized.codes, quantized.loss, loss_prior, {**quantized.logs, **prior_logs}
        )

    def check_frames(self, num_frames: int, patch: int) -> None:
        if not 0 < num_frames <= self.config.frame_num or num_frames % patch:
            raise ValueError(
                f"this tokenizer takes a multiple of {patch} frames up to {self.config.frame_num}, "
                f"got {num_frames}: change --num_frames"
            )

    def load_weights(self, weights: Mapping[str, Tensor], source: str | Path) -> None:
        """Load tensors under their released names; `source` is for the error. The prior's may all be missing (it
        then keeps its own) or be superfluous, and frozen tables may be missing; any other difference is an error."""
        optional = {name for name, _ in self.named_buffers()}
        if not any(name.startswith("prior_model.") for name in weights):
            optional |= {name for name in self.state_dict() if name.startswith("prior_model.")}
        if self.prior_model is None:
            weights = {name: value for name, value in weights.items() if not name.startswith("prior_model.")}
        own = {name: value for name, value in self.state_dict().items() if name in optional}
        load_state(self, {**own, **weights}, source)

    @classmethod
    def from_released_checkpoint(cls, path: str | Path, ema: float | str | None = None) -> "LARPTokenizer":
        """In evaluation mode, from a file of the authors' trainer. ema: the decay whose averaged weights to take; None
        takes the live ones."""
        version = "sd" if ema is None else f"ema_{ema}"
        return cls.from_stored(Stored(*cls.read_authors(path, version), Path(path)))

    @staticmethod
    def read_authors(path: str | Path, version: str = "sd") -> tuple[dict, dict[str, Tensor], dict]:
        """(architecture, weights, facts) of a file of the authors' trainer. version: "sd" or "ema_DECAY"."""
        saved = read_released(path, "model")["model"]
        weights = saved["sd"]
        if version != "sd":
            ema = version.removeprefix("ema_")
            averages = {float(decay): state for decay, state in (saved.get("ema_sd") or {}).items()}
            if float(ema) not in averages:
                found = ", ".join(map(str, averages)) or "none"
                raise ValueError(f"{path}: no average of decay {ema} in it, found {found}: choose one of them")
            weights = averages[float(ema)]
        return saved["args"], weights, {}


def transformer(dim: int, num_heads: int, depth: int) -> nn.Sequential:
    blocks = Blocks(vit_block(dim, num_heads, qkv_bias=False, eps=1e-5) for _ in range(depth))
    return nn.Sequential(OrderedDict(blocks=blocks))


def axis_tables(dim: int, grid: tuple[int, int, int]) -> list[nn.Parameter]:
    """Learned (1, t, 1, 1, D), (1, 1, h, 1, D) and (1, 1, 1, w, D), each from its own full-width sin-cos table."""
    shapes = [[1, -1, 1, 1, dim], [1, 1, -1, 1, dim], [1, 1, 1, -1, dim]]
    return [nn.Parameter(sincos_1d(dim, torch.arange(n)).view(shape)) for n, shape in zip(grid, shapes)]


def type_vector(dim: int, used: bool) -> nn.Parameter | None:
    """Tells one kind of token from another: (1, 1, D), or None."""
    return nn.Parameter(0.02 * torch.randn(1, 1, dim)) if used else None


def add(x: Tensor, vector: Tensor | None) -> Tensor:
    return x if vector is None else x + vector
