"""Caches of rows that are computed once and read often (latents, codes, clips): a few large memory-mapped files.

    python -m data.cache data/cache/clips-0123456789ab     checks a cache against its checksums
"""
import hashlib
import json
import math
import sys
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike

from common.errors import REMAKE, ArgumentParser, reading
from common.files import atomic_write, remove_partials


class ShardCache:
    """`num_rows` rows in .npy shards of `shard_rows` each.

    Shards are written atomically, so filling can be killed and resumed, by any number of processes: each writes its own
    shards of `missing()`. Files that a killed process left are removed when the cache is next opened. A shard's name
    holds the CRC-32 of its content, for `verify`.

    folder: holds one cache for each key. name: what the rows are, for people. key: everything that the rows depend on,
    as plain JSON values; another key makes another cache.
    """

    def __init__(
        self, folder: str | Path, name: str, key: dict, num_rows: int, row_shape: tuple[int, ...], dtype: str,
        shard_rows: int = 256,
    ):
        self.num_rows, self.shard_rows = num_rows, shard_rows
        self.row_shape, self.dtype = tuple(row_shape), np.dtype(dtype)
        shape = {"rows": num_rows, "row_shape": list(row_shape), "dtype": str(dtype), "shard_rows": shard_rows}
        text = json.dumps({"key": key, **shape}, indent=1, sort_keys=True)
        self.folder = Path(folder) / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "key.json").exists():
            with atomic_write(self.folder / "key.json") as file:
                file.write(text.encode())
        remove_partials(self.folder)

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.num_rows))

    def missing(self) -> list[int]:
        """Shards not written yet."""
        return sorted(set(range(self.num_shards)) - self._files().keys())

    def paths(self) -> list[Path]:
        """The shards' files in order. ValueError while one is missing."""
        if missing := self.missing():
            raise ValueError(f"{self.folder} lacks {len(missing)} of {self.num_shards} shards: fill it first")
        return [path for _, path in sorted(self._files().items())]

    def verify(self) -> None:
        """Compare every shard with the checksum in its name; ValueError naming the first that differs."""
        for path in self._files().values():
            check(path)

    def _save(self, shard: int, content: np.ndarray) -> None:
        content = np.ascontiguousarray(content)
        path = self.folder / f"shard_{shard:06d}.{zlib.crc32(content.data):08x}.npy"
        with atomic_write(path) as file:
            np.save(file, content)

    def _files(self) -> dict[int, Path]:
        return {int(path.name[6:12]): path for path in self.folder.glob("shard_*.npy")}


def check(shard: Path) -> None:
    """DamagedFile where a shard's content does not have the checksum in its name."""
    with reading(shard, "a shard of a cache", REMAKE):
        if f"{zlib.crc32(np.load(shard)):08x}" != shard.name.split(".")[1]:
            raise ValueError("its content is not what its checksum says")


def open_shard(
    path: Path, dtype: DTypeLike, shape: tuple[int | None, ...], mode: Literal["r", "c"] = "r"
) -> np.ndarray:
    """A shard's array, memory-mapped. shape: the expected one; None fits any size. Raises DamagedFile."""
    with reading(path, "a shard of a cache", REMAKE):
        array = np.load(path, mmap_mode=mode)
        if array.dtype != dtype or len(array.shape) != len(shape) or any(
            wanted not in (None, found) for wanted, found in zip(shape, array.shape)
        ):
            raise ValueError(f"it holds {array.shape} {array.dtype}")
        return array


MAX_MAPS = 256  # open maps of a RowCache: each holds a file open, and a process may have about a thousand


