"""Caches of the latents or codes of a few windows of every video, which a frozen tokenizer computes once."""
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from common import distributed
from common.console import Progress
from common.rng import Stream, generator
from data.cache import RowCache
from data.clips import ClipDataset, ClipKey
from data.lists import VideoFile, files_sha256
from data.loader import make_loader
from data.video import VideoError


class WindowCache:
    """`views` windows of every video, encoded once. Row `file * views + view` holds (row_size,) values of the window
    drawn from (seed, row). A row that cannot be decoded is filled with `missing`, which no other row starts with.

    folder: holds all caches. name: what the rows are, for people. clips: the videos, with damaged="skip".
    key: plain JSON values that identify the encoder. A cache is found by this key, the videos (names and sizes), the
    number of windows and the seed.
    """

    def __init__(self, folder: Path, name: str, clips: ClipDataset, views: int, key: dict, row_size: int, dtype: str,
                 missing: float):
        self.clips, self.views, self.name, self.missing = clips, views, name, missing
        key = {**key, "views": views, "seed": clips.seed, "files": files_sha256(clips.files)}
        self.rows = RowCache(folder, name, key, len(clips.files) * views, (row_size,), dtype)

    def fill_rows(self, encode: Callable[[dict], Tensor], batch_size: int, num_workers: int) -> None:
        """Encode the missing rows; each process fills its share of the shards. Complete shards of a killed run stay.

        encode: a loader's batch -> (B, row_size).
        """
        missing = distributed.broadcast(self.rows.missing())
        shards = distributed.of_rank(missing)
        spans = [self.rows.rows_of(shard) for shard in shards]
        parts = [(shard, span[i : i + batch_size]) for shard, span in zip(shards, spans)
                 for i in range(0, len(span), batch_size)]  # no batch spans two shards
        batches = [[ClipKey(row, row // self.views) for row in part] for _, part in parts]
        loader = make_loader(self.clips, batches, min(num_workers, len(batches)))
        quiet = not (distributed.is_main() and parts)
        for (shard, part), batch in zip(Progress(parts, f"caching {self.name}", disable=quiet), loader):
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
        """Indices of the videos whose windows could all be decoded. Raises VideoError if there are none."""
        first = np.concatenate([np.array(self.rows.open(shard)[:, 0]) for shard in range(self.rows.num_shards)])
        bad = np.isnan(first) if np.isnan(self.missing) else first == self.missing
        good = np.flatnonzero(~bad.reshape(-1, self.views).any(1)).tolist()
        if not good:
            raise VideoError(f"{self.rows.folder}: none of {len(self.clips.files)} videos could be decoded")
        return good

    def draw(self, keys: list[ClipKey], files: list[int], seed: int) -> tuple[np.ndarray, list[VideoFile]]:
        """The row and the video of each sample of a micro-batch. The row is one of the video's, drawn from (seed,
        position).

        files: maps the keys' indices to videos (see `good_files`).
        """
        chosen = np.array([files[key.index] for key in keys if key.index is not None])
        views = [generator(seed, key.position, Stream.CACHED_VIEW).integers(self.views) for key in keys]
        return chosen * self.views + np.array(views), [self.clips.files[file] for file in chosen]

