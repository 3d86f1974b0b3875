"""Metrics of motion, on clips whose motion is known."""
import math
import subprocess

import cv2
import pytest
import skimage.data
import torch

from eval import motion
from eval.motion import (
    SMALLEST,
    check_vmaf,
    evenly_spaced_clips,
    flicker,
    frozen,
    motion_metrics,
    motion_rows,
    motion_summary,
    optical_flow,
    rollout_seams,
    seams,
    vmaf,
    warping_error,
)
from eval.sensitivity import CORRUPTIONS, corrupt, spearman

STEP = (3, -2)  # pixels right and down that the picture moves from frame to frame


def moving(num_frames: int = 10, size: int = 64) -> torch.Tensor:
    """A photograph that moves by STEP, as two clips (2, 3, T, H, W) of other parts of it."""
    photo = cv2.resize(skimage.data.astronaut(), (192, 192), interpolation=cv2.INTER_AREA)
    photo = torch.from_numpy(photo).permute(2, 0, 1).float() / 255

    def clip(x: int, y: int) -> torch.Tensor:
        places = [(x - STEP[0] * t, y - STEP[1] * t) for t in range(num_frames)]
        return torch.stack([photo[:, y : y + size, x : x + size] for x, y in places], dim=1)

    return torch.stack([clip(60, 20), clip(100, 80)])


@pytest.fixture(scope="module")
def true() -> torch.Tensor:
    return moving()


@pytest.fixture(scope="module")
def flow(true):
    return optical_flow(true)


def test_flow_finds_the_motion_and_what_leaves_the_frame(true, flow):
    assert flow.vectors.shape == (2, 9, 2, 64, 64) and flow.visible.shape == (2, 9, 64, 64)
    found = flow.vectors.permute(0, 1, 3, 4, 2)[flow.visible]
    assert (found - torch.tensor(STEP)).norm(dim=1).median() < 0.1
    assert not flow.visible[..., -3:].any() and not flow.visible[..., :2, :].any()  # they leave the frame
    assert flow.visible[..., 8:-8, 8:-8].float().mean() > 0.97


def test_warping_error_of_the_true_clip_is_near_0(true, flow):
    assert (warping_error(true, flow) < 2e-4).all()
    assert torch.equal(warping_error(true), warping_error(true, flow))  # its own flow
    assert warping_error(true[:, :, :1].expand_as(true)).max() < 1e-12


# A blur and a constant tint commute with a motion: no warping error can see those.
@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in ("blur", "colour")])
def test_warping_error_grows_with_each_corruption(true, flow, name):
    strengths = CORRUPTIONS[name].strengths
    ladder = [warping_error(true, flow).mean().item()]
    ladder += [warping_error(corrupt(true, name, strength), flow).mean().item() for strength in strengths]
    assert spearman([0, *strengths], ladder) >= 0.9
    assert ladder[-1] > 5 * ladder[0]


@pytest.mark.parametrize("name", ["blur", "colour"])
def test_warping_error_does_not_see_what_moves_with_the_picture(true, flow, name):
    assert warping_error(corrupt(true, name, CORRUPTIONS[name].strengths[-1]), flow).max() < 4e-4


def test_flicker_by_hand():
    clip = torch.full((1, 3, 6, 16, 16), 0.5)
    assert flicker(clip) == 0
    clip[:, :, 1::2] += 0.1
    assert flicker(clip).item() == pytest.approx(0.2, abs=1e-6)
    ramp = torch.linspace(0, 1, 6).view(1, 1, 6, 1, 1).expand(1, 3, 6, 16, 16)
    assert flicker(ramp).item() == pytest.approx(0, abs=1e-6)
    assert flicker(clip[:, :, :2]).isnan().all()


def test_frozen_by_hand():
    clip = torch.rand(2, 3, 5, 16, 16)
    clip[0, :, 2] = clip[0, :, 1] + 0.3 / 255  # below half a grey level
    clip[0, :, 4] = clip[0, :, 3]
    assert frozen(clip).tolist() == [0.5, 0]
    assert frozen(clip[:, :, :1]).isnan().all()


def test_seams_by_hand():
    reference = torch.full((1, 3, 12, 32, 32), 0.5)
    clip = reference.clone()
    clip[..., 7::8] += 0.02  # the last column of each block
    clip[..., 0::8] += 0.02
    even = reference + 0.01
    assert seams(even, (4, 8, 8), reference)["seams_xy"].item() == pytest.approx(1)
    found = seams(clip + 0.01, (4, 8, 8), reference)
    # Of the 30 x 30 pixels that count, 6 rows and 6 columns are on borders: 324 pixels, 180 of them in the columns.
    assert found["seams_xy"].item() == pytest.approx((180 * 0.03 + 144 * 0.01) / 324 / 0.01, rel=1e-3)
    assert found["seams_t"].item() == pytest.approx(1)
    clip = even.clone()
    clip[:, :, [3, 4, 7, 8]] += 0.03
    assert seams(clip, (4, 8, 8), reference)["seams_t"].item() == pytest.approx(4, rel=1e-3)
    assert seams(reference, (4, 8, 8), reference) == {"seams_t": 1, "seams_xy": 1}  # no error, no seams
    assert set(seams(clip, (1, 8, 8), reference)) == {"seams_xy"} and not seams(clip, (12, 32, 32), reference)


