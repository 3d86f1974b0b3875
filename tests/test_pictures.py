import numpy as np
import pytest
import torch
from PIL import Image

from data.video import read_frames
from eval.pictures import MARGIN, OUTLINE, contact_sheet, outline, write_clips


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


def test_given_frames_have_a_border_and_no_other_pixel_changes():
    video = torch.rand(3, 4, 64, 64)
    before = video.clone()
    shown = outline(video, 2)
    assert torch.equal(video, before) and torch.equal(shown[:, 2:], video[:, 2:])
    assert torch.equal(shown[:, :2, 2:-2, 2:-2], video[:, :2, 2:-2, 2:-2])
    for side in (shown[:, :2, :2], shown[:, :2, -2:], shown[:, :2, :, :2], shown[:, :2, :, -2:]):
        assert torch.equal(side, torch.tensor(OUTLINE).view(3, 1, 1, 1).expand_as(side))
    assert torch.equal(outline(video, 0), video)


def test_clips_stand_beside_their_reconstructions(tmp_path):
    """Greys: 40 and 80 in the first clip, 120 and 160 in the second. What an earlier call wrote is gone."""
    clips = [[torch.full((3, 3, 32, 48), (40 + 80 * i + 40 * j) / 255) for j in range(2)] for i in range(3)]
    write_clips(tmp_path / "pairs", clips, num_clips=3)
    write_clips(tmp_path / "pairs", clips, num_clips=2)
    paths = sorted((tmp_path / "pairs").iterdir())
    assert [path.name for path in paths] == ["000000.mp4", "000001.mp4"]
    for i, path in enumerate(paths):
        frames = np.asarray(read_frames(str(path), range(3))).astype(int)
        assert frames.shape == (3, 32, 96, 3)
        assert abs(frames[:, :, :48] - 40 - 80 * i).max() <= 3 and abs(frames[:, :, 48:] - 80 - 80 * i).max() <= 3
