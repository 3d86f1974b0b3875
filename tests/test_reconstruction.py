"""eval/reconstruction.py, and eval/evaluate.py, which calls it."""
import dataclasses
import math

import pytest
import torch

import data.clips
from data.clips import ClipDataset, ClipKey, Quarantine
from data.lists import VideoFile
from data.video import probe, write_video
from eval import fvd
from eval.protocols import PROTOCOLS
from eval.reconstruction import merge, protocol_clips, reconstruct_rows, summary
from sampling.real_clips import drawn_clips, segments
from training.validation import Validation


def rows(index, psnr):
    return {"index": torch.tensor(index), "psnr_frame": torch.tensor(psnr, dtype=torch.float64)}


def test_rows_of_all_processes_come_together_in_order():
    merged = merge([rows([1, 3], [10.0, 30.0]), {}, rows([0, 2], [0.0, 20.0])])
    assert merged["psnr_frame"].tolist() == [0, 10, 20, 30]
    assert summary(merged, "N") == {"clips": 4, "psnr_frame": 15}


def test_a_clip_counted_twice_is_an_error():
    with pytest.raises(ValueError, match="a clip is there twice|counted twice"):
        merge([rows([0, 1], [1.0, 1.0]), rows([1], [1.0])])
    with pytest.raises(ValueError, match="no clip could be evaluated"):
        merge([{}, {}])


def test_clips_without_error_are_counted_beside_the_mean():
    assert summary(rows([0, 1, 2], [10.0, math.inf, 30.0]), "N") == {
        "clips": 3, "psnr_frame": 20, "psnr_frame_infinite": 1
    }


class Batches(list):
    """Stands for a loader of clips."""

    dataset = ClipDataset([VideoFile("null:0")], 6, 16, "coordtok")


def test_rows_of_a_perfect_and_of_a_mean_frame_reconstruction():
    frames = (torch.rand(2, 6, 16, 16, 3) * 255).to(torch.uint8)
    batch = {"position": torch.tensor([0, 1]), "frames": frames}
    empty = {"position": torch.tensor([], dtype=torch.long), "frames": []}

    def mean_frame(video, _):
        return video.mean(2, keepdim=True).expand_as(video)

    found, examples = reconstruct_rows(mean_frame, Batches([empty, batch]), torch.device("cpu"))
    assert torch.equal(found["psnr_frame"], found["psnr_mean_frame"])
    assert len(examples) == 2
    perfect, _ = reconstruct_rows(lambda video, _: video, Batches([batch]), torch.device("cpu"))
    assert summary(perfect, "N")["mse"] == 0
    assert summary(perfect, "N")["psnr_frame_infinite"] == 2


def test_motion_is_measured_of_the_chosen_clips():
    """Whatever the batches: one of them has no chosen clip."""
    frames = (torch.rand(3, 6, 16, 16, 3) * 255).to(torch.uint8)
    batches = [{"position": torch.arange(i, i + n), "frames": frames[i : i + n]} for i, n in ((0, 1), (1, 2))]

    def still(video, _):
        return video[:, :, :1].expand_as(video)

    def numbers(loader):
        rows, _ = reconstruct_rows(still, loader, torch.device("cpu"), motion_of={2}, patch=(1, 8, 8))
        return summary(rows, "N")

    found = numbers(Batches(batches))
    assert found["motion_clips"] == 1 and found["frozen"] == 1 and found["frozen_real"] == 0 and found["flicker"] == 0
    assert found["flicker_real"] > 0.1 and found["seams_xy"] > 0 and found["clips"] == 3
    assert found == pytest.approx(numbers(Batches([{"position": torch.arange(3), "frames": frames}])))
    assert "warping_error" not in summary(reconstruct_rows(still, Batches(batches), torch.device("cpu"))[0], "N")


def test_clips_of_the_protocols(tmp_path):
    for name, frames in (("a", 12), ("b", 5), ("c", 10)):
        write_video(tmp_path / f"{name}.mp4", torch.rand(3, frames, 32, 64))
    (tmp_path / "d.mp4").write_bytes(b"")
    files = [VideoFile(str(tmp_path / f"{name}.mp4")) for name in "abcd"]
    quarantine = Quarantine()
    kept, keys = protocol_clips(PROTOCOLS["coordtok_rfvd10k_128f"], files, 10, 5, quarantine, 60)
    assert [file.path[-5] for file in kept] == ["a", "c"], "short and damaged ones are discarded"
    assert keys == [ClipKey(i, i % 2) for i in range(5)]
    assert files[3].path in quarantine
    kept, keys = protocol_clips(PROTOCOLS["larp_rfvd"], files, 10, None, quarantine, 60)
    assert keys == [ClipKey(i, i) for i in range(4)]
    with pytest.raises(ValueError, match="no video has 20 frames"):
        protocol_clips(PROTOCOLS["coordtok_rfvd10k_128f"], files, 20, 5, quarantine, 60)


def test_the_time_limit_holds_wherever_files_are_opened(monkeypatch, tmp_path):
    """For lengths, for validation's clips, for those of two folders: what is given is what each file gets."""
    files, used = [VideoFile(f"null:{i}") for i in range(4)], []
    monkeypatch.setattr("eval.reconstruction.probe", lambda path, timeout: used.append(timeout) or probe(path))
    read = data.clips.read_chosen
    monkeypatch.setattr(data.clips, "read_chosen", lambda path, choose, limit: used.append(limit) or read(path, choose))
    clips = ClipDataset(files, 4, 16, "larp", damaged="skip", timeout=7)

    def check(run):
        used.clear()
        run()
        assert used and set(used) == {7}

    check(lambda: protocol_clips(PROTOCOLS["coordtok_rfvd10k_128f"], files, 10, 4, Quarantine(), 7))
    check(lambda: drawn_clips(clips, 4))
    check(lambda: segments(clips, 4, 0, tmp_path))
    monkeypatch.setattr(Validation, "available", lambda *_: None)
    held_out = Validation(
        files, 4, 4, 16, "larp", torch.device("cpu"), 2, 0, Quarantine(), "lpips", "random", timeout=7
    )
    check(lambda: list(held_out.loader))
    protocol = dataclasses.replace(fvd.FOLDERS, size=16, num_frames=4)

    class Logits(torch.nn.Linear):
        def forward(self, video, resize):
            return video.flatten(1)[:, :400]

    check(lambda: fvd.folder_features(Logits(1, 1), files, protocol, 4, 0, 2, 0, timeout=7))
