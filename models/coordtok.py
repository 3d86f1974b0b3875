"""CoordTok (arXiv 2411.14762): a clip becomes three latent planes, and a decoder turns the coordinates of any set of
patches into those patches. Parameter names are those of the authors' files."""
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from models.configs import CoordTokConfig
from models.hub import Pretrained, Stored, one_version
from models.inputs import check_integers, check_video
from models.layers import Blocks, TubeletEmbedding, vit_block
from models.lpips import FrameDistance
from models.patches import assemble_frames, unpatchify
from models.pretrained import read_released, strip_prefix
from models.triplane import Planes


def released_padding(video: Tensor, n_frames: Tensor) -> Tensor:
    """Blank the padding as the authors' data set does. It writes -1 before [0, 1] is scaled to [-1, 1], so the released
    encoder has learned padding as -3.

    video: (B, 3, T, H, W) float in [0, 1]. n_frames: (B,) long, real frames a clip. Returns a new (B, 3, T, H, W).
    """
    padded = torch.arange(video.shape[2], device=video.device) >= n_frames.to(video.device)[:, None]
    return video.masked_fill(padded[:, None, :, None, None], -1.0)


def patch_embedding(conv: nn.Module) -> nn.Sequential:
    """`conv` under its released name, `proj`."""
    return nn.Sequential(OrderedDict(proj=conv))


class VideoEncoder(nn.Module):
    """Tubelets through a ViT with a class token, which is dropped at the end."""

    def __init__(self, config: CoordTokConfig):
        super().__init__()
        dim, side = config.enc_embed_dim, config.enc_patch_size_xy
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_emb = nn.Parameter(torch.randn(1, math.prod(config.num_tubelets), dim))
        self.patch_embed = patch_embedding(TubeletEmbedding(3, dim, (config.enc_patch_size_t, side, side)))
        self.layers = Blocks(
            vit_block(dim, config.enc_num_heads, qkv_bias=False, eps=1e-5) for _ in range(config.enc_patch_num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, video: Tensor, hidden: Tensor | None) -> Tensor:
        """video: (B, 3, T, H, W) in [-1, 1]. hidden: (B, L) bool, True where a token is masked, or None."""
        x = self.patch_embed(video)  # (B, L, D)
        x = x + self.pos_emb[:, : x.shape[1]]  # a clip of fewer tubelets has the first positions
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + L, D)
        seen = None if hidden is None else F.pad(~hidden, (1, 0), value=True)[:, None, None]  # (B, 1, 1, 1 + L)
        return self.norm(self.layers(x, attn_mask=seen))[:, 1:]  # (B, L, D)


