import math

import pytest
import torch
from skimage.metrics import structural_similarity

from eval.metrics import mse_clip, psnr_clip, psnr_frame, ssim_frame


def pair(batch=3, frames=4, height=20, width=24):
    a = torch.rand(batch, 3, frames, height, width)
    return a, (a + 0.1 * torch.randn_like(a)).clamp(0, 1)


def test_psnr_by_hand():
    a, b = torch.zeros(1, 3, 2, 8, 8), torch.zeros(1, 3, 2, 8, 8)
    b[:, :, 0], b[:, :, 1] = 0.1, 0.01  # MSE 1e-2 and 1e-4: 20 dB and 40 dB
    assert mse_clip(a, b).item() == pytest.approx(0.00505)
    assert psnr_frame(a, b).item() == pytest.approx(30, abs=1e-5)
    assert psnr_clip(a, b).item() == pytest.approx(-10 * math.log10(0.00505), abs=1e-5)


def test_inputs_are_clamped():
    a = torch.ones(1, 3, 2, 8, 8)
    assert mse_clip(a, 1.5 * a).item() == 0
    assert ssim_frame(a, 1.5 * a).item() == pytest.approx(1)


@pytest.mark.parametrize("size", [(20, 24), (7, 9)])
def test_ssim_is_scikit_images(size):
    a, b = pair(height=size[0], width=size[1])
    b[0] = 0.5  # a flat clip, where the variances cancel
    expected = [
        sum(
            structural_similarity(x.numpy(), y.numpy(), data_range=1, gaussian_weights=False, channel_axis=0)
            for x, y in zip(clip_a.unbind(1), clip_b.unbind(1))
        ) / a.shape[2]
        for clip_a, clip_b in zip(a.double(), b.double())
    ]
    assert ssim_frame(a, b).tolist() == pytest.approx(expected, abs=1e-10)


def test_ssim_of_tiny_frames_is_an_error():
    with pytest.raises(ValueError, match="7x7"):
        ssim_frame(*pair(height=6))


def test_shapes_must_agree():
    a, b = pair()
    with pytest.raises(ValueError, match="one shape"):
        psnr_clip(a, b[:1])


def test_a_clips_value_does_not_depend_on_its_batch():
    a, b = pair()
    for metric in (mse_clip, psnr_clip, psnr_frame, ssim_frame):
        alone = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(len(a))])
        torch.testing.assert_close(metric(a, b), alone, rtol=1e-12, atol=0)
