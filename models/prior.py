"""The autoregressive prior that shapes LARP's latent space in training (arXiv 2410.21264, section 3.3): a GPT over
code *vectors* whose predictions are compared with the codebook. Sampling and decoding do not use it."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.configs import PRIOR_SIZES, PriorConfig
from models.discriminator import xavier_linears
from models.layers import Blocks, Fused
from models.quantizer import Generators, GumbelMax, uniform


class CausalAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.key = nn.Linear(dim, dim)
        self.query = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.resid_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        q, k, v = (
            rearrange(part(x), "b n (h d) -> b h n d", h=self.num_heads) for part in (self.query, self.key, self.value)
        )
        # The released code leaves this dropout on at evaluation; here it is off.
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return self.resid_drop(self.proj(rearrange(x, "b h n d -> b n (h d)")))  # (B, N, D)


class GPTBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.ln1 = nn.LayerNorm(dim, eps=1e-5)
        self.ln2 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = CausalAttention(dim, num_heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class CodeScores(Fused):
    """How well the true codes are predicted."""

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """logits: (B, N, K) float32. target: (B, N) long. Returns the cross-entropy () and the rank (B, N) long of each
        true code: how many codes have a larger logit."""
        true_logit = logits.detach().gather(-1, target[..., None])
        rank = (logits.detach() > true_logit).sum(-1)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten()), rank


class Prior(nn.Module):
    def __init__(self, config: PriorConfig, code_dim: int, num_tokens: int):
        super().__init__()
        self.config = config
        assert config.name is not None, "a tokenizer without a prior builds none"
        num_layers, dim, num_heads = PRIOR_SIZES[config.name]
        dropout = 0.0 if config.no_dropout else 0.1
        self.pos_emb = nn.Parameter(torch.empty(1, max(1024, num_tokens), dim))  # released: 1024, also for fewer tokens
        self.input_proj = nn.Linear(code_dim, dim)
        self.drop = nn.Dropout(dropout)
        self.blocks = Blocks(GPTBlock(dim, num_heads, dropout) for _ in range(num_layers))
        self.ln_f = nn.LayerNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, code_dim)
        self.score, self.draw = CodeScores(), GumbelMax()
        self.initialize()

    def initialize(self) -> None:
        """Linears Xavier-uniform, biases 0; positions normal. The released code initialises the linears as in
        GPT-2, and then overwrites them with the tokenizer's rule."""
        nn.init.normal_(self.pos_emb, std=0.02)
        xavier_linears(self)

    def forward(self, vectors: Tensor) -> Tensor:
        """vectors: (B, N, d) of codes 1 to N -> (B, N, d), the predictions of codes 2 to N + 1."""
        x = self.drop(self.input_proj(vectors) + self.pos_emb[:, : vectors.shape[1]])  # (B, N, D)
        x = self.head(self.ln_f(self.blocks(x)))  # (B, N, d)
        return F.normalize(x, dim=-1) if self.config.args.l2_normalized else x

    def loss(
        self,
        vectors: Tensor,
        codes: Tensor,
        codebook: Tensor,
        ratio: float | Tensor = 0.0,
        generator: Generators = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of codes 2 to N, in rounds: the first on the true codes, each later one on a mix with codes
        sampled from the round before (scheduled sampling for transformers, arXiv 1906.07651).

        vectors: (B, N, d), straight-through and *with* gradient, by which the prior shapes the encoder.
        codes: (B, N) long, their indices. codebook: (K, d); detached, so that codes do not move towards predictions.
        ratio: the share of sampled codes. Returns the loss () and logs: first round's loss and accuracies.
        """
        c, codebook = self.config, codebook.detach()
        num_rounds = c.n_rounds if c.use_mix_ss else 1
        inputs, target, losses, logs = vectors[:, :-1], codes[:, 1:], [], {}  # (B, N-1, d), (B, N-1)
        for i in range(num_rounds):
            last = i == num_rounds - 1
            with torch.set_grad_enabled(torch.is_grad_enabled() and (last or not c.no_grad_before_last_round)):
                predictions = self(inputs)  # (B, N-1, d)
                # In float32, as in the quantiser: in half precision many codes would tie.
                with torch.autocast(inputs.device.type, enabled=False):
                    logits = predictions.float() @ codebook.T / c.latent_ce_temperature  # (B, N-1, K)
                loss, rank = self.score(logits, target)
                losses.append(loss)
            if i == 0:
                logs = {"prior_first_round": losses[0].detach()}
                logs |= {f"prior_top{k}": (rank < k).float().mean() for k in (1, 5)}
            if not last:
                logits = logits.detach()[:, :-1]
                sampled = self.draw(logits, uniform(logits.shape, logits.device, generator))  # (B, N-2), codes 2 to N-1
                replace = uniform(sampled.shape, sampled.device, generator) < ratio
                mixed = torch.where(replace[..., None], F.embedding(sampled, codebook), vectors[:, 1:-1])
                inputs = torch.cat([vectors[:, :1], mixed], dim=1)  # (B, N-1, d)
        return torch.stack(losses).mean() if c.avg_loss_over_rounds else losses[-1], logs
