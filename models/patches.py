"""Clips to patches and back: pure functions, shared by CoordTok and LARP."""
import torch
from einops import rearrange
from torch import Tensor


def patchify(video: Tensor, patch_t: int, patch: int) -> Tensor:
    """(B, 3, T, H, W) -> (B, T/patch_t * H/patch * W/patch, patch_t * patch * patch * 3) in t, h, w order."""
    return rearrange(video, "b c (t pt) (h p) (w q) -> b (t h w) (pt p q c)", pt=patch_t, p=patch, q=patch)


def unpatchify(patches: Tensor, grid: tuple[int, int, int], patch_t: int, patch: int) -> Tensor:
    """The inverse of `patchify` for a grid of (t, h, w) patches: -> (B, 3, T, H, W)."""
    sizes = dict(zip("thw", grid), pt=patch_t, p=patch, q=patch)
    return rearrange(patches, "b (t h w) (pt p q c) -> b c (t pt) (h p) (w q)", **sizes)


def gather_patches(video: Tensor, index: Tensor, patch_t: int, patch: int) -> Tensor:
    """The patches of `video` at `index`, copying no others.

    video: (B, 3, T, H, W), any dtype. index: (B, N, 3) long, (t, h, w) patch index.
    Returns (B, N, patch_t * patch * patch * 3), the dtype of `video`.
    """
    # A view of shape (B, 3, t, h, w, pt, p, q).
    blocks = video.unfold(2, patch_t, patch_t).unfold(3, patch, patch).unfold(4, patch, patch)
    clip = torch.arange(len(index), device=index.device)[:, None]
    t, h, w = index.unbind(-1)
    return rearrange(blocks[clip, :, t, h, w], "b n c pt p q -> b n (pt p q c)")


def assemble_frames(patches: Tensor, index: Tensor, grid: tuple[int, int, int], patch_t: int, patch: int) -> Tensor:
    """Frames from their patches: any number of time steps, each with all of its patches, in any order. A time step may
    occur more than once.

    patches: (B, N, patch_t * patch * patch * 3). index: (B, N, 3) long, (t, h, w) patch index. grid: (t, h, w) of the
    whole clip. Returns (B, 3, N / (h * w) * patch_t, H, W), in order of time.
    """
    times, height, width = grid
    if index.shape[1] % (height * width):
        raise ValueError(f"{index.shape[1]} patches are not whole frames of {height} x {width} patches")
    t, h, w = index.unbind(-1)
    order = ((h * width + w) * times + t).argsort(dim=1, stable=True)  # every place has the same times after it
    patches = patches.gather(1, order[..., None].expand_as(patches))
    sizes = {"h": height, "w": width, "pt": patch_t, "p": patch, "q": patch}
    return rearrange(patches, "b (h w t) (pt p q c) -> b c (t pt) (h p) (w q)", **sizes)
