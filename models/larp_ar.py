"""LARP's generator (arXiv 2410.21264): a LLaMA-like decoder over the tokenizer's codes, and its sampling.

Its input is a condition, either a class label or the codes of the given frames, and then the codes of a clip in order.
`forward` computes the logits of known codes; `generate` draws codes one by one (models/decoding.py).
"""
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from models import decoding
from models.configs import SIZES, LARPGeneratorConfig
from models.decoding import KVCache, Linear, Window, attend_one
from models.hub import Pretrained, Stored
from models.inputs import check_integers
from models.layers import Blocks, sincos_1d
from models.pretrained import read_released, strip_prefix


class RMSNorm(nn.Module):
    """In float32: a mean of squares over thousands of bfloat16 values loses what the next layers need."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).type_as(x) * self.weight


class Attention(nn.Module):
    """Causal self-attention; n_head / n_kv_head heads of queries share a head of keys and values."""

    def __init__(self, config: LARPGeneratorConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.wqkv = Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.wo = Linear(config.dim, config.dim)
        self.attn_dropout_p = config.attn_dropout_p
        self.resid_dropout = nn.Dropout(config.resid_dropout_p)

    def forward(self, x: Tensor, cache: Tensor | None = None, window: Window | None = None) -> Tensor:
        """x: (B, T, dim). cache: (2, B, n_kv_head, num_positions, head_dim) keys and values, written at `window`; a
        pass of one token attends to all of them, a longer one starts at position 0 and attends to itself alone."""
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads of q, k and v, T, head_dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if cache is not None and window is not None:
            cache.index_copy_(3, window.position, torch.stack([k, v]))
            if x.shape[1] == 1:
                k, v = cache.narrow(3, 0, window.length)
        if cache is not None and window is not None and window.rows is not None:
            y = attend_one(q, k, cache[1], window.rows)
        else:
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                dropout_p=self.attn_dropout_p if self.training else 0.0,
                is_causal=x.shape[1] > 1,
                enable_gqa=self.heads != self.kv_heads,
            )
        return self.resid_dropout(self.wo(y.transpose(1, 2).flatten(2)))  # (B, T, dim)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LARPGeneratorConfig):
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim)
        self.w3 = Linear(config.dim, config.ffn_dim)
        self.w2 = Linear(config.ffn_dim, config.dim)
        self.ffn_dropout = nn.Dropout(config.ffn_dropout_p)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Layer(nn.Module):
    def __init__(self, config: LARPGeneratorConfig, drop_path: float):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, cache: Tensor | None = None, window: Window | None = None) -> Tensor:
        x = x + self.drop_path(self.attention(self.attention_norm(x), cache, window))
        return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))


class LabelEmbedding(nn.Module):
    """One row for each class and a last one for "no label", which every negative label uses."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(torch.where(labels < 0, self.num_classes, labels))