class QueryBlock(nn.Module):
    """Pre-norm cross-attention to the video tokens (taken as they are), self-attention, MLP."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.cross_attn = nn.MultiheadAttention(dim, num_heads, bias=False, batch_first=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attn = nn.MultiheadAttention(dim, num_heads, bias=False, batch_first=True)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        # The released names are mlp.0 and mlp.3: a dropout of probability 0 stood between.
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, tokens: Tensor, key_mask: Tensor | None) -> Tensor:
        """x: (B, Q, D). tokens: (B, L, D). key_mask: (B, L), bool (True hides a token), float (added to its logits)
        or None."""
        # need_weights=False selects the fused attention kernels.
        x = x + self.cross_attn(self.norm1(x), tokens, tokens, key_padding_mask=key_mask, need_weights=False)[0]
        y = self.norm2(x)
        x = x + self.self_attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm3(x))


class QueryTransformer(nn.Module):
    """Query blocks and their final norm."""

    def __init__(self, dim: int, num_heads: int, num_layers: int):
        super().__init__()
        self.layers = Blocks(QueryBlock(dim, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, tokens: Tensor, key_mask: Tensor | None) -> Tensor:
        return self.norm(self.layers(x, tokens, key_mask))


class Encoder(nn.Module):
    """Video tokens, then query tokens that read them, then planes."""

    def __init__(self, config: CoordTokConfig):
        super().__init__()
        dim, channels = config.enc_embed_dim, config.latent_n_features
        patch_xy = (config.latent_patch_size_xy, config.latent_patch_size_xy)
        patch_t = (config.latent_patch_size_t, config.latent_patch_size_xy)
        self.encoder = VideoEncoder(config)
        self.cross_pos_emb = nn.Parameter(torch.randn(1, math.prod(config.num_tubelets), dim))
        self.patch_embeds_xy = patch_embedding(nn.Conv2d(channels, dim, patch_xy, stride=patch_xy))
        self.patch_embeds_yt = patch_embedding(nn.Conv2d(channels, dim, patch_t, stride=patch_t))
        self.patch_embeds_xt = patch_embedding(nn.Conv2d(channels, dim, patch_t, stride=patch_t))
        self.transformer = QueryTransformer(dim, config.enc_num_heads, config.enc_num_layers)
        self.projectors_xy = nn.Linear(dim, math.prod(patch_xy) * channels)
        self.projectors_yt = nn.Linear(dim, math.prod(patch_t) * channels)
        self.projectors_xt = nn.Linear(dim, math.prod(patch_t) * channels)

    def forward(self, video: Tensor, queries: Planes, hidden: Tensor | None, key_mask: Tensor | None) -> Planes:
        """video: (B, 3, T, H, W) in [-1, 1]. queries: (1, R, S, C) planes. hidden and key_mask: (B, L) or None."""
        tokens = self.encoder(video, hidden)  # (B, L, D)
        tokens = tokens + self.cross_pos_emb[:, : tokens.shape[1]]
        grids = Planes(
            self.patch_embeds_xy(rearrange(queries.xy, "b r s c -> b c r s")),  # (1, D, h, w)
            self.patch_embeds_yt(rearrange(queries.yt, "b r s c -> b c r s")),  # (1, D, t, w)
            self.patch_embeds_xt(rearrange(queries.xt, "b r s c -> b c r s")),  # (1, D, t, h)
        )
        x = torch.cat([grid.flatten(2).mT for grid in grids], dim=1)  # (1, Q, D)
        x = self.transformer(x.expand(len(video), -1, -1), tokens, key_mask)  # (B, Q, D)
        parts = Planes(*x.split([grid[0, 0].numel() for grid in grids], dim=1))
        patches = Planes(self.projectors_xy(parts.xy), self.projectors_yt(parts.yt), self.projectors_xt(parts.xt))

        def assemble(patches: Tensor, grid: Tensor, query: Tensor) -> Tensor:  # -> (B, R, S, C)
            rows, columns = grid.shape[2:]
            p = query.shape[1] // rows
            return rearrange(patches, "b (r s) (p q c) -> b (r p) (s q) c", r=rows, s=columns, p=p, c=query.shape[3])

        return patches.map(assemble, grids, queries)


class PointTransformer(nn.Module):
    """The points of one video as one sequence, which attend to one another."""

    def __init__(self, config: CoordTokConfig):
        super().__init__()
        dim = config.dec_embed_dim
        self.pos_embed = nn.Parameter(torch.randn(1, *config.grid, dim) / math.sqrt(dim))
        self.patch_embed = nn.Linear(3 * config.latent_n_features, dim)
        self.layers = Blocks(
            vit_block(dim, config.dec_num_heads, qkv_bias=True, eps=1e-5) for _ in range(config.dec_num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, features: Tensor, index: Tensor) -> Tensor:
        _, _, height, width, _ = self.pos_embed.shape
        t, h, w = index.unbind(-1)  # (B, N) each
        positions = F.embedding((t * height + h) * width + w, self.pos_embed.flatten(0, 3))  # (B, N, D)
        return self.norm(self.layers(self.patch_embed(features) + positions))


class Decoder(nn.Module):
    """Features read off the planes at each point, a transformer over the points, pixels of each point's patch."""

    def __init__(self, config: CoordTokConfig):
        super().__init__()
        self.transformer = PointTransformer(config)
        self.projector = nn.Linear(config.dec_embed_dim, config.dec_patch_size_t * config.dec_patch_size_xy**2 * 3)

    def forward(self, planes: Planes, index: Tensor) -> Tensor:
        # (B, N) each, in [0, 1]; a grid of one has the coordinate 0. float32 whatever the model's precision: bfloat16
        # is spaced 1/256 below 1, half the step between two of 128 time steps.
        grid = self.transformer.pos_embed.shape[1:4]
        t, h, w = (axis.float() / max(size - 1, 1) for axis, size in zip(index.unbind(-1), grid))
        features = [read_plane(planes.xy, h, w), read_plane(planes.yt, t, w), read_plane(planes.xt, t, h)]
        return self.projector(self.transformer(torch.cat(features, dim=-1), index))


