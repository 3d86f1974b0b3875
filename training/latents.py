"""CoordTok's planes as training data of a diffusion model: statistics, and batches from videos or from a cache."""
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import distributed
from common.distributed import to_device
from data.clips import ClipDataset, ClipKey
from data.loader import GlobalBatchSampler, make_loader
from models.coordtok import CoordTokConfig
from models.triplane import Planes
from training.window_cache import WindowCache

Encode = Callable[[dict], Planes]  # a loader's batch -> planes, channels last, float32


class LatentStats(NamedTuple):
    """Mean and standard deviation of the channels of each plane, (C,) float32 each, which standardise latents."""

    mean: Planes
    std: Planes

    def standardise(self, planes: Planes) -> Planes:
        """(B, R, R, C) planes of a tokenizer -> (B, C, R, R) planes of mean 0 and variance 1."""
        return planes.map(lambda plane, mean, std: (plane - mean) / std, self.mean, self.std).channels_first()

    def restore(self, planes: Planes) -> Planes:
        """The inverse of `standardise`."""
        return planes.channels_last().map(lambda plane, mean, std: plane * std + mean, self.mean, self.std)

    def to(self, device: torch.device) -> "LatentStats":
        return LatentStats(*(planes.map(lambda values: values.to(device)) for planes in self))

    def state_dict(self) -> dict[str, Tensor]:
        """{"xy_mean": (C,), "xy_std": ..., ...}, with the names of the authors' log."""
        return {f"{plane}_{kind}": values.cpu() for kind in self._fields
                for plane, values in getattr(self, kind)._asdict().items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "LatentStats":
        return cls(*(Planes(*(state[f"{plane}_{kind}"] for plane in Planes._fields)) for kind in cls._fields))


def measure(batches: Iterator[Planes], channels: int, device: torch.device) -> LatentStats:
    """Statistics over the batches of all processes, from exact sums. (The released code averages the variances of the
    processes, which depends on their number.)

    batches: this process's, any number of them; each plane is (B, R, S, channels), or has the channels of the clip
    before too (`encode_pairs`), which are left out. Raises ValueError if no process has any, or none has a clip before.
    """
    num_whole = torch.zeros(1, device=device)  # clips that have all their channels
    sums = torch.zeros(3, 3, channels, dtype=torch.float64, device=device)  # plane; count, sum, squares; channel
    for planes in batches:
        num_whole += planes.xy[:, 0, 0, -1].isfinite().sum() if planes.xy.shape[-1] > channels else len(planes.xy)
        flat = planes.map(lambda plane: plane[..., :channels].to(device).double().flatten(0, -2))  # (values, C)
        sums += torch.stack([torch.stack([torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)]) for x in flat])
    count, total, squares = distributed.all_sum(sums).unbind(1)  # (3 planes, C) each
    if count.min() < 2:
        raise ValueError("none of the clips that the latents' mean and std are of can be decoded (quarantine.txt)")
    if not distributed.all_sum(num_whole):
        raise ValueError("no clip has one before it: --condition_on_previous needs videos of twice --num_frames frames")
    mean = total / count
    std = ((squares - count * mean.square()) / (count - 1)).clamp_min(1e-12).sqrt()  # a dead channel becomes 0, not NaN
    return LatentStats(Planes(*mean.float()), Planes(*std.float()))


def of_videos(videos: list[int], source: "LatentCache | ClipDataset", encode: Encode, batch_size: int,
              num_workers: int) -> Iterator[Planes]:
    """Latents of this process's share of some videos, in batches, for `measure`: of the first cached window of each, or
    of a clip of each that is encoded now."""
    mine = distributed.of_rank(videos)
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    if isinstance(source, LatentCache):
        return (source.read(np.array(batch) * source.views) for batch in batches)
    keys = [[ClipKey(video, video) for video in batch] for batch in batches]
    loader = make_loader(source, keys, min(num_workers, len(keys)))
    return (encode(batch) for batch in loader if len(batch["position"]))  # empty if all clips are damaged


@torch.inference_mode()
def encode_pairs(encode: Encode, num_frames: int, device: torch.device, batch: dict) -> Planes:
    """Planes (B, R, S, 2 C) of a batch of a ClipDataset with `pairs`: first the channels of the clip, which is the
    second window, then those of the clip before, NaN where the video is too short for two windows.

    encode: a batch of clips of `num_frames` frames -> their planes (B, R, S, C).
    """
    frames, lengths = batch["frames"], batch["n_frames"].tolist()
    frames = frames.to(device, non_blocking=True) if isinstance(frames, Tensor) else frames
    paired = [i for i, length in enumerate(lengths) if length == 2 * num_frames]
    windows: Any = [clip[:num_frames] for clip in frames] + [frames[i][num_frames:] for i in paired]
    n_frames = torch.tensor([min(length, num_frames) for length in lengths] + [num_frames] * len(paired))
    windows = torch.stack(windows) if isinstance(frames, Tensor) else windows
    found = encode({**batch, "frames": windows, "n_frames": n_frames})
    second = {i: len(lengths) + place for place, i in enumerate(paired)}

    def joined(plane: Tensor) -> Tensor:
        clip = [plane[second.get(i, i)] for i in range(len(lengths))]
        before = [plane[i] if i in second else torch.full_like(plane[i], math.nan) for i in range(len(lengths))]
        return torch.cat([torch.stack(clip), torch.stack(before)], dim=-1)

    return found.map(joined)


