"""Samples of a SiT: sampling/sit.py."""
import numpy as np
import pytest
import torch

from eval.motion import rollout_seams
from models.interpolant import Interpolant
from models.sit import SiT
from models.triplane import Planes
from sampling.sit import sample_labels, sample_planes, sample_rollout
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


def stats_of(channels, mean=0.0, std=1.0):
    values = ([torch.full((channels,), value) for _ in range(3)] for value in (mean, std))
    return LatentStats(*(Planes(*planes) for planes in values))


@pytest.mark.parametrize("settings", [{}, {"mode": "ODE", "method": "dopri5"}, {"cfg_scale": 3.0}])
def test_rollouts_do_not_depend_on_the_batch_and_begin_as_a_single_clip(settings):
    sit = SiT(input_size=(4, 4), in_channels=2, hidden_size=16, depth=1, num_heads=2, num_classes=3,
              class_dropout_prob=0.1, condition_on_previous=True).eval().requires_grad_(False)
    for parameter in sit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    trained = TrainedSiT(sit, Interpolant(), stats_of(2, 0.5, 2.0), [])

    def sample(indices, num_clips):
        labels = torch.tensor([index % 3 for index in indices])
        return sample_rollout(trained, indices, 7, labels, num_clips, num_steps=5, **settings)

    together = sample([3, 8], 3)
    assert len(together) == 3 and together[2].yt.shape == (2, 4, 4, 2)
    for place, index in enumerate([3, 8]):
        for clips, alone in zip(together, sample([index], 3)):
            torch.testing.assert_close(clips.yt[place : place + 1], alone.yt, atol=1e-5, rtol=1e-4)
    assert torch.equal(sample([3, 8], 1)[0].xt, together[0].xt)
    assert (together[1].xt - together[0].xt).abs().max() > 0.1 < (together[2].xt - together[1].xt).abs().max()


def test_clips_of_a_model_that_goes_on_where_the_last_one_ended_have_no_seams():
    """Its velocity leads to a ramp in time from the last value of the clip before, in standardised planes."""
    frames, stats = 8, stats_of(1, 0.2, 0.5)

    class Continues(torch.nn.Module):
        plane_shapes = ((1, 4, 4), (1, frames, 4), (1, frames, 4))

        def forward(self, planes, t, y, previous=None):
            start = -1.0 if previous is None or self.forgets else previous.yt[:, :, -1:] + 0.05
            ramp = start + 0.05 * torch.arange(frames).view(1, 1, frames, 1)
            return Planes(*((ramp[:, :, : x.shape[2]] - x) / (1 - t[:, None, None, None]) for x in planes))

    model = Continues()
    trained = TrainedSiT(model, Interpolant(), stats, [])
    for model.forgets in (False, True):
        clips = sample_rollout(trained, [0, 1], 0, torch.zeros(2, dtype=torch.long), 4, mode="ODE", method="euler",
                               num_steps=9)
        levels = torch.cat([planes.yt[:, :, 0, 0] for planes in clips], dim=1)  # (2, 32)
        video = (levels + 0.5)[:, None, :, None, None].expand(2, 3, -1, 16, 16)
        seams = rollout_seams(video, range(frames, 4 * frames, frames))
        if model.forgets:
            assert seams.min() > 5
        else:
            expected = 0.2 + 0.5 * (-1 + 0.05 * torch.arange(4 * frames))
            torch.testing.assert_close(levels, expected.expand(2, -1), atol=1e-4, rtol=0)
            assert seams.tolist() == pytest.approx([1, 1], rel=1e-2)


def test_a_trained_model_copies_the_clip_before():
    """Clips of one level each, which stays from clip to clip: the levels of a sample stay, those of samples differ."""
    sit = SiT(input_size=(4, 4), in_channels=1, hidden_size=32, depth=1, num_heads=2, condition_on_previous=True)
    optimizer, interpolant = torch.optim.AdamW(sit.parameters(), lr=5e-3), Interpolant()
    for _ in range(120):
        planes = Planes(*(torch.randn(64, 1, 1, 1).expand(64, 1, 4, 4),) * 3)
        losses, _ = interpolant.loss(sit, planes, y=torch.zeros(64, dtype=torch.long), previous=planes,
                                     first=torch.rand(64) < 0.2)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    trained = TrainedSiT(sit.eval().requires_grad_(False), interpolant, stats_of(1), [])
    clips = sample_rollout(trained, range(32), 0, torch.zeros(32, dtype=torch.long), 3, mode="ODE", method="euler",
                           num_steps=20)
    levels = torch.stack([planes.yt.mean((1, 2, 3)) for planes in clips])  # (clips, samples)
    between = (levels[0] - levels[0].roll(1)).abs().mean()
    assert levels.diff(dim=0).abs().mean() < 0.3 * between > 0.1