class LARPGenerator(Pretrained):
    """LARP's generator. Keywords: those of LARPGeneratorConfig; the published sizes are in SIZES.

    Attributes to set: `cuda_graphs` False decodes on a GPU by the modules, without fused kernels and graphs; `cache`
    None gives back the memory that `generate` keeps.
    """

    kind = "larp_ar"

    def __init__(self, **options):
        super().__init__()
        self.config = config = LARPGeneratorConfig(**options)
        self.cuda_graphs = True
        self.cache: KVCache | None = None

        if config.use_fixed_pe:
            table = sincos_1d(config.dim, torch.arange(config.num_positions))
            self.register_buffer("abs_pe", table[None])
        else:
            self.abs_pe = nn.Parameter(torch.empty(1, config.num_positions, config.dim))
        if not config.frame_prediction:
            self.cls_embedding = LabelEmbedding(config.num_classes, config.dim)
        # The separator between the given codes and the predicted ones is one more code.
        self.tok_embeddings = nn.Embedding(config.vocab_size + config.frame_prediction, config.dim)
        self.tok_dropout = nn.Dropout(config.token_dropout_p)
        rates = torch.linspace(0, config.drop_path_rate, config.n_layer, device="cpu").tolist()
        self.layers = Blocks(Layer(config, rate) for rate in rates)
        self.layers.compiled_on_cpu = True  # its RMSNorm and SwiGLU are many small operations
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        self.initialize()

    def initialize(self) -> None:
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
        if not self.config.use_fixed_pe:
            nn.init.normal_(self.abs_pe, std=std)
        nn.init.zeros_(self.output.weight)  # the first prediction is uniform: the loss starts at log(vocab_size)

    @classmethod
    def from_released(cls, path: str | Path, version: str = "sd", **config) -> "LARPGenerator":
        """A checkpoint of the authors' trainer, in evaluation mode. version: "sd", the weights, or "ema_DECAY", their
        average with that decay. config: overrides what the file says."""
        held, weights, facts = cls.read_authors(path, version)
        return cls.from_stored(Stored(held | config, weights, facts, Path(path)))

    @staticmethod
    def read_authors(path: str | Path, version: str = "sd") -> tuple[dict, dict[str, Tensor], dict]:
        """(architecture, weights, facts) of a checkpoint of the authors' trainer."""
        model = read_released(path, "model")["model"]
        versions = {"sd": model["sd"]} | {f"ema_{decay}": state for decay, state in (model.get("ema_sd") or {}).items()}
        if version not in versions:
            raise ValueError(f"{path}: no version {version} in it; choose one of {', '.join(versions)}")
        config = SIZES.get(model["name"], {}) | model["args"]
        if config.get("frame_prediction"):
            config = {"cls_token_num": config.get("max_seq_len", 1024) + 1} | config
        return config, strip_prefix(strip_prefix(versions[version], "module."), "_orig_mod."), {}

    def __getstate__(self) -> dict:
        """The cache, with the CUDA graphs it may hold, is neither copied nor pickled."""
        return self.__dict__ | {"cache": None}

    def frame_condition(self, codes: Tensor) -> Tensor:
        """codes: (B, cls_token_num - 1) long, of the frames given, the last repeated to a whole clip. Returns the
        condition (B, cls_token_num) long: the codes, then the separator."""
        return F.pad(codes, (0, 1), value=self.config.vocab_size)

    def embed_condition(self, cond: Tensor) -> Tensor:
        """(B,) labels or (B, cls_token_num) codes -> (B, cls_token_num, dim)."""
        expected = (len(cond), self.config.cls_token_num) if self.config.frame_prediction else (len(cond),)
        if cond.shape != expected:
            kind = "codes and a separator" if self.config.frame_prediction else "labels"
            raise ValueError(f"cond is {tuple(cond.shape)}; expected {kind}, {expected}")
        return self.tok_embeddings(cond) if self.config.frame_prediction else self.cls_embedding(cond)[:, None]

    def forward(self, codes: Tensor, cond: Tensor, drop: Tensor | None = None) -> Tensor:
        """Logits of each code given the codes before it.

        codes: (B, n) long in [0, vocab_size), the first n <= max_seq_len of the clip. The last of a whole clip is not
            read: nothing comes after it.
        cond: (B,) long labels, negative for none; for frame prediction (B, cls_token_num) long, of `frame_condition`.
        drop: (B,) bool, True where the label is hidden; None: in training, drawn with class_dropout_prob.
        Returns logits (B, min(n + 1, max_seq_len), vocab_size) float32; row i is about code i.
        """
        if codes.shape[1] > self.config.max_seq_len:
            raise ValueError(f"{codes.shape[1]} codes are more than max_seq_len {self.config.max_seq_len}")
        if not self.config.frame_prediction:
            if drop is None and self.training:
                drop = torch.rand(len(cond), device=cond.device) < self.config.class_dropout_prob
            if drop is not None:
                cond = cond.masked_fill(drop, -1)
        codes = codes[:, : self.config.max_seq_len - 1]
        x = torch.cat([self.embed_condition(cond), self.tok_embeddings(codes)], dim=1)  # (B, cls_token_num + n, dim)
        x = self.tok_dropout(x) + self.abs_pe[:, : x.shape[1]]
        x = self.layers(x)
        return self.output(self.norm(x[:, self.config.cls_token_num - 1 :])).float()

    @torch.no_grad()
    def generate(
        self,
        cond: Tensor,
        cfg_scale: float = 1.0,
        cfg_interval: int = -1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seeds: Sequence | Tensor | None = None,
        return_nll: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw clips. The host never waits for the device between two codes.

        cond: as in `forward`.
        cfg_scale: classifier-free guidance: logits are uncond + cfg_scale * (cond - uncond); 1 is none, 0 is without
            the condition.
        cfg_interval: guide only the first cfg_interval + 2 codes; -1: all of them.
        temperature, top_k, top_p: see `decoding.sampling_probs`.
        seeds: (B,), what each clip's draws come from: an int >= 0, or a sequence of them such as (seed, i). A clip
            depends on its seed and condition alone: on a CPU its codes are the same in any batch and for any number of
            threads; on a GPU products round by the size of the batch, so keep that size and fill up the last batch.
            None: all draws from torch's global generator.
        return_nll: also return the mean negative log-likelihood of each clip's codes, in nats, under the conditional
            model (no guidance, temperature 1): what `forward` and a cross-entropy would give.
        Returns codes (B, max_seq_len) long, and nll (B,) float32 if asked for.
        """
        if cfg_scale != 1:
            self.check_guidance(cfg_scale)
        if self.config.frame_prediction:
            check_integers("codes of the frames given", cond, self.config.vocab_size + 1)
        else:
            check_integers("labels", cond, self.config.num_classes, low=None)
        num_codes = self.config.max_seq_len
        num_guided = 0 if cfg_scale == 1 else num_codes if cfg_interval < 0 else min(cfg_interval + 2, num_codes)
        sampling = decoding.Sampling(cfg_scale, num_guided, temperature, top_k, top_p, return_nll)
        draws = decoding.generate(self, cond, sampling, decoding.uniform_numbers(seeds, len(cond), num_codes))
        codes = draws.codes.clone()
        return (codes, draws.nll / num_codes) if return_nll else codes

    def check_guidance(self, cfg_scale: float) -> None:
        """ValueError where the model cannot be guided by this scale: it never learned to predict without a label."""
        if cfg_scale != 1 and self.config.frame_prediction:
            raise ValueError(f"cfg_scale is {cfg_scale}, but frame prediction has no unconditional row; leave it at 1")
        if cfg_scale != 1 and self.config.class_dropout_prob == 0:
            raise ValueError(f"cfg_scale {cfg_scale} needs a model trained with --class_dropout_prob above 0, this one "
                             "has 0: leave it at 1")


def code_loss(logits: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the codes, mean over all of them.

    logits: (B, N, vocab_size), of `LARPGenerator.forward`. codes: (B, N) long.
    Returns the loss and {"loss", "accuracy"}, detached.
    """
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    accuracy = (logits.detach().argmax(-1) == codes).float().mean()
    return loss, {"loss": loss.detach(), "accuracy": accuracy}
