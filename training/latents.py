"""CoordTok's planes as a diffusion model's data: statistics, and batches from videos or from a cache of latents."""
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.cache import RowCache
from data.clips import ClipDataset, ClipKey, GlobalBatchSampler, make_loader
from eval.protocols import manifest_sha256
from models.coordtok import CoordTokConfig
from models.planes import Planes
from training import distributed

Encode = Callable[[dict], Planes]  # a loader's batch -> planes, channels last, float32


class LatentStats(NamedTuple):
    """Mean and standard deviation of each plane's channels, (C,) float32 each: what latents are standardised by."""

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
        """{"xy_mean": (C,), "xy_std": ..., ...} as the authors' log names them."""
        return {f"{plane}_{kind}": values.cpu() for kind in self._fields
                for plane, values in getattr(self, kind)._asdict().items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "LatentStats":
        return cls(*(Planes(*(state[f"{plane}_{kind}"] for plane in Planes._fields)) for kind in cls._fields))


def measure(batches: Iterator[Planes], channels: int, device: torch.device) -> LatentStats:
    """Statistics over the batches of all processes, from exact sums: not an average of per-process variances."""
    sums = torch.zeros(3, 3, channels, dtype=torch.float64, device=device)  # plane; count, sum, squares; channel
    for planes in batches:
        flat = planes.map(lambda plane: plane.to(device).double().flatten(0, -2))  # (values, C)
        sums += torch.stack([torch.stack([torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)]) for x in flat])
    count, total, squares = distributed.all_sum(sums).unbind(1)  # (3 planes, C) each
    mean = total / count
    std = ((squares - count * mean.square()) / (count - 1)).sqrt()
    return LatentStats(Planes(*mean.float()), Planes(*std.float()))


def plane_shapes(config: CoordTokConfig) -> Planes:
    """(R, S, C) of each plane."""
    res, res_t, channels = config.latent_resolution_xy, config.latent_resolution_t, config.latent_n_features
    return Planes((res, res, channels), (res_t, res, channels), (res_t, res, channels))


class LatentCache:
    """Planes of `views` windows of every video, encoded once.

    folder: where caches are kept. key: what the latents depend on beside the videos: tokenizer, precision.
    Rows are float32; row `file * views + view` is drawn at that position of the run's random stream. A damaged video's
    rows are NaN, and its videos are left out of training.
    """

    def __init__(self, folder: Path, clips: ClipDataset, config: CoordTokConfig, views: int, key: dict):
        self.clips, self.views, self.shapes = clips, views, plane_shapes(config)
        self.sizes = [math.prod(shape) for shape in self.shapes]
        key = {**key, "views": views, "seed": clips.seed, "files": manifest_sha256([f.path for f in clips.files])}
        self.rows = RowCache(folder, "latents", key, len(clips.files) * views, (sum(self.sizes),), "float32")

    def fill(self, encode: Encode, batch_size: int, num_workers: int) -> None:
        """Encode what is missing, shared by all processes; what a killed run left is kept."""
        shards = distributed.broadcast(self.rows.missing())
        mine = shards[distributed.rank() :: distributed.world_size()]
        for shard in tqdm(mine, "caching latents", disable=None if distributed.is_main() else True):
            span = self.rows.rows_of(shard)
            keys = [ClipKey(row, row // self.views) for row in span]
            batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
            filled = np.full((len(span), sum(self.sizes)), np.nan, np.float32)
            for batch in make_loader(self.clips, batches, min(num_workers, len(batches))):
                if len(batch["position"]):
                    planes = encode(batch)
                    flat = torch.cat([plane.flatten(1) for plane in planes], dim=1).float()
                    filled[batch["position"].numpy() - span.start] = flat.cpu().numpy()
            self.rows.write(shard, filled)
        distributed.barrier()

    def good_files(self) -> list[int]:
        """Indices of the videos that could be decoded."""
        first = np.concatenate([self.rows.read(np.array([file * self.views])) for file in range(len(self.clips.files))])
        return np.flatnonzero(~np.isnan(first[:, 0])).tolist()

    def read(self, rows: np.ndarray) -> Planes:
        """(B, R, S, C) planes on the CPU."""
        parts = torch.from_numpy(self.rows.read(rows)).split(self.sizes, dim=1)
        return Planes(*(part.unflatten(1, shape) for part, shape in zip(parts, self.shapes)))


def batches_from_cache(
    cache: LatentCache, sampler: GlobalBatchSampler, files: list[int], device: torch.device
) -> Iterator[tuple[Planes, Tensor, list[str]]]:
    """(planes, labels (B,) long, paths) of each micro-batch; each sample draws one of its video's cached windows.

    files: the videos the sampler's indices count.
    """
    for keys in sampler:
        chosen = [files[key.index] for key in keys]
        views = [np.random.default_rng((sampler.seed, key.position, 0, 4)).integers(cache.views) for key in keys]
        planes = cache.read(np.array([file * cache.views + view for file, view in zip(chosen, views)]))
        labels = torch.tensor([cache.clips.files[file].label for file in chosen])
        paths = [cache.clips.files[file].path for file in chosen]
        yield planes.map(lambda plane: plane.to(device, non_blocking=True)), labels.to(device), paths


def batches_from_video(loader, encode: Encode, device: torch.device) -> Iterator[tuple[Planes, Tensor, list[str]]]:
    """(planes, labels (B,) long, paths) of each micro-batch of the loader."""
    for batch in loader:
        yield encode(batch), batch["label"].to(device, non_blocking=True), batch["path"]
