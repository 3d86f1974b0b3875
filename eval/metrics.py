"""Distances between clips, one value for each clip: MSE, PSNR (two definitions), SSIM. LPIPS is
`models.lpips.Perceptual`.

Every function takes two clips (B, 3, T, H, W), float in [0, 1] (clamped here: a decoder may overshoot), and returns
(B,) float64. A clip's value does not depend on the other clips of its batch.
"""
import torch.nn.functional as F
from torch import Tensor


def mse_clip(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each clip: (B,) float64."""
    return _squared_error(a, b).mean(dim=(1, 2, 3, 4))


def psnr_clip(a: Tensor, b: Tensor) -> Tensor:
    """PSNR of each clip's mean squared error, in dB (LARP, arXiv 2410.21264): (B,) float64, inf for equal clips."""
    return -10 * mse_clip(a, b).log10()


def psnr_frame(a: Tensor, b: Tensor) -> Tensor:
    """PSNR of each frame, then the mean over frames, in dB (CoordTok, arXiv 2411.14762): (B,) float64, inf
    where a frame is equal."""
    return -10 * _squared_error(a, b).mean(dim=(1, 3, 4)).log10().mean(dim=1)


def ssim_frame(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """SSIM of each frame, then the mean over frames: (B,) float64.

    As scikit-image's structural_similarity(data_range=1, gaussian_weights=False) computes it: uniform window, sample
    covariance, borders of half a window left out, mean over colours (Wang et al. 2004). In float64, as there: the
    variances are differences of nearly equal numbers. H and W are at least `window`.
    """
    if min(a.shape[-2:]) < window:
        raise ValueError(f"SSIM needs frames of at least {window}x{window} pixels, got {tuple(a.shape[-2:])}")
    _check(a, b)

    def local_mean(frames: Tensor) -> Tensor:
        return F.avg_pool2d(F.avg_pool2d(frames, (window, 1), stride=1), (1, window), stride=1)

    x, y = (clip.double().clamp(0, 1).transpose(1, 2).flatten(0, 1) for clip in (a, b))  # (B T, 3, H, W)
    mean_x, mean_y = local_mean(x), local_mean(y)
    sample = window**2 / (window**2 - 1)
    var_x = sample * (local_mean(x * x) - mean_x**2)
    var_y = sample * (local_mean(y * y) - mean_y**2)
    cov = sample * (local_mean(x * y) - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return ssim.mean(dim=(1, 2, 3)).unflatten(0, (len(a), -1)).mean(dim=1)


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 5 or a.shape[1] != 3:
        raise ValueError(f"expected two clips (B, 3, T, H, W) of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def _squared_error(a: Tensor, b: Tensor) -> Tensor:
    _check(a, b)
    return (a.double().clamp(0, 1) - b.double().clamp(0, 1)).square()
