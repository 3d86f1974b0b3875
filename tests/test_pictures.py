import numpy as np
import pytest
import torch
from PIL import Image

from eval.pictures import MARGIN, contact_sheet


def test_frames_stand_where_they_should(tmp_path):
    """Frame k of clip c has its own grey: find each, in order, from the first frame to the last."""
    clips = [tuple(torch.full((3, 9, 16, 24), 0.0) for _ in range(2)) for _ in range(3)]
    for c, clip in enumerate(clips):
        for v, video in enumerate(clip):
            video += (torch.arange(9).view(1, 9, 1, 1) + 10 * (2 * c + v) + 50) / 255
    contact_sheet(tmp_path / "new" / "sheet.png", clips, num_clips=2, num_frames=3)
    pixels = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))[..., 0]
    for row in range(4):
        for frame in (0, 4, 8):
            assert (pixels == 50 + 10 * row + frame).sum() >= 16 * 24
    assert not (pixels == 90).sum() >= 16 * 24, "the third clip is not asked for"
    assert pixels.shape[1] > 3 * 24 + 2 * MARGIN


def test_single_clips_short_clips_and_values_out_of_range(tmp_path):
    contact_sheet(tmp_path / "a.png", [(torch.full((3, 2, 16, 16), 1.7),)], captions=["jump"], num_frames=8)
    assert 2 * 96 <= Image.open(tmp_path / "a.png").width < 3 * 96, "two frames, in larger pixels"


def test_shapes_must_agree(tmp_path):
    with pytest.raises(ValueError, match="one shape"):
        contact_sheet(tmp_path / "a.png", [(torch.zeros(3, 4, 8, 8), torch.zeros(3, 5, 8, 8))])
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet(tmp_path / "a.png", [])
