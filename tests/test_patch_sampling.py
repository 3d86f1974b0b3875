import numpy as np
import pytest

from data.patch_sampling import random_frames, random_patches

GRID = (6, 2, 3)


def test_patches_cover_the_real_frames_and_no_others():
    index = random_patches(np.random.default_rng(0), 2000, GRID, n_frames=9, patch_t=2)
    assert index.shape == (2000, 3) and index.dtype == np.int64
    # 9 frames are 4 whole patches of 2: with replacement, each of the 4 * 2 * 3 patches comes about 83 times.
    patches, counts = np.unique(index, axis=0, return_counts=True)
    assert len(patches) == 4 * 2 * 3 and patches[:, 0].max() == 3
    assert counts.min() > 50 and counts.max() < 120


@pytest.mark.parametrize("draw", [random_patches, random_frames])
def test_a_clip_shorter_than_a_patch_has_one(draw):
    index = draw(np.random.default_rng(0), 12, GRID, n_frames=1, patch_t=2)
    assert (index[:, 0] == 0).all()


def test_frames_are_whole_distinct_and_in_random_order():
    index = random_frames(np.random.default_rng(1), 5 * 6, GRID, n_frames=6, patch_t=1).reshape(5, 6, 3)
    assert (index[:, :, 0] == index[:, :1, 0]).all()
    times = index[:, 0, 0].tolist()
    assert len(set(times)) == 5 and times != sorted(times)
    assert index[0, :, 1:].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_a_short_clip_gives_its_frames_in_turns():
    index = random_frames(np.random.default_rng(0), 5 * 6, GRID, n_frames=3, patch_t=1).reshape(5, 6, 3)
    times = index[:, 0, 0].tolist()
    assert sorted(times[:3]) == [0, 1, 2] and len(set(times[3:])) == 2 and max(times) == 2


def test_points_that_fill_no_frame_are_an_error():
    with pytest.raises(ValueError, match="give a multiple of 6"):
        random_frames(np.random.default_rng(0), 7, GRID, n_frames=6, patch_t=1)
