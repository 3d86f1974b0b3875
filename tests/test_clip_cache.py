import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.cache import ClipCache
from data.clips import ClipDataset, ClipKey, Quarantine
from data.lists import VideoFile, files_sha256, list_folder
from data.loader import GlobalBatchSampler, make_loader
from data.video import VideoError, to_video, write_video
from training import clip_cache as module
from training.clip_cache import clip_cache

LENGTHS = (20, 5, 14, 9, 3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Five videos of several lengths and two sizes."""
    root = tmp_path_factory.mktemp("videos")
    torch.manual_seed(0)
    for i, length in enumerate(LENGTHS):
        write_video(root / f"{i}.mp4", torch.rand(3, length, 36, 40 + 16 * (i % 2)))
    return root


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    """The same, and one that is no video."""
    shutil.copytree(folder, tmp_path / "root")
    (tmp_path / "root" / "2b.mp4").write_text("not a video")
    return tmp_path / "root"


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """Fills a cache of two videos a shard, from the videos of a folder."""
    monkeypatch.setattr(module, "ClipCache", lambda *args: ClipCache(*args, shard_rows=2))

    def fill(root, size=16, rule="coordtok", quarantine=None, workers=0):
        quarantine = Quarantine() if quarantine is None else quarantine
        return clip_cache(tmp_path / "cache", list_folder(root), size, rule, quarantine, workers, 60)

    return fill


def dataset(root, cache=None, **options):
    return ClipDataset(list_folder(root), 8, 16, cache=cache, **{"rule": "coordtok", **options})


@pytest.fixture
def reads(monkeypatch):
    """The videos that are opened from now on."""
    opened = []

    def spy(path, *rest, real=module.read_chosen):
        opened.append(Path(path).name)
        return real(path, *rest)

    for place in ("data.clips.read_chosen", "training.clip_cache.read_chosen"):
        monkeypatch.setattr(place, spy)
    return opened


@pytest.mark.parametrize("options", [
    {}, {"stride": 2}, {"short": "repeat"}, {"window": "center", "resize": "device"}, {"rule": "larp"}], ids=str)
def test_samples_are_those_without_the_cache(folder, filled, reads, options):
    options = {"points": ("patches", 9, (8, 2, 2), 1), "seed": 3, **options}
    plain, cached = dataset(folder, **options), dataset(folder, filled(folder, rule=options.get("rule", "coordtok")),
                                                        **options)
    keys = [ClipKey(i) for i in range(12)] + [ClipKey(99, 0, 7)]
    expected = [plain[key] for key in keys]
    reads.clear()
    samples = [cached[key] for key in keys]
    assert reads == [], "no video is opened"
    assert len({sample["start"] for sample in samples if sample["path"].endswith("0.mp4")}) > 1 - ("window" in options)
    for one, two in zip(samples, expected):
        one, two = dict(one), dict(two)
        assert one["frames"].dtype == torch.uint8
        pixels = [to_video(sample.pop("frames")[None], 16, plain.rule, CPU) for sample in (one, two)]
        if plain.rule == "larp":
            assert 0 < (pixels[0] - pixels[1]).abs().max() <= 0.5001 / 255
        else:
            assert torch.equal(*pixels)
        assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_beyond_the_end_is_an_error(folder, filled):
    cached = dataset(folder, filled(folder), damaged="skip")
    assert "it has 20 frames, not those asked for" in cached[ClipKey(0, 0, 20)]["error"]


def test_damaged_videos_are_replaced_as_without_the_cache(damaged, filled, tmp_path):
    quarantine = Quarantine(tmp_path / "bad.txt")
    cache = filled(damaged, quarantine=quarantine, workers=2)
    assert [cache.length(i) for i in range(6)] == [20, 5, 14, 0, 9, 3]
    assert [Path(path).name for path in quarantine.read()] == ["2b.mp4"]
    for known in (quarantine, Quarantine()):  # of this run, or of one that finds the cache ready
        plain, cached = dataset(damaged), dataset(damaged, cache, quarantine=known)
        for key in [ClipKey(i) for i in range(12)] + [ClipKey(50, 3)]:
            one, two = cached[key], plain[key]
            assert torch.equal(one["frames"], two["frames"]) and one["path"] == two["path"]


@pytest.mark.parametrize("rule", ["coordtok", "larp"])
def test_a_video_good_in_part_is_read_from_its_file(folder, filled, monkeypatch, rule):
    def fails_whole(path, choose, timeout, real=module.read_chosen):
        if choose is range and path.endswith("0.mp4"):
            raise VideoError(f"{path}: frame 19 is bad")
        return real(path, choose, timeout)

    def samples():
        cache = filled(folder, rule=rule)
        frames = [dataset(folder, cache, rule=rule)[ClipKey(position, 0)]["frames"] for position in range(4)]
        return torch.stack(frames), cache

    expected, cache = samples()
    shutil.rmtree(cache.folder)
    monkeypatch.setattr(module, "read_chosen", fails_whole)
    got, cache = samples()
    assert [cache.length(i) for i in range(5)] == [0, *LENGTHS[1:]]
    assert got.dtype == torch.uint8 and torch.equal(got, expected)


def test_filling_goes_on_where_it_was_killed(folder, filled, monkeypatch, reads):
    class Killed(Exception):
        pass

    def dies(cache, shard, videos, real=ClipCache.write):
        if shard == 1:
            raise Killed
        real(cache, shard, videos)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ClipCache, "write", dies)
        filled(folder)
    reads.clear()
    cache = filled(folder)
    assert reads == ["2.mp4", "3.mp4", "4.mp4"], "what is whole is not made again"
    assert [cache.length(i) for i in range(5)] == list(LENGTHS)
    reads.clear()
    filled(folder)
    assert reads == []


def test_processes_share_filling(folder, filled, monkeypatch, reads):
    monkeypatch.setattr(module.distributed, "wait_until", lambda done: None)  # both are this process
    monkeypatch.setattr(module.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(module.distributed, "broadcast", lambda missing: [0, 1, 2])  # as rank 0 found them
    monkeypatch.setattr(module.distributed, "rank", lambda: 1)
    with pytest.raises(ValueError, match="lacks 2 of 3 shards"):
        filled(folder)
    assert reads == ["2.mp4", "3.mp4"]
    monkeypatch.setattr(module.distributed, "rank", lambda: 0)
    cache = filled(folder)
    assert [cache.length(i) for i in range(5)] == list(LENGTHS)
    assert reads[2:] == ["0.mp4", "1.mp4", "4.mp4"]


def test_workers_change_nothing(damaged, filled):
    cache = filled(damaged, workers=2)
    inline = filled(damaged)
    assert cache.folder == inline.folder
    state = torch.get_rng_state()
    batches = [list(make_loader(dataset(damaged, cache), GlobalBatchSampler(6, 4, 3), workers)) for workers in (0, 2)]
    for one, two in zip(*batches, strict=True):
        assert torch.equal(one["frames"], two["frames"]) and one["path"] == two["path"]
    assert torch.equal(torch.get_rng_state(), state)


def test_another_size_rule_or_list_is_another_cache(folder, damaged, filled):
    caches = [filled(folder), filled(folder, size=8), filled(folder, rule="larp"), filled(damaged)]
    assert len({cache.folder for cache in caches}) == 4
    moved = folder.parent / "moved"
    shutil.copytree(folder, moved)
    assert filled(moved).folder == caches[0].folder
    (moved / "4.mp4").write_bytes((moved / "4.mp4").read_bytes() + b"x")
    assert files_sha256(list_folder(moved)) != files_sha256(list_folder(folder))


def test_random_clips_without_files(tmp_path):
    files = [VideoFile(f"null:{i:06d}", i) for i in range(2)]
    cache = clip_cache(tmp_path, files, 8, "coordtok", Quarantine(), 0, 60)
    plain, cached = (ClipDataset(files, 4, 8, "coordtok", cache=one)[ClipKey(0)] for one in (None, cache))
    assert torch.equal(plain["frames"], cached["frames"])


def test_bad_names_end_no_run(folder, filled, tmp_path, capsys):
    """A link to nothing, and names of any bytes."""
    root = tmp_path / "any"
    shutil.copytree(folder, root)
    (root / "0.mp4").rename(root / "\udcff.mp4")
    (root / "1.mp4").rename(root / "new\nline.mp4")
    (root / "3.mp4").write_text("no video")
    (root / "3.mp4").rename(root / "tab\t.mp4")
    (root / "link.mp4").symlink_to("nowhere.mp4")
    quarantine = Quarantine(tmp_path / "bad.txt")
    cache = filled(root, quarantine=quarantine)
    names = [Path(file.path).name for file in list_folder(root)]
    assert {name for i, name in enumerate(names) if not cache.length(i)} == {"tab\t.mp4", "link.mp4"}
    assert {Path(path).name for path in Quarantine(quarantine.path).read()} == {"tab\t.mp4", "link.mp4"}
    assert "\n" not in files_sha256(list_folder(root))
    for path in root.iterdir():
        path.unlink()
        path.symlink_to("nowhere.mp4")
    with pytest.raises(FileNotFoundError, match="all 6 videos under .* are links to nothing: is their disk there"):
        files_sha256(list_folder(root))
