"""Adversarial losses on discriminator logits: pure functions, except for LeCam's moving averages.

A step updates the discriminator first, on detached reconstructions, and then the generator against the updated one:

    loss, logs = discriminator_loss(disc(video), disc(fake.detach()), "ns_smooth")
    with frozen(disc):
        generator_loss(disc(fake), "ns_smooth")
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.configs import GAN_LOSSES


def discriminator_loss(
    real: Tensor, fake: Tensor, kind: str, noise: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """real, fake: (B,) logits. noise: (2, B) standard normal n of the targets of "ns_smooth"; None draws it.

    "ns": non-saturating, BCE against 1 and 0, summed. "ns_smooth": the targets are noisy on one side, real
    1 - 0.15 |n| but at least 0.7, fake 0.15 |n| but at most 0.3, n normal. "hinge": half the sum of the two hinges.
    Returns the loss () and logs: mean logits.
    """
    check_kind(kind)
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    else:
        real_doubt, fake_doubt = torch.zeros_like(real), torch.zeros_like(fake)
        if kind == "ns_smooth":
            noise = torch.randn(2, *real.shape, device=real.device) if noise is None else noise
            real_doubt, fake_doubt = (0.15 * noise.abs()).clamp(max=0.3)
        loss = F.binary_cross_entropy_with_logits(real, 1 - real_doubt)
        loss = loss + F.binary_cross_entropy_with_logits(fake, fake_doubt)
    return loss, {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}


def generator_loss(fake: Tensor, kind: str) -> Tensor:
    """fake: (B,) logits of reconstructions, with gradient. Returns ()."""
    check_kind(kind)
    return -fake.float().mean() if kind == "hinge" else F.softplus(-fake.float()).mean()


def check_kind(kind: str) -> None:
    if kind not in GAN_LOSSES:
        raise ValueError(f"the adversarial loss is one of {', '.join(GAN_LOSSES)}, got {kind!r}: change --disc_loss")


class LeCam(nn.Module):
    """Regularisation of a discriminator on little data (arXiv 2104.03310): real logits are pulled towards the moving
    average of fake ones and vice versa. Call it, then `update` it, once in each discriminator step. The released code
    multiplies by the weight of 0.001 twice; here the caller applies it once."""

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """real, fake: logits, or their mean over all processes, with gradient. Returns ()."""
        high = F.relu(real.float().mean() - self.fake)
        low = F.relu(self.real - fake.float().mean())
        return high.square() + low.square()

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> None:
        """real, fake: as in `forward`; with several processes means over all, so that their averages stay equal."""
        self.real.lerp_(real.float().mean(), 1 - self.decay)
        self.fake.lerp_(fake.float().mean(), 1 - self.decay)


def r1_penalty(discriminator: nn.Module, video: Tensor) -> Tensor:
    """Mean over clips of the squared norm of the logit's gradient (R1, arXiv 1801.04406; without its half).

    video: (B, 3, T, H, W) real clips. Returns (), differentiable.
    """
    video = video.detach().requires_grad_()
    # Fused attention and compiled blocks have no second derivative; squares of small gradients underflow in half
    # precision.
    with (torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH),
          torch.autocast(video.device.type, enabled=False)):
        (gradient,) = torch.autograd.grad(discriminator(video).sum(), video, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Inside, gradients pass through `module` to its input and leave none on its parameters. The forward belongs
    inside; the backward may follow outside, unless activations are checkpointed. Give it, and call, the bare module:
    DistributedDataParallel would wait for gradients that are never computed."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield module
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
