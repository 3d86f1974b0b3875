"""CoordTok's planes as a diffusion model's data: statistics, and batches from videos or from a cache of latents.

WindowCache, what a frozen tokenizer makes of a few windows of every video, serves codes too.
"""
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.cache import RowCache
from data.clips import ClipDataset, ClipKey, GlobalBatchSampler, VideoFile, make_loader
from data.video import VideoError
from models.coordtok import CoordTokConfig
from models.planes import Planes
from training import distributed
from training.clip_cache import files_sha256

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
    """Statistics over the batches of all processes, from exact sums: not an average of per-process variances.

    batches: this process's, any number of them; channels last, (B, R, S, channels) each plane.
    """
    sums = torch.zeros(3, 3, channels, dtype=torch.float64, device=device)  # plane; count, sum, squares; channel
    for planes in batches:
        flat = planes.map(lambda plane: plane.to(device).double().flatten(0, -2))  # (values, C)
        sums += torch.stack([torch.stack([torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)]) for x in flat])
    count, total, squares = distributed.all_sum(sums).unbind(1)  # (3 planes, C) each
    mean = total / count
    std = ((squares - count * mean.square()) / (count - 1)).clamp_min(1e-12).sqrt()  # a dead channel becomes 0, not NaN
    return LatentStats(Planes(*mean.float()), Planes(*std.float()))


def plane_shapes(config: CoordTokConfig) -> Planes:
    """(R, S, C) of each plane."""
    res, res_t, channels = config.latent_resolution_xy, config.latent_resolution_t, config.latent_n_features
    return Planes((res, res, channels), (res_t, res, channels), (res_t, res, channels))


class WindowCache:
    """`views` windows of every video, encoded once: row `file * views + view`, of the window drawn from (seed, row), is
    (row_size,) values. Rows that cannot be decoded are `missing`, a value that no other row starts with.

    folder: where caches are kept. name: what the rows are. clips: the videos, with damaged="skip". key: what encodes
    them (plain JSON values); with the videos (names and sizes), their number of windows and the seed it is what a cache
    is found by.
    """

    def __init__(self, folder: Path, name: str, clips: ClipDataset, views: int, key: dict, row_size: int, dtype: str,
                 missing: float):
        self.clips, self.views, self.name, self.missing = clips, views, name, missing
        key = {**key, "views": views, "seed": clips.seed, "files": files_sha256(clips.files)}
        self.rows = RowCache(folder, name, key, len(clips.files) * views, (row_size,), dtype)

    def fill(self, encode: Callable[[dict], Tensor], batch_size: int, num_workers: int) -> None:
        """Encode what is missing, shared by all processes; the whole shards of a killed run are kept.

        encode: a loader's batch -> (B, row_size).
        """
        missing = distributed.broadcast(self.rows.missing())
        shards = missing[distributed.rank() :: distributed.world_size()]
        spans = [self.rows.rows_of(shard) for shard in shards]
        parts = [(shard, span[i : i + batch_size]) for shard, span in zip(shards, spans)
                 for i in range(0, len(span), batch_size)]  # of one shard each
        batches = [[ClipKey(row, row // self.views) for row in part] for _, part in parts]
        loader = make_loader(self.clips, batches, min(num_workers, len(batches)))
        quiet = not (distributed.is_main() and parts)
        for (shard, part), batch in zip(tqdm(parts, f"caching {self.name}", disable=quiet), loader):
            span = self.rows.rows_of(shard)
            if part.start == span.start:
                filled = np.full((len(span), *self.rows.row_shape), self.missing, self.rows.dtype)
            if len(batch["position"]):
                filled[batch["position"].numpy() - span.start] = encode(batch).cpu().numpy()
            if part.stop == span.stop:
                self.rows.write(shard, filled)
        distributed.wait_until(lambda: not self.rows.missing())
        if distributed.is_main() and not missing:
            self.rows.verify()

    def good_files(self) -> list[int]:
        """Indices of the videos of which every window could be decoded. VideoError where there is none."""
        first = np.concatenate([np.array(self.rows.open(shard)[:, 0]) for shard in range(self.rows.num_shards)])
        bad = np.isnan(first) if np.isnan(self.missing) else first == self.missing
        good = np.flatnonzero(~bad.reshape(-1, self.views).any(1)).tolist()
        if not good:
            raise VideoError(f"{self.rows.folder}: none of {len(self.clips.files)} videos could be decoded")
        return good

    def draw(self, keys: list[ClipKey], files: list[int], seed: int) -> tuple[np.ndarray, list[VideoFile]]:
        """For each sample of a micro-batch one of its video's rows, drawn from (seed, position), and that video.

        files: the videos that the keys' indices count.
        """
        chosen = np.array([files[key.index] for key in keys])
        views = [np.random.default_rng((seed, key.position, 0, 4)).integers(self.views) for key in keys]
        return chosen * self.views + np.array(views), [self.clips.files[file] for file in chosen]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` that the host does not wait for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def prefetch(batches: Iterator, device: torch.device) -> Iterator:
    """On a GPU, read each batch on a thread while the one before it is computed."""
    if device.type != "cuda":
        yield from batches
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, batches, None)
        while (batch := ahead.result()) is not None:
            ahead = pool.submit(next, batches, None)
            yield batch


class LatentCache(WindowCache):
    """A WindowCache of planes, float32; rows that cannot be decoded are NaN."""

    def __init__(self, folder: Path, clips: ClipDataset, config: CoordTokConfig, views: int, key: dict):
        self.shapes = plane_shapes(config)
        self.sizes = [math.prod(shape) for shape in self.shapes]
        key = {**key, "config": asdict(config)}
        super().__init__(folder, "latents", clips, views, key, sum(self.sizes), "float32", math.nan)

    def fill(self, encode: Encode, batch_size: int, num_workers: int) -> None:
        def flat(batch: dict) -> Tensor:
            return torch.cat([plane.flatten(1) for plane in encode(batch)], dim=1)

        super().fill(flat, batch_size, num_workers)

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
        rows, videos = cache.draw(keys, files, sampler.seed)
        planes, labels = cache.read(rows), torch.tensor([video.label for video in videos])
        paths = [video.path for video in videos]
        yield planes.map(partial(to_device, device=device)), to_device(labels, device), paths


def batches_from_video(loader, encode: Encode, device: torch.device) -> Iterator[tuple[Planes, Tensor, list[str]]]:
    """(planes, labels (B,) long, paths) of each micro-batch of the loader."""
    for batch in loader:
        yield encode(batch), batch["label"].to(device, non_blocking=True), batch["path"]