def split_pairs(planes: Planes, stats: LatentStats, hidden: Tensor) -> tuple[Planes, dict[str, Any]]:
    """The planes (B, R, S, C) of the clips in what `encode_pairs` returns, and as keyword arguments of `SiT.forward`
    the clips before them. hidden: (B,) bool, the clips that are to be learned without the one before. Planes of C
    channels, of clips alone, come back as they are."""
    channels = len(stats.mean.xy)
    if planes.xy.shape[-1] == channels:
        return planes, {}
    absent = planes.xy[:, 0, 0, channels].isnan()
    before = stats.standardise(planes.map(lambda plane: plane[..., channels:]))
    before = before.map(lambda plane: torch.where(absent[:, None, None, None], 0.0, plane))
    return planes.map(lambda plane: plane[..., :channels]), {"previous": before, "first": absent | hidden}


class Draws(NamedTuple):
    """What a training step draws for its whole batch, on every process alike: noise (B, *shape) for each plane, and
    (3, B) uniform numbers in [0, 1), for times, hidden labels and hidden clips before."""

    noise: Planes
    uniform: Tensor

    def of(self, rows: slice, args: Namespace) -> tuple[Planes, Tensor, Tensor | None, Tensor]:
        """The noise of these rows, the numbers for their times, whose label is hidden (None: nobody's can be), and
        whose clip before."""
        time, label, previous = self.uniform[:, rows]
        drop = label < args.class_dropout_prob if args.class_dropout_prob else None
        return self.noise.map(lambda plane: plane[rows]), time, drop, previous < args.previous_dropout_prob


def draw_step(seed: int, step: int, batch_size: int, shapes: Sequence[tuple[int, ...]],
              device: torch.device) -> Draws:
    """The draws of one step; shapes: of the noise, plane by plane."""
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
    noise = Planes(*(torch.randn(batch_size, *shape, generator=generator, device=device) for shape in shapes))
    # Two draws, so that the first one is the same as before there was a second.
    uniform = [torch.rand(rows, batch_size, generator=generator, device=device) for rows in (2, 1)]
    return Draws(noise, torch.cat(uniform))


def plane_shapes(config: CoordTokConfig) -> tuple[tuple[int, int, int], ...]:
    """(R, S, C) of each plane."""
    res, res_t, channels = config.latent_resolution_xy, config.latent_resolution_t, config.latent_n_features
    return (res, res, channels), (res_t, res, channels), (res_t, res, channels)


class LatentCache(WindowCache):
    """A WindowCache of float32 planes. Rows that cannot be decoded are NaN. With `clips.pairs` a row holds the planes
    of two windows, (R, S, 2 C) each, as `encode_pairs` returns them."""

    def __init__(self, folder: Path, clips: ClipDataset, config: CoordTokConfig, views: int, key: dict):
        self.shapes = [(*shape, channels * (1 + clips.pairs)) for *shape, channels in plane_shapes(config)]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        key = {**key, "config": asdict(config), **({"pairs": True} if clips.pairs else {})}
        super().__init__(folder, "latents", clips, views, key, sum(self.sizes), "float32", math.nan)

    def fill(self, encode: Encode, batch_size: int, num_workers: int) -> None:
        def flat(batch: dict) -> Tensor:
            return torch.cat([plane.flatten(1) for plane in encode(batch)], dim=1)

        self.fill_rows(flat, batch_size, num_workers)

    def read(self, rows: np.ndarray) -> Planes:
        """(B, R, S, C) planes on the CPU."""
        parts = torch.from_numpy(self.rows.read(rows)).split(self.sizes, dim=1)
        return Planes(*(part.unflatten(1, shape) for part, shape in zip(parts, self.shapes)))


def batches_from_cache(
    cache: LatentCache, sampler: GlobalBatchSampler, files: list[int], device: torch.device
) -> Iterator[tuple[Planes, Tensor, list[str]]]:
    """(planes, labels (B,) long, paths) of each micro-batch. A sample takes one of its video's windows at random.

    files: maps the sampler's indices to videos (see `WindowCache.good_files`).
    """
    for keys in sampler:
        rows, videos = cache.draw(keys, files, sampler.seed)
        planes, labels = cache.read(rows), torch.tensor([video.label for video in videos])
        paths = [video.path for video in videos]
        yield planes.map(partial(to_device, device=device)), to_device(labels, device), paths


def batches_from_video(loader, encode: Encode, device: torch.device) -> Iterator[tuple[Planes, Tensor, list[str]]]:
    """(planes, labels (B,) long, paths) of each micro-batch of the loader."""
    for batch in loader:
        yield encode(batch), batch["label"].to(device, non_blocking=True), batch["path"]

