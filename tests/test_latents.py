from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.clips import ClipDataset
from data.lists import VideoFile
from data.loader import GlobalBatchSampler
from data.video import VideoError, write_video
from models.coordtok import CoordTokConfig
from models.triplane import Planes
from training import window_cache
from training.latents import LatentCache, LatentStats, batches_from_cache, draw_step, encode_pairs, measure, split_pairs

CONFIG = CoordTokConfig(video_shape=(4, 16, 16), enc_patch_size_xy=16, enc_patch_size_t=4, latent_resolution_xy=2,
                        latent_resolution_t=4, latent_n_features=3, latent_patch_size_xy=2, latent_patch_size_t=2)
CPU = torch.device("cpu")


def planes(batch):
    return Planes(*(2 + 3 * torch.randn(batch, rows, 2, 3) for rows in (2, 4, 4)))


def encode(batch):
    """Planes that say which clip they are of: its position everywhere, but for the last value."""
    values = torch.stack([batch["position"], batch["label"]], dim=1).float()
    return Planes(*(values[:, :1, None, None].expand(-1, rows, 2, 3).clone() for rows in (2, 4, 4)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four videos, the third one damaged."""
    folder = tmp_path_factory.mktemp("videos")
    for i in (0, 1, 3):
        write_video(folder / f"{i}.mp4", torch.rand(3, 6, 32, 32))
    (folder / "2.mp4").write_bytes(b"no video")
    return [VideoFile(str(folder / f"{i}.mp4"), i) for i in range(4)]


@pytest.fixture
def clips(files):
    return ClipDataset(files, 4, 16, "coordtok", seed=5, damaged="skip")


@pytest.fixture
def cache(tmp_path, clips, monkeypatch):
    small = window_cache.RowCache
    monkeypatch.setattr(window_cache, "RowCache", lambda *args: small(*args, shard_rows=5))
    return lambda views=3, config=CONFIG, **key: LatentCache(tmp_path / "cache", clips, config, views, key)


def test_statistics_are_those_of_all_values():
    parts = [planes(n) for n in (3, 1, 4)]
    stats = measure(iter(parts), 3, CPU)
    for name in Planes._fields:
        values = torch.cat([getattr(part, name) for part in parts]).flatten(0, -2)
        torch.testing.assert_close(getattr(stats.mean, name), values.mean(0))
        torch.testing.assert_close(getattr(stats.std, name), values.std(0))


def test_standardised_planes_have_mean_0_and_variance_1_and_come_back():
    batch = planes(50)
    stats = measure(iter([batch]), 3, CPU)
    standard = stats.standardise(batch)
    assert standard.yt.shape == (50, 3, 4, 2), "channels first"
    for plane in standard:
        torch.testing.assert_close(plane.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(plane.std((0, 2, 3)), torch.ones(3))
    for there, back in zip(batch, stats.restore(standard)):
        torch.testing.assert_close(back, there)
    again = LatentStats.from_state_dict(stats.state_dict())
    assert all(torch.equal(a, b) for kind in range(2) for a, b in zip(stats[kind], again[kind]))


def test_a_dead_channel_stays_finite():
    batch = planes(4).map(lambda plane: torch.cat([plane[..., :2], torch.ones_like(plane[..., :1])], dim=-1))
    standard = measure(iter([batch]), 3, CPU).standardise(batch)
    assert all(plane.isfinite().all() and (plane[:, 2] == 0).all() for plane in standard)


def test_the_cache_holds_what_was_encoded(cache, clips):
    filled = cache()
    filled.fill(encode, 2, 0)
    assert filled.rows.num_shards == 3
    assert filled.good_files() == [0, 1, 3]
    rows = np.array([11, 0, 4])
    got = filled.read(rows)
    for plane, shape in zip(got, ((2, 2, 3), (4, 2, 3), (4, 2, 3))):
        assert plane.shape == (3, *shape)
        assert torch.equal(plane[:, 0, 0, 0], torch.tensor([11.0, 0.0, 4.0]))


def test_filling_goes_on_where_it_was_killed(cache):
    class Killed(Exception):
        pass

    calls = []

    def dies(batch):
        calls.append(batch["position"].tolist())
        if len(calls) == 4:
            raise Killed
        return encode(batch)

    with pytest.raises(Killed):
        cache().fill(dies, 2, 0)
    assert cache().rows.missing() == [1, 2], "one whole shard was written"
    calls.clear()
    cache().fill(lambda batch: calls.append(batch["position"].tolist()) or encode(batch), 2, 0)
    assert min(map(min, calls)) == 5, "what is whole is not made again"
    assert cache().rows.missing() == []
    assert cache().good_files() == [0, 1, 3]


def test_another_tokenizer_or_setting_is_another_cache(cache, clips):
    folders = [
        cache().rows.folder, cache(views=4).rows.folder, cache(tokenizer="b").rows.folder,
        cache(config=replace(CONFIG, padding="released")).rows.folder,
    ]
    clips.seed += 1
    folders.append(cache().rows.folder)
    clips.files = clips.files[:3]
    folders.append(cache().rows.folder)
    assert len(set(folders)) == 6


def test_no_good_video_is_an_error(cache, clips):
    clips.files = clips.files[2:3]
    with pytest.raises(VideoError, match="none of 1 videos could be decoded"):
        filled = cache()
        filled.fill(encode, 2, 0)
        filled.good_files()


def test_batches_are_windows_of_the_videos_asked_for_whatever_the_processes(cache):
    filled = cache()
    filled.fill(encode, 4, 0)
    files = filled.good_files()

    def batches(**sharing):
        sampler = GlobalBatchSampler(3, 2, 60, order="epoch", seed=1, **sharing)
        return list(batches_from_cache(filled, sampler, files, CPU))

    whole = batches()
    seen = {}
    for latent, labels, paths in whole:
        rows = latent.xy[:, 0, 0, 0].long()
        assert torch.equal(rows // 3, labels), "a file's rows, with its label"
        assert [Path(path).name for path in paths] == [Path(filled.clips.files[label].path).name for label in labels]
        for row in rows.tolist():
            seen[row] = seen.get(row, 0) + 1
    assert seen.keys() == {0, 1, 2, 3, 4, 5, 9, 10, 11}, "every window is used, none of the damaged video"
    shared = list(zip(batches(rank=0, world_size=2), batches(rank=1, world_size=2)))
    for (latent, _, _), parts in zip(whole, shared):
        assert torch.equal(latent.xt, torch.cat([part[0].xt for part in parts]))
    assert all(torch.equal(a[0].xy, b[0].xy) for a, b in zip(whole[7:], batches(start_step=7)))


def encode_frames(batch):
    """Planes that say which frames they are of: the mean of the first and of the last real one, and the length."""
    clips = zip(batch["frames"], batch["n_frames"].tolist())
    values = torch.tensor([[clip[0].float().mean(), clip[n - 1].float().mean(), n] for clip, n in clips])
    return Planes(*(values[:, None, None].expand(-1, rows, 2, 3).clone() for rows in (2, 4, 4)))


@pytest.mark.parametrize("alike", [True, False])
def test_pairs_are_encoded_as_two_clips(alike):
    frames = torch.arange(24.0).view(3, 8, 1, 1, 1).expand(3, 8, 4, 4, 3)
    lengths = torch.tensor([8, 4, 3])  # two windows of 4; one; one that is short
    batch = {"frames": frames if alike else list(frames), "n_frames": lengths, "label": lengths}
    found = encode_pairs(encode_frames, 4, CPU, batch)
    ones, zeros = Planes(*(torch.ones(3) for _ in range(3))), Planes(*(torch.zeros(3) for _ in range(3)))
    clip, before = split_pairs(found, LatentStats(zeros, ones), torch.zeros(3, dtype=torch.bool))
    assert clip.yt[:, 0, 0].tolist() == [[4, 7, 4], [8, 11, 4], [16, 18, 3]]
    assert before["previous"].yt.shape == (3, 3, 4, 2), "standardised, channels first"
    assert before["previous"].yt[:, :, 0, 0].tolist() == [[0, 3, 4], [0, 0, 0], [0, 0, 0]]
    assert before["first"].tolist() == [False, True, True]
    _, before = split_pairs(found, LatentStats(ones, ones), torch.tensor([True, False, False]))
    assert before["first"].all() and before["previous"].xy[0, 1, 0, 0] == 2
    same, nothing = split_pairs(clip, LatentStats(zeros, ones), before["first"])
    assert same is clip and nothing == {}


def test_the_cache_holds_pairs_apart_from_single_windows(cache, clips):
    single = cache()
    clips.pairs, clips.num_frames = True, 3  # the videos have 6 frames
    filled = cache()
    assert filled.rows.folder != single.rows.folder
    filled.fill(lambda batch: encode_pairs(encode_frames, 3, CPU, batch), 2, 0)
    assert filled.good_files() == [0, 1, 3]
    got = filled.read(np.array([0, 11]))
    expected = encode_frames({"frames": torch.cat([clips[(row, row // 3)]["frames"].view(2, 3, 16, 16, 3).flip(0)
                                                   for row in (0, 11)]), "n_frames": torch.full((4,), 3)})
    assert got.xt.shape == (2, 4, 2, 6)
    assert torch.equal(got.xt.unflatten(-1, (2, 3))[:, 0, 0].flatten(0, 1), expected.xt[:, 0, 0])


def test_statistics_leave_the_clip_before_out():
    one = planes(5)
    both = one.map(lambda plane: torch.cat([plane, plane + 100], dim=-1))
    assert torch.equal(measure(iter([both]), 3, CPU).mean.yt, measure(iter([one]), 3, CPU).mean.yt)
    alone = one.map(lambda plane: torch.cat([plane, torch.full_like(plane, torch.nan)], dim=-1))
    measure(iter([alone, both]), 3, CPU)
    with pytest.raises(ValueError, match="no clip has one before it: .* twice --num_frames"):
        measure(iter([alone, alone]), 3, CPU)


def test_later_draws_of_a_step_leave_the_first_ones_as_they_were():
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 7)
    noise = [torch.randn(20, 2, 4, 4, generator=generator) for _ in range(3)]
    uniform = torch.rand(2, 20, generator=generator)
    drawn, numbers = draw_step(3, 7, 20, [(2, 4, 4)] * 3, CPU)
    assert all(map(torch.equal, drawn, noise)) and torch.equal(numbers[:2], uniform)
    assert numbers.shape == (3, 20) and not torch.equal(numbers[2], numbers[0])
