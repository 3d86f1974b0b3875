"""Ready frames of all videos of a list, decoded once."""
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from data.cache import ClipCache
from data.clips import Loader, Quarantine, VideoFile, deliver, init_worker
from data.video import NULL, VideoError, file_size, read_chosen, resize_crop_8bit
from eval.protocols import manifest_sha256
from training import distributed
from training.log import say


def clip_cache(
    folder: str | Path, files: Sequence[VideoFile], size: int, rule: str, quarantine: Quarantine, num_workers: int,
    timeout: float,
) -> ClipCache:
    """The cache in `folder` of these videos by `size` and `rule` (as `resize_crop` takes them), filled where it is not
    yet, by `num_workers` of each process; the whole shards of a killed run are kept.

    A video of which a frame cannot be decoded is quarantined and has none in the cache; one that is good in part is
    read from its file. timeout: seconds for one video.
    """
    cache = ClipCache(folder, {"files": files_sha256(files), "rule": rule}, len(files), size)
    fill(cache, WholeVideos(files, size, rule, quarantine, timeout), num_workers)
    lengths = cache.index[1]
    say(f"clips of {(lengths > 0).sum():,} of {len(files):,} videos, {lengths.sum() * 3 * size**2 / 2**30:.2f} GiB, "
        f"are cached in {cache.folder}")
    return cache


class WholeVideos(Dataset):
    """All frames of each video, ready: (num_frames, size, size, 3) uint8, with no frames where one is damaged."""

    def __init__(self, files: Sequence[VideoFile], size: int, rule: str, quarantine: Quarantine, timeout: float):
        self.files, self.size, self.rule, self.quarantine, self.timeout = files, size, rule, quarantine, timeout

    def __getitem__(self, index: int) -> Tensor:
        path = self.files[index].path
        if path not in self.quarantine:
            try:
                return resize_crop_8bit(read_chosen(path, np.arange, self.timeout)[0], self.size, self.rule)
            except VideoError as error:
                self.quarantine.add_error(path, error)
        return torch.empty(0, self.size, self.size, 3, dtype=torch.uint8)


def deliver_video(frames: Tensor) -> dict:
    return deliver({}, [frames], alike=True)


def fill(cache: ClipCache, videos: WholeVideos, num_workers: int) -> None:
    """Write the missing shards, shared by all processes."""
    shards = distributed.broadcast(cache.missing())[distributed.rank() :: distributed.world_size()]
    order = [video for shard in shards for video in cache.rows_of(shard)]
    decoded = iter(Loader(
        videos, batch_size=None, sampler=order, num_workers=min(num_workers, len(order)), worker_init_fn=init_worker,
        collate_fn=deliver_video, generator=torch.Generator(),  # else it would draw from the global generator
    ))
    with tqdm(total=len(order), desc="caching clips", disable=not (distributed.is_main() and order)) as bar:
        for shard in shards:
            frames = []
            for _ in cache.rows_of(shard):
                # A copy: what workers ship holds a file each, until it is freed.
                frames.append(next(decoded)["frames"][0].numpy().copy())
                bar.update()
            cache.write(shard, frames)
    distributed.wait_until(lambda: not cache.missing())


def is_broken_link(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def files_sha256(files: Sequence[VideoFile]) -> str:
    """SHA-256 of the videos' paths, relative to the folder they share, and sizes in bytes (0 for a random clip, which
    has no file, and one that is missing): what caches of them are found by."""
    root = os.path.commonpath([os.path.dirname(file.path) for file in files])
    if all(is_broken_link(file.path) for file in files):
        raise FileNotFoundError(f"all {len(files)} videos under {root} are links to nothing: is their disk there?")

    def size(path: str) -> int:
        try:
            return 0 if path.startswith(NULL) or is_broken_link(path) else file_size(path)
        except VideoError:
            return 0

    sizes = (size(file.path) for file in files)
    return manifest_sha256([f"{file.path} {size}" for file, size in zip(files, sizes)], root)
