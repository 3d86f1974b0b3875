"""Which patches of a clip a training step decodes (CoordTok, arXiv 2411.14762, section 3.3)."""
import numpy as np

Grid = tuple[int, int, int]  # patches of a clip along t, h, w


def random_patches(rng: np.random.Generator, num: int, grid: Grid, n_frames: int, patch_t: int) -> np.ndarray:
    """`num` patches drawn uniformly, with replacement, from the real frames of a clip.

    n_frames: how many frames are real; patch_t: frames in a patch. At least one time patch always counts as real.
    Returns (num, 3) int64, (t, h, w) patch index.
    """
    return rng.integers((_real_times(grid, n_frames, patch_t), *grid[1:]), size=(num, 3))


def random_frames(rng: np.random.Generator, num: int, grid: Grid, n_frames: int, patch_t: int) -> np.ndarray:
    """All patches of `num // (h * w)` whole frames in random order: distinct ones, until a short clip runs out of them
    and its frames come round again in another order.

    Returns (num, 3) int64, (t, h, w) patch index, frame after frame, each in h, w order.
    """
    _, height, width = grid
    count, real = count_frames(num, grid), _real_times(grid, n_frames, patch_t)
    t = np.concatenate([rng.permutation(real) for _ in range(-(-count // real))])[:count]
    h, w = np.indices((height, width)).reshape(2, -1)
    return np.stack([np.repeat(t, height * width), np.tile(h, count), np.tile(w, count)], axis=1)


def count_frames(num: int, grid: Grid) -> int:
    """How many whole frames `num` patches make up. ValueError where they make up none, or a part of one is left."""
    _, height, width = grid
    if num < 1 or num % (height * width):
        raise ValueError(f"{num} points are no whole number of frames of {height}x{width} patches: "
                         f"give a multiple of {height * width} (--point_per_vid)")
    return num // (height * width)


def _real_times(grid: Grid, n_frames: int, patch_t: int) -> int:
    return min(max(n_frames // patch_t, 1), grid[0])