def read_plane(plane: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Bilinear interpolation, corners aligned.

    plane: (B, R, S, C) float. row, column: (B, N) float32 in [0, 1]. Returns (B, N, C), the dtype of `plane`.
    """
    where = 2 * torch.stack([column, row], dim=-1) - 1  # (B, N, 2); grid_sample wants x before y, both in [-1, 1]
    values = F.grid_sample(rearrange(plane.float(), "b r s c -> b c r s"), where[:, None], align_corners=True)
    return rearrange(values, "b c 1 n -> b n c").to(plane.dtype)


# The flags that decide the shape or presence of a released tensor, for the error of a file that does not fit.
FLAGS_BEHIND = {
    "weight_tokens_xy": "latent_resolution_xy, latent_n_features",
    "weight_tokens_yt": "latent_resolution_t, latent_resolution_xy, latent_n_features",
    "weight_tokens_xt": "latent_resolution_t, latent_resolution_xy, latent_n_features",
    "encoder.cross_pos_emb": "enc_embed_dim, num_frames, img_size, enc_patch_size_t, enc_patch_size_xy",
    "encoder.encoder.cls_token": "enc_embed_dim",
    "encoder.encoder.pos_emb": "enc_embed_dim, num_frames, img_size, enc_patch_size_t, enc_patch_size_xy",
    "encoder.encoder.patch_embed": "enc_embed_dim, enc_patch_size_t, enc_patch_size_xy",
    "encoder.encoder.layers": "enc_patch_num_layers, enc_embed_dim",
    "encoder.patch_embeds_xy": "latent_patch_size_xy, latent_n_features, enc_embed_dim",
    "encoder.patch_embeds_yt": "latent_patch_size_t, latent_patch_size_xy, latent_n_features, enc_embed_dim",
    "encoder.patch_embeds_xt": "latent_patch_size_t, latent_patch_size_xy, latent_n_features, enc_embed_dim",
    "encoder.transformer.layers": "enc_num_layers, enc_embed_dim",
    "decoder.transformer.pos_embed": "dec_embed_dim, num_frames, img_size, dec_patch_size_t, dec_patch_size_xy",
    "decoder.transformer.patch_embed": "dec_embed_dim, latent_n_features",
    "decoder.transformer.layers": "dec_num_layers, dec_embed_dim",
    "decoder.projector": "dec_patch_size_t, dec_patch_size_xy, dec_embed_dim",
}


class CoordTok(Pretrained):
    """The tokenizer. Video is float (B, 3, T, H, W) in [0, 1]; the [-1, 1] of the network stays inside.

    CoordTok(**config) takes the fields of CoordTokConfig.
    """

    kind = "coordtok"
    behind = FLAGS_BEHIND

    def __init__(self, **config):
        super().__init__()
        self.config = CoordTokConfig(**config)
        res, res_t = self.config.latent_resolution_xy, self.config.latent_resolution_t
        channels = self.config.latent_n_features
        # Initialisation: query planes, class token and position tables are normal (the decoder's positions divided by
        # the root of the width), all else is PyTorch's default, as published.
        self.weight_tokens_xy = nn.Parameter(torch.randn(1, res, res, channels))
        self.weight_tokens_yt = nn.Parameter(torch.randn(1, res_t, res, channels))
        self.weight_tokens_xt = nn.Parameter(torch.randn(1, res_t, res, channels))
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    @classmethod
    def from_released(cls, path: str | Path, **config) -> "CoordTok":
        """The model of the authors' .pth file, with padding="released" unless told otherwise.

        config: what differs from the released UCF-101 model. The shapes show all of it but the numbers of heads, so a
        file that does not fit raises a ValueError that names the flags to change.
        """
        return cls.from_stored(Stored(*cls.read_authors(path), Path(path)), config)

    @staticmethod
    def read_authors(path: str | Path, version: str = "sd") -> tuple[None, dict[str, Tensor], dict]:
        """(None: the file has no architecture, weights, facts) of the authors' .pth file."""
        one_version(path, version, "sd")
        content = read_released(path, "model")
        state = strip_prefix(content["model"], "module.")
        state = {name: value for name, value in state.items() if not name.startswith("decoder.lpips_loss.")}
        return None, state, {"args": content["args"]} if isinstance(content.get("args"), dict) else {}

    @classmethod
    def construct(cls, config: dict, path: Path | None) -> "CoordTok":
        if path is not None:
            return super().construct(config, path)
        with torch.device("meta"):  # skips an initialisation that is overwritten
            model = cls(**{"padding": "released", **config})
        return model.to_empty(device="cpu")

    def forward(self, video: Tensor, index: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """Encode, then decode the patches at `index`: the one call of a training step (arguments as below)."""
        return self.decode(self.encode(video, n_frames), index)

    def encode(self, video: Tensor, n_frames: Tensor | None = None) -> Planes:
        """Clips to planes (section 3.1 of the paper).

        video: (B, 3, T, H, W) float in [0, 1], T up to the trained length.
        n_frames: (B,) long, how many of each clip's T frames are real (more than T count as T); the rest is padding.
            None: all are; without a mask flash attention can be used.
        Returns xy (B, R, R, C), yt (B, R_t, R, C), xt (B, R_t, R, C).

        padding="exclude" masks tubelets without a real frame in every attention and blanks padding frames, so the
        content of the padding has no effect. padding="released" is what the released weights were trained with: the ViT
        blocks attend to padding, and the key mask of the cross-attention (tubelets from n_frames // enc_patch_size_t
        on) is a float of 0 and 1, which adds 1 to the logits of padding instead of masking it. The authors' data set
        blanks padding as -3 (`released_padding`); here the given frames are used unchanged, and frames missing up to
        the trained length are blanked like that.
        """
        check_video(video, values=not self.training, dtype=self.weight_tokens_xy.dtype)
        batch, channels, given, *size = video.shape
        frames, *trained_size = self.config.video_shape
        if channels != 3 or not 1 <= given <= frames or size != trained_size:
            raise ValueError(
                f"a video of shape {tuple(video.shape)} does not fit a tokenizer of (B, 3, up to {frames}, "
                f"{trained_size[0]}, {trained_size[1]}): resize or cut it, or change num_frames or img_size"
            )
        released, patch_t = self.config.padding == "released", self.config.enc_patch_size_t
        # Excluded padding is not computed: a short clip is only filled up to whole tubelets.
        missing = frames - given if released else -given % patch_t
        x = F.pad(2 * video - 1, (0, 0, 0, 0, 0, missing), value=-3.0 if released else 0.0)
        if released and missing and n_frames is None:
            n_frames = torch.full((batch,), given)
        if n_frames is None:
            hidden, key_mask = None, None
        else:
            n_frames = n_frames.to(video.device).clamp(max=given)[:, None]  # (B, 1)
            if released:
                real_tubelets = n_frames // patch_t
            else:
                real_tubelets = ((n_frames + patch_t - 1) // patch_t).clamp(min=1)  # one with any real frame counts
                padding_frames = torch.arange(x.shape[2], device=x.device) >= n_frames  # (B, T)
                x = x.masked_fill(padding_frames[:, None, :, None, None], 0.0)
            hidden = torch.arange(x.shape[2] // patch_t, device=x.device) >= real_tubelets  # (B, tubelets along t)
            hidden = repeat(hidden, "b t -> b (t hw)", hw=math.prod(self.config.num_tubelets[1:]))  # (B, L)
            hidden, key_mask = (None, hidden.to(x.dtype)) if released else (hidden, hidden)
        queries = Planes(self.weight_tokens_xy, self.weight_tokens_yt, self.weight_tokens_xt)
        return self.encoder(x, queries, hidden, key_mask)

    def decode(self, planes: Planes, index: Tensor) -> Tensor:
        """The patches at `index` (section 3.2 of the paper). The points of one video attend to one another, so a
        patch depends on the patches that are decoded with it.

        planes: as `encode` returns them, at any resolution. index: (B, N, 3) long, t h w patch index.
        Returns (B, N, p_t * p * p * 3) pixels, in [-1, 1] by training but not clamped, p_t p p 3 order.
        """
        if not self.training:
            for axis, (name, size) in enumerate(zip("thw", self.config.grid)):
                check_integers(f"patch indices {name}", index[..., axis], size)
        return self.decoder(Planes(*planes), index)

    def render(self, planes: Planes, frames: Sequence[int] | Tensor | None = None, slices: int = 1) -> Tensor:
        """Whole frames.

        planes: as `encode` returns them. frames: (F,) indices in the order wanted; only the patches that hold them are
        decoded. None: all. slices: number of equal sequences, in t h w order, that the patches are decoded in (the
        last may be shorter); 1 is what the paper reports.
        Returns (B, 3, F, H, W) float32, in [0, 1] by training but not clamped.
        """
        planes, patch_t = Planes(*planes), self.config.dec_patch_size_t
        grid_t, grid_h, grid_w = self.config.grid
        times = torch.arange(grid_t)
        if frames is not None:
            frames = torch.as_tensor(frames).cpu()
            if not len(frames) or frames.min() < 0 or frames.max() >= self.config.video_shape[0]:
                raise ValueError(f"frames are indices below {self.config.video_shape[0]}, got {frames.tolist()}")
            times, position = (frames // patch_t).unique(return_inverse=True)
        index = torch.cartesian_prod(times, torch.arange(grid_h), torch.arange(grid_w)).to(planes.xy.device)  # (N, 3)
        index = index.expand(len(planes.xy), -1, -1)  # (B, N, 3)
        patches = torch.cat([self.decode(planes, part) for part in index.chunk(slices, dim=1)], dim=1)
        grid = (len(times), grid_h, grid_w)
        video = (unpatchify(patches.float(), grid, patch_t, self.config.dec_patch_size_xy) + 1) / 2
        return video if frames is None else video[:, :, position * patch_t + frames % patch_t]


def patch_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each video, in float32.

    pred, target: (B, N, values of a patch) in [-1, 1]. Returns (B,).
    """
    return (pred.float() - target.float()).square().mean(dim=(1, 2))


def coordtok_loss(
    pred: Tensor,
    target: Tensor,
    index: Tensor,
    config: CoordTokConfig,
    perceptual: FrameDistance | None = None,
    lpips_scale: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """CoordTok's loss of each video (section 3.3 of the paper): mean squared error, and in the second stage
    lpips_scale times the sum of LPIPS, or of another `perceptual` distance, over the frames.

    pred, target: (B, N, p_t * p * p * 3) patches in [-1, 1]. index: (B, N, 3) long, which patches these are; with
    `perceptual` they make up whole frames, in any order (see `assemble_frames`).
    Returns the loss (B,), to be summed over the global batch, and its parts as detached means: mse (of a value), lpips
    (of a frame). The released code sums over a micro-batch and averages over processes, so that the scale of its loss
    depends on their number; Adam does not see the difference.
    """
    loss = mse = patch_loss(pred, target)
    logs = {"mse": mse.detach().mean()}
    if perceptual is not None:
        patch_t, patch = config.dec_patch_size_t, config.dec_patch_size_xy
        pred, target = ((assemble_frames(x, index, config.grid, patch_t, patch) + 1) / 2 for x in (pred, target))
        distances = perceptual.per_frame(pred, target)  # (B, frames)
        loss = loss + lpips_scale * distances.sum(dim=1)
        logs[perceptual.name] = distances.detach().mean()
    return loss, logs
