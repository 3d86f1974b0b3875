"""training/codes.py and training/window_cache.py, with the mirror images of data/augment.py."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import tiny_larp

from common import distributed
from data.augment import draw_flips, flip_half
from data.clips import ClipDataset, ClipKey
from data.lists import VideoFile, check_classes, check_labels, class_names
from data.loader import GlobalBatchSampler, make_loader
from data.video import VideoError, to_video, write_video
from models.larp_ar import LARPGenerator, code_loss
from training import window_cache
from training.codes import CodeCache, batches_from_cache, batches_from_video, draw_drops, encode_video, hold_last
from training.validation import HeldOut, held_out_keys

CPU = torch.device("cpu")
GIVEN = 3  # frames


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_larp(input_size=16, frame_num=4, bottleneck_token_num=6)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four videos of six frames, the third one damaged."""
    folder = tmp_path_factory.mktemp("videos")
    torch.manual_seed(0)
    for i in (0, 1, 3):
        (folder / f"class{i}").mkdir()
        blocks = torch.rand(3, 6, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        write_video(folder / f"class{i}" / "video.mp4", blocks)
    (folder / "class2").mkdir()
    (folder / "class2" / "video.mp4").write_bytes(b"no video")
    return [VideoFile(str(folder / f"class{i}" / "video.mp4"), i) for i in range(4)]


@pytest.fixture
def clips(files):
    return ClipDataset(files, 4, 16, "larp", seed=5, damaged="skip", short="repeat")


@pytest.fixture
def encode(tokenizer):
    return lambda video: encode_video(tokenizer, video, GIVEN)


@pytest.fixture
def cache(tmp_path, clips, tokenizer, monkeypatch):
    small = window_cache.RowCache
    monkeypatch.setattr(window_cache, "RowCache", lambda *args: small(*args, shard_rows=5))

    def make(views=3, num_cond_frames=GIVEN, flip=True, config=tokenizer.config, **key):
        return CodeCache(tmp_path / "cache", clips, config, views, num_cond_frames, flip, key)

    return make


@pytest.fixture
def filled(cache, encode):
    made = cache()
    made.fill(encode, 2, 0, CPU)
    return made


def test_the_last_frame_given_is_held():
    video = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(2, 3, 4, 5, 5)
    assert hold_last(video, 3)[0, 0, :, 0, 0].tolist() == [0, 1, 2, 2]
    assert hold_last(video, 1)[1, 2, :, 4, 4].tolist() == [0, 0, 0, 0]


def test_rows_are_the_codes_of_their_windows(filled, clips, tokenizer):
    assert filled.good_files() == [0, 1, 3]
    assert filled.rows.dtype == np.int16
    seen = set()
    for row in (0, 1, 4, 11):
        sample = clips[ClipKey(row, row // 3)]
        video = to_video(sample["frames"][None], 16, "larp", CPU)
        got = filled.read(np.array([row]))
        assert got.dtype == torch.long and got.shape == (1, 2, 2, 6)
        for mirrored, clip in enumerate((video, video.flip(-1))):
            held = torch.cat([clip[:, :, :3], clip[:, :, 2:3]], dim=2)
            assert torch.equal(got[0, mirrored, 0], tokenizer.encode(clip)[0])
            assert torch.equal(got[0, mirrored, 1], tokenizer.encode(held)[0])
            seen |= {tuple(got[0, mirrored, 0].tolist()), tuple(got[0, mirrored, 1].tolist())}
    assert len(seen) > 8, "clips, mirror images and what is given have codes of their own"


def test_a_larger_codebook_takes_wider_integers(tokenizer, cache):
    args = tokenizer.config.bottleneck.args
    for size, dtype in ((2**15, np.int16), (2**15 + 1, np.int32)):
        regularizer = replace(args.regularizer, args=replace(args.regularizer.args, codebook_size=size))
        bottleneck = replace(tokenizer.config.bottleneck, args=replace(args, regularizer=regularizer))
        assert cache(config=replace(tokenizer.config, bottleneck=bottleneck)).rows.dtype == dtype


def test_filling_goes_on_where_it_was_killed(cache, encode):
    class Killed(Exception):
        pass

    calls = []

    def dies(video):
        calls.append(len(video))
        if len(calls) == 7:
            raise Killed
        return encode(video)

    with pytest.raises(Killed):
        cache().fill(dies, 2, 0, CPU)
    assert cache().rows.missing() == [1, 2], "one whole shard was written"
    cache().fill(encode, 2, 0, CPU)
    assert cache().good_files() == [0, 1, 3]


def test_another_tokenizer_or_setting_is_another_cache(cache, tokenizer, clips):
    others = [
        cache(), cache(views=2), cache(num_cond_frames=2), cache(num_cond_frames=0), cache(flip=False),
        cache(tokenizer="another"), cache(config=replace(tokenizer.config, frame_num=8)),
    ]
    clips.seed += 1
    others.append(cache())
    assert len({other.rows.folder for other in others}) == len(others)


def test_a_cache_of_random_clips_without_files(tmp_path, tokenizer):
    clips = ClipDataset([VideoFile(f"null:{i:06d}", i) for i in range(2)], 4, 16, "larp", damaged="skip")
    cache = CodeCache(tmp_path, clips, tokenizer.config, 1, 0, False, {})
    cache.fill(lambda video: encode_video(tokenizer, video), 2, 0, CPU)
    assert cache.good_files() == [0, 1] and cache.read(np.array([0, 1])).shape == (2, 1, 1, 6)


@pytest.mark.parametrize("source", ["cache", "video"])
def test_batches_do_not_depend_on_processes(filled, encode, source):
    """Both ways give clips with their labels or given codes, mirrored by the same lots."""
    files = [0, 1, 3]
    clips = ClipDataset([filled.clips.files[i] for i in files], 4, 16, "larp", seed=1, short="repeat")

    def batches(**sharing):
        sampler = GlobalBatchSampler(3, 2, 12, order="epoch", seed=1, **sharing)
        if source == "cache":
            return list(batches_from_cache(filled, sampler, files, CPU))
        return list(batches_from_video(make_loader(clips, sampler, 0), encode, True, CPU))

    whole = batches()
    for batch in whole:
        assert batch.codes.shape == batch.cond.shape == (2, 6) and batch.codes.dtype == batch.cond.dtype == torch.long
    assert [batch.positions for batch in whole] == [[2 * i, 2 * i + 1] for i in range(12)]
    for batch, parts in zip(whole, zip(batches(rank=0, world_size=2), batches(rank=1, world_size=2))):
        assert torch.equal(batch.codes, torch.cat([part.codes for part in parts]))
        assert torch.equal(batch.cond, torch.cat([part.cond for part in parts]))
        assert batch.paths == [path for part in parts for path in part.paths]
    assert torch.equal(whole[7].codes, batches(start_step=7)[0].codes)


def test_a_batch_from_the_cache_is_one_of_the_cached_windows(filled):
    sampler = GlobalBatchSampler(3, 3, 30, order="epoch", seed=1)
    used = set()
    for batch in batches_from_cache(filled, sampler, filled.good_files(), CPU):
        flips = draw_flips(1, batch.positions).tolist()
        for codes, given, path, flip in zip(batch.codes, batch.cond, batch.paths, flips):
            file = [video.path for video in filled.clips.files].index(path)
            there = filled.read(np.arange(3 * file, 3 * file + 3))[:, int(flip)]  # (views, kinds, N)
            views = [v for v in range(3) if torch.equal(there[v], torch.stack([codes, given]))]
            assert views
            used |= {(file, view, flip) for view in views}
    assert len(used) == 3 * 3 * 2


def test_labels_go_with_their_clips(cache, tokenizer):
    made = cache(num_cond_frames=0, flip=False)
    made.fill(lambda video: encode_video(tokenizer, video), 2, 0, CPU)
    for batch in batches_from_cache(made, GlobalBatchSampler(3, 3, 4, order="epoch"), made.good_files(), CPU):
        assert [f"class{label}" in path for label, path in zip(batch.cond.tolist(), batch.paths)] == [True] * 3


def test_lots_are_functions_of_seed_and_position():
    drops = draw_drops(3, range(4000), 0.1)
    assert torch.equal(drops[1000:2000], draw_drops(3, range(1000, 2000), 0.1))
    assert drops.float().mean() == pytest.approx(0.1, abs=0.015)
    flips = draw_flips(3, range(4000))
    assert flips.float().mean() == pytest.approx(0.5, abs=0.03)
    assert (flips & drops).float().mean() == pytest.approx(0.05, abs=0.012), "lots of their own"
    assert not draw_drops(3, range(100), 0.0).any()
    assert not torch.equal(draw_drops(4, range(4000), 0.1), drops)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_clips_are_mirrored_by_their_positions(size):
    video, positions = torch.rand(8, 3, 2, 4, 4), list(range(20, 28))
    parts = [flip_half(video[i : i + size], 3, positions[i : i + size]) for i in range(0, 8, size)]
    flips = draw_flips(3, positions)
    assert 0 < flips.sum() < 8
    assert torch.equal(torch.cat(parts), torch.stack([v.flip(-1) if f else v for v, f in zip(video, flips)]))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_scores_are_means_over_clips(files, tokenizer, batch_size):
    """Whatever the batches. The damaged video has a clip put in its place."""
    clips = ClipDataset(files, 4, 16, "larp", seed=5, short="repeat")
    held = HeldOut(clips, held_out_keys(4, None, 0), lambda video: encode_video(tokenizer, video), batch_size, 0, CPU)
    assert held.codes.shape == (4, 6)
    generator = LARPGenerator(
        dim=16, n_layer=1, n_head=2, vocab_size=64, max_seq_len=6, num_classes=4, initializer_range=1.0
    ).eval()
    torch.nn.init.normal_(generator.output.weight)

    def score(codes, cond, drop):
        return code_loss(generator(codes, cond, drop), codes)

    scores = held.score(score, labelled=True)
    logits = generator(held.codes, held.conds), generator(held.codes, torch.full((4,), -1))
    losses = [-one.log_softmax(-1).gather(-1, held.codes[..., None]).mean().item() for one in logits]
    assert scores["clips"] == 4
    assert [scores["loss"], scores["loss_uncond"]] == pytest.approx(losses, rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3
    assert held.score(score, labelled=False) == {name: scores[name] for name in ("clips", "loss", "accuracy")}
    assert torch.equal(held.cond([2, 0]), held.conds[[2, 0]])


def test_two_processes_hold_the_clips_of_one(files, tokenizer, monkeypatch):
    clips, keys = ClipDataset(files, 4, 16, "larp", seed=5, short="repeat"), held_out_keys(4, 3, 0)
    hold = lambda: HeldOut(clips, keys, lambda video: encode_video(tokenizer, video, GIVEN), 2, 0, CPU)  # noqa: E731
    whole = hold()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank, mine in enumerate(([0, 2], [1])):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        part = hold()
        assert torch.equal(part.codes, whole.codes[mine])
        assert torch.equal(part.cond(mine), whole.conds[mine]), "sample i continues clip i"


def test_held_out_clips_are_distinct_and_of_all_videos():
    assert sorted(key.index for key in held_out_keys(50, None, 1)) == list(range(50))
    assert [key.position for key in held_out_keys(50, 8, 1)] == list(range(8))
    assert len({key.index // 10 for key in held_out_keys(50, 12, 1)}) > 3, "not the first ones of a sorted list"


def test_no_good_video_is_an_error(cache, clips, encode):
    clips.files = clips.files[2:3]
    made = cache()
    made.fill(encode, 2, 0, CPU)
    with pytest.raises(VideoError, match="none of 1 videos could be decoded"):
        made.good_files()


def test_labels_are_checked_and_classes_named(files):
    some = [files[0], files[3]]
    assert class_names(some) == ["class0", "", "", "class3"]
    assert class_names([*some, VideoFile("/a/b.avi")]) == []
    check_labels(some, 4, "LIST")
    with pytest.raises(ValueError, match="LIST has label 3, but the model has 3 classes: give --num_classes 4"):
        check_labels(some, 3, "LIST")
    with pytest.raises(ValueError, match="no video of LIST has a label"):
        check_labels([VideoFile("a.avi")], 3, "LIST")
    check_classes(files, files, "A", "B")
    with pytest.raises(ValueError, match="A and B have different classes: class1, class2 is in one alone"):
        check_classes(files, some, "A", "B")
