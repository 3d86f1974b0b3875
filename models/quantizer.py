"""The discrete bottleneck of LARP (arXiv 2410.21264, section 3.2): project, quantise against a codebook, project back.
The configuration mirrors the nesting of the released config.json, whose values are the defaults."""
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import is_none
from models.configs import BottleneckArgs, VQArgs
from models.layers import Fused

Generators = torch.Generator | Sequence[torch.Generator] | None


class Quantized(NamedTuple):
    """vectors: (B, N, d) float32, the codes' vectors with the gradient of the input (straight-through). codes: (B, N)
    long. loss: () weighted sum of the terms. logs: each term alone, detached."""

    vectors: Tensor
    codes: Tensor
    loss: Tensor
    logs: dict[str, Tensor]


def uniform(shape: Sequence[int], device: torch.device, generator: Generators = None) -> Tensor:
    """Uniform [0, 1) float32 numbers. generator: one, on `device`; or one a clip, so that a clip's numbers do not
    depend on the batch it is in; or None for the global one."""
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} clips: give one a clip, or a single one")
        numbers = torch.empty(shape, device=device)
        for row, one in zip(numbers, generator):
            row.uniform_(generator=one)
        return numbers
    return torch.rand(shape, generator=generator, device=device)


class GumbelMax(Fused):
    """Draws from softmax(logits): the largest logit with Gumbel noise. torch.multinomial would wait for the GPU to
    check its input."""

    def forward(self, logits: Tensor, noise: Tensor) -> Tensor:
        """logits: (B, N, K) float32. noise: (B, N, K) float32, of `uniform`. Returns (B, N) long."""
        return (logits - (-noise.log()).log()).argmax(-1)


class VectorQuantizer(nn.Module):
    def __init__(self, dim: int, config: VQArgs):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size, dim)
        nn.init.kaiming_uniform_(self.embedding.weight)
        self.draw = GumbelMax()
        if config.stochastic and config.stochastic_temperature < 0:
            self.stochastic_temperature_inv = nn.Parameter(torch.tensor(-1 / config.stochastic_temperature))

    def codebook(self) -> Tensor:
        """(K, d) float32, of unit length where the configuration says so."""
        weight = self.embedding.weight.float()
        return F.normalize(weight, dim=-1) if self.config.l2_normalized else weight

    def forward(
        self,
        z: Tensor,
        deterministic: bool = False,
        temperature: float | Tensor | None = None,
        generator: Generators = None,
    ) -> Quantized:
        """z: (B, N, d), any float dtype. deterministic: the best code instead of a draw. temperature: of the draw,
        instead of the configured one (annealing)."""
        c = self.config
        # Half precision cannot order thousands of cosines: bfloat16 has 128 values in [0.5, 1), and in the released
        # model the two best cosines are at times only 5e-5 apart.
        with torch.autocast(z.device.type, enabled=False):
            codebook = self.codebook()  # (K, d)
            z = F.normalize(z.float(), dim=-1) if c.l2_normalized else z.float()  # (B, N, d)
            similarity = z.detach() @ codebook.detach().T  # (B, N, K)
            if not c.l2_normalized:
                similarity = 2 * similarity - codebook.detach().square().sum(-1)  # |z|^2 less the squared distance
            # For unit vectors the nearest code has the largest cosine, so one argmax serves both cases.
            draw = c.stochastic and not deterministic
            logits = similarity * self._sharpness(temperature) if draw else similarity
            if draw:
                codes = self.draw(logits.detach(), uniform(logits.shape, logits.device, generator))  # (B, N)
            else:
                codes = similarity.argmax(-1)
            code = F.embedding(codes, codebook)  # (B, N, d)

            terms = {"commitment": F.mse_loss(z, code.detach()), "codebook": F.mse_loss(code, z.detach())}
            loss = c.commitment_loss_weight * terms["commitment"] + c.codebook_loss_weight * terms["codebook"]
            if c.entropy_loss_weight:
                terms["entropy"] = entropy_loss(z, codebook, c.entropy_loss_temperature)
                loss = loss + c.entropy_loss_weight * terms["entropy"]

            vectors = code.detach() + (z - z.detach())  # exactly the code, with z's gradient
            if draw and logits.requires_grad:
                # A draw has no gradient. The learned temperature gets that of the expected code (straight-through
                # softmax, arXiv 1611.01144), which does not reach z or the codebook.
                expected = logits.softmax(-1) @ codebook.detach()
                vectors = vectors + (expected - expected.detach())
        return Quantized(vectors, codes, loss, {name: term.detach() for name, term in terms.items()})

    def _sharpness(self, temperature: float | Tensor | None) -> float | Tensor:
        """One over the temperature."""
        if temperature is not None:
            return 1 / temperature
        if self.config.stochastic_temperature < 0:
            return self.stochastic_temperature_inv.float()
        return 1 / self.config.stochastic_temperature


def entropy_loss(z: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """Mean entropy of each vector's soft assignment, less the entropy of the mean assignment: low when every vector is
    sure of its code and all codes are used (MAGVIT-v2, arXiv 2310.05737, section 3).

    z: (B, N, d). codebook: (K, d). Assignment: softmax over -|z - code|^2 / temperature.
    """
    logits = (2 * z @ codebook.T - codebook.square().sum(-1)) / temperature  # (B, N, K), less |z|^2 / temperature
    p, log_p = logits.softmax(-1), logits.log_softmax(-1)  # log_p.exp() takes ten times as long on a CPU: denormals
    mean_p = p.flatten(0, -2).mean(0)  # (K,)
    sample_entropy = -(p * log_p).sum(-1).mean()
    return sample_entropy + (mean_p * mean_p.clamp_min(1e-8).log()).sum()


class Bottleneck(nn.Module):
    def __init__(self, config: BottleneckArgs, in_dim: int, out_dim: int):
        super().__init__()
        self.in_linear = nn.Linear(in_dim, config.bottleneck_dim)
        self.norm = nn.Identity() if is_none(config.norm) else nn.LayerNorm(config.bottleneck_dim, eps=1e-5)
        self.regularizer = VectorQuantizer(config.bottleneck_dim, config.regularizer.args)
        self.out_linear = nn.Linear(config.bottleneck_dim, out_dim)

    def forward(self, latents: Tensor, **how) -> Quantized:
        """latents: (B, N, in_dim). how: as VectorQuantizer.forward takes it."""
        return self.regularizer(self.norm(self.in_linear(latents)), **how)

    def lookup(self, codes: Tensor) -> Tensor:
        """codes: (B, N) long -> (B, N, d) float32 vectors, equal to Quantized.vectors."""
        return F.embedding(codes, self.regularizer.codebook())

    def expand(self, vectors: Tensor) -> Tensor:
        """vectors: (B, N, d) -> (B, N, out_dim)."""
        return self.out_linear(vectors.to(self.out_linear.weight.dtype))  # float32, also in a model cast to half