def test_seams_of_samples_are_jumps_across_borders():
    x = torch.arange(32.0)
    even = (x / 64).expand(1, 3, 8, 32, 32).clone()
    even += torch.arange(32.0)[:, None] / 64
    assert seams(even.clamp(0, 1), (1, 8, 8))["seams_xy"].item() == pytest.approx(1, rel=0.2)
    tiles = (x // 8 / 8).expand(1, 3, 8, 32, 32)
    assert seams(tiles, (1, 8, 8))["seams_xy"] > 1000
    steps = (torch.arange(8) // 4 / 8).view(1, 1, 8, 1, 1).expand(1, 3, 8, 32, 32)
    assert seams(steps, (4, 8, 8))["seams_t"] > 1000


@pytest.mark.parametrize(
    ("metric", "name"),
    [("frozen", "frame_drop"), ("flicker", "noise"), ("flicker", "frame_swap"), ("seams_xy", "blocks"),
     ("warping_error", "local_warp"), ("warping_error", "time_jitter")],
)
def test_each_metric_is_monotone_on_the_corruption_it_is_for(true, metric, name):
    strengths = [0, *CORRUPTIONS[name].strengths]
    clips = [true, *(corrupt(true, name, strength) for strength in strengths[1:])]
    values = [motion_metrics(clip, true, (1, 8, 8))[metric].mean().item() for clip in clips]
    assert spearman(strengths, values) >= 0.9


def test_a_clip_does_not_depend_on_its_batch(true):
    noisy = corrupt(true, "noise", 0.1)
    whole = motion_metrics(noisy, true, (2, 8, 8))
    assert set(whole) == {"warping_error", "flicker", "frozen", "seams_xy", "warping_error_real", "flicker_real",
                          "frozen_real"}
    for name, value in motion_metrics(noisy[1:], true[1:], (2, 8, 8)).items():
        assert torch.equal(value, whole[name][1:]), name
    rows = motion_rows(noisy, [False, True], true, (2, 8, 8))
    assert all(rows[name][0].isnan() and rows[name][1] == whole[name][1] for name in whole)
    assert motion_summary(rows) == {**{name: value[1].item() for name, value in whole.items()}, "motion_clips": 1}
    none = motion_rows(noisy, [False, False], true)
    assert all(value.isnan().all() for value in none.values()) and motion_summary(none) == {}


def test_clips_are_evenly_spaced():
    assert evenly_spaced_clips(10, 3) == {0, 3, 6} and evenly_spaced_clips(3, 10) == {0, 1, 2}
    assert evenly_spaced_clips(5, 0) == set()


def test_wrong_clips_are_named(true):
    with pytest.raises(ValueError, match=f"at least {SMALLEST}x{SMALLEST} pixels, got 8x64"):
        motion_metrics(true[..., :8])
    with pytest.raises(ValueError, match="expected clips"):
        flicker(true[0])
    with pytest.raises(ValueError, match="reference of the clips' shape"):
        motion_metrics(true, true[:1])
    assert all(math.isnan(value) for value in motion_metrics(true[:, :, :1])["warping_error"])


def test_vmaf_orders_a_blur(true):
    try:
        check_vmaf()
    except ValueError as error:
        pytest.skip(str(error))
    scores = [vmaf(corrupt(true[:1], "blur", sigma), true[:1]).item() for sigma in (0.5, 1, 2)]
    assert 100 >= scores[0] > scores[1] > scores[2] >= 0
    assert vmaf(true[:1], true[:1]).item() > 95


def test_an_ffmpeg_without_vmaf_gets_one_line(monkeypatch, true):
    bare = subprocess.CompletedProcess([], 0, " .. vmafmotion V->V Motion score.\n", "")
    monkeypatch.setattr(motion.subprocess, "run", lambda *args, **options: bare)
    with pytest.raises(ValueError, match="has no libvmaf.*install imageio-ffmpeg 0.6.*--vmaf"):
        vmaf(true, true)


def test_rollout_seams_are_jumps_where_clips_meet():
    ramp = torch.linspace(0, 0.5, 10).view(1, 1, 10, 1, 1).expand(2, 3, 10, 16, 16).clone()
    assert rollout_seams(ramp, range(4, 10, 4)).tolist() == pytest.approx([1, 1], rel=1e-5)
    ramp[1, :, 4:] += 0.1
    ramp[1, :, 8:] -= 0.1 + 0.5 / 9
    step = 0.5 / 9
    assert rollout_seams(ramp, (4, 8)).tolist() == pytest.approx([1, (step + 0.1 + 0.1) / 2 / step], rel=1e-4)
