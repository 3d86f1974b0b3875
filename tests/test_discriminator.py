import copy
import pickle

import pytest
import torch

from models.discriminator import Discriminator
from models.gan import LeCam, discriminator_loss, generator_loss, r1_penalty
from models.layers import set_checkpointing

TINY = {"hidden_size": 32, "n_heads": 2, "n_layers": 2, "input_size": 16, "frame_num": 8}


def test_reference_case(reference):
    """The authors' logits, hinge and non-saturating losses, LeCam and R1."""
    case, expected = reference.case("larp_discriminator_tiny")
    model = Discriminator(**case["config"])
    model.load_state_dict(reference.state_dict(case["parameters"]))
    assert (model.norm_final.eps, model.transformer_encoder.blocks[0].norm1.eps) == (1e-6, 1e-5)  # below the tolerance
    c = model.config
    shape = (3, 3, c.frame_num, c.input_size, c.input_size)
    video, fake = (reference.noise(case["tag"] + kind, shape).sigmoid() for kind in ("real", "fake"))
    real_logits, fake_logits = model(video), model(fake)
    lecam = LeCam()
    lecam.real.fill_(case["lecam_ema"]["real"])
    lecam.fake.fill_(case["lecam_ema"]["fake"])
    found = {
        "logits_real": real_logits,
        "logits_fake": fake_logits,
        "hinge_d": discriminator_loss(real_logits, fake_logits, "hinge")[0],
        "hinge_g": generator_loss(fake_logits, "hinge"),
        "ns_d": discriminator_loss(real_logits, fake_logits, "ns")[0],
        "ns_g": generator_loss(fake_logits, "ns"),
        "lecam": lecam(real_logits, fake_logits),
        "r1": r1_penalty(model, video),
    }
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.detach().reshape(-1), expected[name], rtol=0, atol=5e-6, msg=name)


def test_fewer_frames_take_the_first_positions():
    model = Discriminator(**TINY)
    short = Discriminator(**{**TINY, "frame_num": 4})
    short.load_state_dict(model.state_dict())
    video = torch.rand(2, 3, 4, 16, 16)
    torch.testing.assert_close(model(video), short(video))


def test_initialisation():
    model = Discriminator(**TINY)
    bound = (6 / (3 * 4 * 8 * 8 + 32)) ** 0.5  # Xavier's, of the patch convolution as a linear map
    assert 0.98 * bound < model.x_embedder.proj.weight.abs().max() <= bound
    assert not model.fc.bias.any() and not model.x_embedder.proj.bias.any()
    assert model.cls_token.abs().max() <= (6 / 64) ** 0.5


def test_copies_and_checkpointing():
    model, video = Discriminator(**TINY), torch.rand(1, 3, 8, 16, 16)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(video), model(video))
    gradients = []
    for enabled in (False, True):
        set_checkpointing(model, enabled)
        gradients.append(torch.autograd.grad(model(video).sum(), model.x_embedder.proj.weight)[0])
    torch.testing.assert_close(*gradients)


def test_config_errors():
    with pytest.raises(ValueError, match="hidden_size 30 is not a multiple of its n_heads 4.*--disc_hidden_size"):
        Discriminator(hidden_size=30, n_heads=4)
    with pytest.raises(TypeError, match="width"):
        Discriminator(width=512)
