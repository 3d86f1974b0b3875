import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.discriminator import Discriminator
from models.gan import GAN_LOSSES, LeCam, discriminator_loss, frozen, generator_loss, r1_penalty


def test_losses_by_hand():
    real, fake = torch.tensor([0.0, 3.0]), torch.tensor([0.0, -0.5])
    assert discriminator_loss(real, fake, "hinge")[0].item() == pytest.approx((0.5 + 0.75) / 2)
    ns = (2 * math.log(2) + math.log1p(math.exp(-3)) + math.log1p(math.exp(-0.5))) / 2
    loss, logs = discriminator_loss(real, fake, "ns")
    assert loss.item() == pytest.approx(ns)
    assert (logs["logits_real"].item(), logs["logits_fake"].item()) == (1.5, -0.25)
    assert generator_loss(fake, "hinge").item() == 0.25
    assert generator_loss(fake, "ns").item() == pytest.approx((math.log(2) + math.log1p(math.exp(0.5))) / 2)


def test_smooth_targets_are_noisy_on_one_side():
    """d BCE / d logit = sigmoid - target, so that the gradient at logit 0 tells each target."""
    real, fake = torch.zeros(2, 20_000, requires_grad=True)
    loss, _ = discriminator_loss(real, fake, "ns_smooth")
    grads = torch.autograd.grad(loss, (real, fake))
    real_target, fake_target = (0.5 - len(real) * grad for grad in grads)
    assert real_target.min().item() == pytest.approx(0.7, abs=1e-3) and real_target.max() <= 1 + 1e-5
    assert fake_target.max().item() == pytest.approx(0.3, abs=1e-3) and fake_target.min() >= -1e-5
    clamped = math.erfc(2 / math.sqrt(2))  # |n| > 2
    assert (real_target < 0.7 + 1e-4).float().mean().item() == pytest.approx(clamped, abs=0.01)
    assert (1 - real_target).mean().item() == pytest.approx(fake_target.mean().item(), abs=0.005)
    assert not torch.allclose(1 - real_target, fake_target)  # each has its own noise


def test_the_noise_of_targets_can_be_given():
    logits, noise = torch.tensor([0.5, -1.0]), torch.tensor([[-1.0, 4.0], [0.0, 1.0]])
    loss, _ = discriminator_loss(logits, logits, "ns_smooth", noise)
    expected = [F.binary_cross_entropy_with_logits(logits, torch.tensor(t)) for t in ([0.85, 0.7], [0.0, 0.15])]
    torch.testing.assert_close(loss, sum(expected))


@pytest.mark.parametrize("kind", GAN_LOSSES)
def test_generator_and_discriminator_pull_apart(kind):
    logits = torch.zeros(2, requires_grad=True)
    (up,) = torch.autograd.grad(generator_loss(logits, kind), logits)
    (down,) = torch.autograd.grad(discriminator_loss(torch.zeros(2), logits, kind)[0], logits)
    assert (up < 0).all() and (down > 0).all()


def test_unknown_loss():
    with pytest.raises(ValueError, match="got 'wgan': change --disc_loss"):
        generator_loss(torch.zeros(1), "wgan")


def test_generator_loss_leaves_nothing_on_the_discriminator():
    disc = Discriminator(hidden_size=32, n_heads=2, n_layers=1, input_size=16, frame_num=4)
    disc.fc.bias.requires_grad_(False)
    fake = torch.rand(2, 3, 4, 16, 16, requires_grad=True)
    with frozen(disc):
        loss = generator_loss(disc(fake), "ns_smooth")
    loss.backward()
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in disc.parameters())
    assert {name for name, p in disc.named_parameters() if not p.requires_grad} == {"fc.bias"}  # as it was


def test_discriminator_loss_leaves_nothing_on_detached_reconstructions():
    disc, fake = nn.Linear(4, 1), torch.rand(2, 4, requires_grad=True)
    discriminator_loss(disc(torch.rand(2, 4)), disc(fake.detach()), "ns_smooth")[0].backward()
    assert fake.grad is None and disc.weight.grad.any()


def test_lecam_is_updated_after_use():
    lecam = LeCam()
    real, fake = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([-2.0, -4.0], requires_grad=True)
    penalty = lecam(real, fake)
    assert penalty.item() == 4 + 9  # against averages of 0
    lecam.update(real, fake)
    assert lecam.real.item() == pytest.approx(0.002) and lecam.fake.item() == pytest.approx(-0.003)
    penalty.backward()  # the update spoils no graph
    torch.testing.assert_close(real.grad, torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(fake.grad, torch.tensor([-3.0, -3.0]))
    assert lecam(real.mean(), fake.mean()).item() == pytest.approx(2.003**2 + 3.002**2)  # means are welcome too
    assert set(lecam.state_dict()) == {"real", "fake"}


def test_r1_of_a_linear_discriminator_is_its_squared_weight():
    disc = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    video = torch.rand(5, 3, 1, 2, 2)
    penalty = r1_penalty(disc, video)
    torch.testing.assert_close(penalty, disc[1].weight.square().sum())
    penalty.backward()
    torch.testing.assert_close(disc[1].weight.grad, 2 * disc[1].weight)
    assert not video.requires_grad


def test_r1_stays_in_float32_and_reaches_every_layer():
    disc = Discriminator(hidden_size=32, n_heads=2, n_layers=1, input_size=16, frame_num=4)
    video = torch.rand(2, 3, 4, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = r1_penalty(disc, video)
    assert penalty.dtype == torch.float32
    assert torch.equal(penalty, r1_penalty(disc, video))
    penalty.backward()
    assert disc.transformer_encoder.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    video.requires_grad_()
    (gradient,) = torch.autograd.grad(disc(video).sum(), video)
    torch.testing.assert_close(penalty.detach(), F.mse_loss(gradient, 0 * gradient, reduction="sum") / 2)
