"""Samples of a SiT: sampling/sit.py."""
import numpy as np
import pytest
import torch

from models.interpolant import Interpolant
from models.sit import SiT
from models.triplane import Planes
from sampling.sit import sample_labels, sample_planes
from training.latents import LatentStats
from training.load import TrainedSiT


def test_labels_are_functions_of_seed_and_index():
    labels = sample_labels(range(300), 3, 0)
    assert labels[100:110] == sample_labels(range(100, 110), 3, 0)
    assert np.bincount(labels).min() > 70
    assert labels != sample_labels(range(300), 3, 1)


@pytest.mark.parametrize("settings", [{}, {"mode": "ODE", "method": "heun3"}, {"cfg_scale": 3.0}])
def test_planes_of_a_sample_do_not_depend_on_the_batch(settings):
    sit = SiT(input_size=(4, 4), in_channels=2, hidden_size=16, depth=1, num_heads=2, num_classes=3,
              class_dropout_prob=0.1).eval().requires_grad_(False)
    for parameter in sit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ones = Planes(*(torch.ones(2) for _ in range(3)))
    trained = TrainedSiT(sit, Interpolant(), LatentStats(ones, ones), [])

    def sample(indices):
        labels = torch.tensor([index % 3 for index in indices])
        return sample_planes(trained, indices, 7, labels, num_steps=5, **settings)

    together = sample([3, 8, 1])
    for place, index in enumerate([3, 8, 1]):
        for batch, alone in zip(together, sample([index])):
            torch.testing.assert_close(batch[place : place + 1], alone, atol=1e-5, rtol=1e-4)
    assert together.xy.shape == (3, 4, 4, 2), "channels last, as tokenizers have them"
