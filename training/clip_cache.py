"""Ready frames of all videos of a list, decoded once."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common import distributed
from common.console import Progress, print_main
from data.cache import ClipCache
from data.clips import Quarantine
from data.lists import VideoFile, files_sha256
from data.loader import Loader, deliver, init_worker
from data.video import VideoError, read_chosen, resize_crop_8bit


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
    print_main(f"clips of {(lengths > 0).sum():,} of {len(files):,} videos, "
               f"{lengths.sum() * 3 * size**2 / 2**30:.2f} GiB, are cached in {cache.folder}")
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
    with Progress(total=len(order), desc="caching clips", disable=not (distributed.is_main() and order)) as bar:
        for shard in shards:
            frames = []
            for _ in cache.rows_of(shard):
                # A copy: what workers ship holds a file each, until it is freed.
                frames.append(next(decoded)["frames"][0].numpy().copy())
                bar.update()
            cache.write(shard, frames)
    distributed.wait_until(lambda: not cache.missing())

