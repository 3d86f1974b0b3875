"""Ready frames of all videos of a list, decoded once."""
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common import distributed
from common.console import Progress, print_main
from data.cache import ClipCache
from data.clips import Quarantine
from data.lists import VideoFile, files_sha256
from data.loader import Loader, deliver, init_worker
from data.shared_memory import Packed
from data.video import VideoError, read_chosen, resize_crop_8bit


def clip_cache(
    folder: str | Path, files: Sequence[VideoFile], size: int, rule: str, quarantine: Quarantine, num_workers: int,
    timeout: float,
) -> ClipCache:
    """The cache in `folder` of all frames of these videos, resized by `size` and `rule` (see `resize_crop`). Missing
    shards are filled by `num_workers` workers of each process; complete shards of a killed run are kept.

    A video with a frame that cannot be decoded has no frames in the cache. It is quarantined; if some of its frames are
    good, training reads them from the file. timeout: seconds for one video.
    """
    cache = ClipCache(folder, {"files": files_sha256(files), "rule": rule}, len(files), size)
    fill(cache, WholeVideos(files, size, rule, quarantine, timeout), num_workers)
    lengths = cache.index[1]
    print_main(f"clips of {(lengths > 0).sum():,} of {len(files):,} videos, "
               f"{lengths.sum() * 3 * size**2 / 2**30:.2f} GiB, are cached in {cache.folder}")
    return cache


class WholeVideos(Dataset):
    """All frames of each video, resized: (num_frames, size, size, 3) uint8; no frames for a damaged video."""

    def __init__(self, files: Sequence[VideoFile], size: int, rule: str, quarantine: Quarantine, timeout: float):
        self.files, self.size, self.rule, self.quarantine, self.timeout = files, size, rule, quarantine, timeout

    def __getitem__(self, index: int) -> Tensor:
        path = self.files[index].path
        if path not in self.quarantine:
            try:
                return resize_crop_8bit(read_chosen(path, range, self.timeout)[0], self.size, self.rule)
            except VideoError as error:
                self.quarantine.add_error(path, error)
        return torch.empty(0, self.size, self.size, 3, dtype=torch.uint8)


def deliver_video(frames: Tensor) -> dict | Packed:
    return deliver({}, [frames], alike=True)


def fill(cache: ClipCache, videos: WholeVideos, num_workers: int) -> None:
    """Write the missing shards; each process writes its share of them."""
    shards = distributed.of_rank(distributed.broadcast(cache.missing()))
    order = [video for shard in shards for video in cache.rows_of(shard)]
    decoded = iter(Loader(
        videos, batch_size=None, sampler=order, num_workers=min(num_workers, len(order)), worker_init_fn=init_worker,
        collate_fn=deliver_video,  # type: ignore[arg-type]  # takes one video, as batch_size is None
        generator=torch.Generator(),  # otherwise it would draw from the global generator
    ))
    with Progress(total=len(order), desc="caching clips", disable=not (distributed.is_main() and order)) as bar:
        for shard in shards:
            frames = []
            for _ in cache.rows_of(shard):
                # A copy, since frames from a worker keep a file open until they are freed.
                frames.append(next(decoded)["frames"][0].numpy().copy())
                bar.update()
            cache.write(shard, frames)
    distributed.wait_until(lambda: not cache.missing())

