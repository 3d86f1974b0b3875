import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import config_diff
from data.clips import ClipDataset, ClipKey
from data.lists import VideoFile
from data.video import read_frames, write_video
from eval.pictures import MARGIN, OUTLINE, SMALLEST, TEXT
from models.interpolant import Interpolant
from models.sit import SiT
from models.triplane import Planes
from sampling.sit import sample_labels, sample_planes
from training.latents import LatentStats
from training.load import TrainedSiT
from training.validation import SampleCheck


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


@pytest.mark.parametrize("num_given", [0, 2])
def test_pictures_of_samples(tmp_path, num_given):
    """Sample i has its own grey; where it continues clip i, that clip stands above it, in its own grey too,
    and the given frames have a border."""
    files = [VideoFile(str(tmp_path / f"{i}.mp4")) for i in range(2)]
    for i, file in enumerate(files):
        write_video(file.path, torch.full((3, 4, 32, 32), (40 + 40 * i) / 255))
    clips = ClipDataset(files, 4, 32, "larp", damaged="replace")
    check = SampleCheck(clips, [ClipKey(i, 1 - i) for i in range(2)], 1, 0, torch.device("cpu"), num_given)

    def generate(indices):
        return torch.full((1, 3, 4, 32, 32), (150 + 50 * indices[0]) / 255)

    assert check.run(generate, ["a", "b"], tmp_path / "samples") == {}, "clips of 4 frames have no FVD"
    pixels = np.asarray(Image.open(tmp_path / "samples.png").convert("L")).astype(int)
    greys = [80, 150, 40, 200] if num_given else [150, 200]
    height = SMALLEST + MARGIN
    assert pixels.shape[0] == MARGIN + 2 * TEXT + len(greys) * height
    for row, grey in enumerate(greys):
        clip, place = divmod(row, len(greys) // 2)
        top = MARGIN + clip * (TEXT + height * len(greys) // 2) + TEXT + place * height
        assert abs(pixels[top + 1 : top + SMALLEST - 1, -20] - grey).max() <= 3, "3: what mp4 loses"
    video = read_frames(str(tmp_path / "samples.mp4"), range(4))
    assert video.shape[1:3] == (32 * len(greys) // 2, 64)
    corners = np.asarray(video)[:, 0, 0].astype(int)
    assert [abs(corner - 255 * np.array(OUTLINE)).max() < 60 for corner in corners] == [i < num_given for i in range(4)]


def test_differences():
    assert config_diff({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}) == "b 2 there, 3 here"