class RowCache(ShardCache):
    """A cache of rows of one shape and dtype."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._maps: dict[int, np.ndarray] = {}

    def write(self, shard: int, rows: np.ndarray) -> None:
        """rows: (len(rows_of(shard)), *row_shape) of the cache's dtype."""
        expected = (len(self.rows_of(shard)), *self.row_shape)
        if rows.shape != expected or rows.dtype != self.dtype:
            raise ValueError(f"shard {shard} is {expected} {self.dtype}, got {rows.shape} {rows.dtype}")
        self._save(shard, rows)

    @cached_property
    def _paths(self) -> list[Path]:
        return self.paths()

    def open(self, shard: int) -> np.ndarray:
        """The rows of a shard, memory-mapped."""
        return open_shard(self._paths[shard], self.dtype, (len(self.rows_of(shard)), *self.row_shape))

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            if len(self._maps) == MAX_MAPS:
                del self._maps[next(iter(self._maps))]
            self._maps[shard] = self.open(shard)
        return self._maps[shard]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """A copy of the rows at these indices: (len(rows), *row_shape). ValueError while a shard is missing."""
        out = np.empty((len(rows), *self.row_shape), self.dtype)
        for place, row in enumerate(rows):
            out[place] = self._map(row // self.shard_rows)[row % self.shard_rows]
        return out

    def __getstate__(self):
        return {**self.__dict__, "_maps": {}}  # loader workers open their own maps


class ClipCache(ShardCache):
    """A cache of resized frames of videos of any length: row i is video i, (num_frames, size, size, 3) uint8.

    A shard is one array of bytes: the lengths of its videos (int64), then their frames. A video that could not be
    decoded has no frames. 32 videos of ten seconds are 400 MB at a size of 128.
    """

    def __init__(self, folder: str | Path, key: dict, num_videos: int, size: int, shard_rows: int = 32):
        super().__init__(folder, "clips", key, num_videos, (size, size, 3), "uint8", shard_rows)

    def write(self, shard: int, videos: Sequence[np.ndarray]) -> None:
        """videos: the videos of rows_of(shard)."""
        if len(videos) != len(self.rows_of(shard)) or any(
            video.shape[1:] != self.row_shape or video.dtype != self.dtype for video in videos
        ):
            raise ValueError(f"shard {shard} is {len(self.rows_of(shard))} videos of {self.row_shape} {self.dtype}, "
                             f"got {[(video.shape, video.dtype) for video in videos]}")
        lengths = np.array([len(video) for video in videos], np.int64)
        self._save(shard, np.concatenate([lengths.view(np.uint8), *(video.reshape(-1) for video in videos)]))

    @cached_property
    def index(self) -> tuple[list[Path], np.ndarray, np.ndarray]:
        """(the shards' paths, the number of frames of each video, the place of its first frame in its shard)."""
        paths, lengths, starts = self.paths(), [], []
        for shard, path in enumerate(paths):
            content = open_shard(path, np.uint8, (None,))
            there = content[: 8 * len(self.rows_of(shard))]
            with reading(path, "a shard of a cache", REMAKE):
                there = there.view(np.int64)
                if len(content) - 8 * len(there) != there.sum() * math.prod(self.row_shape) or there.min() < 0:
                    raise ValueError(f"it holds {len(content)} bytes, not those of videos of {there.tolist()} frames")
            lengths.append(np.array(there))
            starts.append(np.cumsum(there) - there)
        return paths, np.concatenate(lengths), np.concatenate(starts)

    def length(self, video: int) -> int:
        """Frames of a video; 0 where it could not be decoded."""
        return int(self.index[1][video])

    def read(self, video: int, frames: np.ndarray) -> np.ndarray:
        """(len(frames), size, size, 3) uint8, memory-mapped: the caller copies it once. frames: ascending, evenly
        spaced indices."""
        paths, _, starts = self.index
        shard = video // self.shard_rows
        # Mapped anew at each read, which takes 0.1 ms: a map that is kept holds a file open. Copy-on-write ("c"), so
        # writing to the frames does not change the file.
        content = np.asarray(open_shard(paths[shard], np.uint8, (None,), "c"))[8 * len(self.rows_of(shard)) :]
        first, last = starts[video] + frames[0], starts[video] + frames[-1]
        step = frames[1] - frames[0] if len(frames) > 1 else 1
        return content.reshape(-1, *self.row_shape)[first : last + 1 : step]


if __name__ == "__main__":
    parser = ArgumentParser(description="Compare caches with their checksums.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="such as data/cache/clips-0123456789ab")
    folders = parser.parse_args().folders
    try:
        shards = [shard for folder in folders for shard in sorted(Path(folder).glob("shard_*.npy"))]
        if not shards:
            raise ValueError(f"no shards in {', '.join(folders)}: give folders of caches, such as "
                             "data/cache/clips-0123456789ab")
        for shard in shards:
            check(shard)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(shards)} shard{'s' * (len(shards) > 1)} verified")
