"""models/patches.py and models/triplane.py."""
import pytest
import torch

from models.patches import assemble_frames, gather_patches, patchify, unpatchify
from models.triplane import Planes

GRID, PATCH_T, PATCH = (2, 3, 4), 2, 2  # a clip of 4 frames of 6 x 8


@pytest.fixture
def video():
    return torch.rand(2, 3, 4, 6, 8)


def test_unpatchify_is_the_inverse_of_patchify(video):
    patches = patchify(video, PATCH_T, PATCH)
    assert patches.shape == (2, 24, 24)
    assert torch.equal(unpatchify(patches, GRID, PATCH_T, PATCH), video)


def test_patch_order_by_hand(video):
    patch = patchify(video, PATCH_T, PATCH)[1, (1 * 3 + 2) * 4 + 3].view(PATCH_T, PATCH, PATCH, 3)
    assert torch.equal(patch[1, 0, 1], video[1, :, 2 + 1, 4 + 0, 6 + 1])


def test_gather_patches_equals_patchify(video):
    index = torch.stack([torch.randint(size, (2, 7)) for size in GRID], dim=-1)
    flat = (index[..., 0] * 3 + index[..., 1]) * 4 + index[..., 2]
    expected = patchify(video, PATCH_T, PATCH)[torch.arange(2)[:, None], flat]
    assert torch.equal(gather_patches(video, index, PATCH_T, PATCH), expected)


def test_assemble_frames_takes_patches_in_any_order_and_times_twice(video):
    everything = torch.cartesian_prod(*map(torch.arange, GRID))
    first, second = everything[:12], everything[12:]
    points = torch.cat([second, first, second])
    index = torch.stack([points[torch.randperm(36)], points])
    patches = gather_patches(video, index, PATCH_T, PATCH)
    assert torch.equal(assemble_frames(patches, index, GRID, PATCH_T, PATCH), video[:, :, [0, 1, 2, 3, 2, 3]])
    with pytest.raises(ValueError, match="11 patches are not whole frames of 3 x 4"):
        assemble_frames(patches[:, :11], index[:, :11], GRID, PATCH_T, PATCH)


def test_planes_map_and_layouts():
    planes = Planes(torch.rand(1, 2, 2, 5), torch.rand(1, 4, 2, 5), torch.rand(1, 4, 2, 5))
    assert planes.channels_first().yt.shape == (1, 5, 4, 2)
    assert all(map(torch.equal, planes.channels_first().channels_last(), planes))
    assert torch.equal(planes.map(torch.add, planes).xt, 2 * planes.xt)
