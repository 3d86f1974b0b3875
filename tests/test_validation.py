from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.clips import ClipDataset, ClipKey, open_quarantine
from data.lists import VideoFile
from data.video import read_frames, write_video
from eval.i3d import I3D
from eval.pictures import MARGIN, OUTLINE, SMALLEST, TEXT
from training.validation import SampleCheck, make_validation, validation_source


@pytest.mark.parametrize(("flags", "expected", "says"), [
    ({"video_name": "A_train"}, "{root}/A_test", ""),
    ({"video_name": "A_train", "val_name": "B"}, "{root}/B", ""),
    ({"video_name": "B"}, "{root}/B", "validating on the training set, B: give --val_name"),
    ({"csv_file": "k_train.csv+u_train.csv"}, "k_val.csv+u_val.csv", ""),
    ({"csv_file": "k_train.csv", "val_csv": "u_val.csv"}, "u_val.csv", ""),
    ({"csv_file": "mine.csv"}, "mine.csv", "validating on the training set, mine.csv: give --val_csv"),
    ({"csv_file": "mine.csv", "val_csv": "mine.csv"}, "mine.csv", ""),
])
def test_what_is_validated_on(tmp_path, capsys, flags, expected, says):
    (tmp_path / "A_test").mkdir()
    none = {"video_name": None, "val_name": None, "val_csv": None}
    args = Namespace(**{**none, "data_root": str(tmp_path), **flags})
    assert validation_source(args) == expected.format(root=tmp_path)
    said = capsys.readouterr().out
    assert said.startswith(says) and bool(said) == bool(says)


@pytest.mark.parametrize("num_given", [0, 2])
def test_pictures_of_samples(tmp_path, num_given):
    """Sample i has its own grey; where it continues clip i, that clip stands above it, in its own grey too, and
    the given frames have a border."""
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


def test_no_fvd_loads_no_i3d(monkeypatch, tmp_path):
    loaded = []
    monkeypatch.setattr(I3D, "from_weights", lambda *_: loaded.append(1) or torch.nn.Identity())
    (tmp_path / "A_test" / "Run").mkdir(parents=True)
    write_video(str(tmp_path / "A_test" / "Run" / "a.mp4"), torch.rand(3, 12, 32, 32))
    device, quarantine = torch.device("cpu"), open_quarantine(tmp_path, 60)
    args = Namespace(data_root=str(tmp_path), video_name="A_test", val_name=None, num_val=1, val_batch_size=1,
                     num_workers=0, perceptual="stlpips", lpips_weights="random", decode_timeout=60)
    for no_fvd in (False, True):
        validation = make_validation(Namespace(**vars(args), no_fvd=no_fvd), 12, 32, "larp", device, quarantine)
        check = SampleCheck(validation.loader.dataset, [ClipKey(0, 0)] * 2, 1, 0, device, fvd=not no_fvd)
        assert (validation.i3d is None) == (check.i3d is None) == no_fvd
    assert len(loaded) == 2
