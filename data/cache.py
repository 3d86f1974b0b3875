"""Rows computed once and read many times (latents, codes, clips): a few large files, read through memory maps."""
import hashlib
import json
import os
import zlib
from pathlib import Path

import numpy as np


class RowCache:
    """`num_rows` arrays of one shape, in .npy shards of `shard_rows` rows each.

    A shard appears under its name only when whole, so that filling can be killed and gone on with, by any number of
    processes: each writes other shards of `missing()`. The name carries the CRC-32 of the rows, for `verify`.

    folder: holds one cache a key. name: what the rows are, for people. key: everything that the rows depend on, as
    plain JSON values; another key is another cache.
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
        self._write(self.folder / "key.json", lambda file: file.write(text.encode()))
        self._maps = None

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.num_rows))

    def missing(self) -> list[int]:
        """Shards not written yet."""
        return sorted(set(range(self.num_shards)) - self._files().keys())

    def write(self, shard: int, rows: np.ndarray) -> None:
        """rows: (len(rows_of(shard)), *row_shape) of the cache's dtype."""
        expected = (len(self.rows_of(shard)), *self.row_shape)
        if rows.shape != expected or rows.dtype != self.dtype:
            raise ValueError(f"shard {shard} is {expected} {self.dtype}, got {rows.shape} {rows.dtype}")
        rows = np.ascontiguousarray(rows)
        self._write(self.folder / f"shard_{shard:06d}.{zlib.crc32(rows):08x}.npy", lambda file: np.save(file, rows))

    @property
    def maps(self) -> list[np.ndarray]:
        """The shards' rows as read-only memory maps, in order. ValueError while one is missing."""
        if self._maps is None:
            if missing := self.missing():
                raise ValueError(f"{self.folder} lacks {len(missing)} of {self.num_shards} shards: fill it first")
            self._maps = [np.load(path, mmap_mode="r") for _, path in sorted(self._files().items())]
        return self._maps

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The rows at the indices given, copied: (len(rows), *row_shape)."""
        out = np.empty((len(rows), *self.row_shape), self.dtype)
        for place, row in enumerate(rows):
            out[place] = self.maps[row // self.shard_rows][row % self.shard_rows]
        return out

    def verify(self) -> None:
        """Compare every shard with the checksum in its name; ValueError naming the first that differs."""
        for path in self._files().values():
            if f"{zlib.crc32(np.load(path)):08x}" != path.name.split(".")[1]:
                raise ValueError(f"{path} is damaged: delete it, and it will be made again")

    def _files(self) -> dict[int, Path]:
        return {int(path.name[6:12]): path for path in self.folder.glob("shard_*.npy")}

    @staticmethod
    def _write(path: Path, write) -> None:
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with open(partial, "wb") as file:
            write(file)
        os.replace(partial, path)

    def __getstate__(self):
        return {**self.__dict__, "_maps": None}  # loader workers open maps of their own
