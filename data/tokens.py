"""Token files: a safetensors file whose tensors grow row by row, and which is read row by row."""
import contextlib
import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import DamagedFile, reading
from common.files import atomic_write

DTYPES = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "F16": torch.float16, "F32": torch.float32}
FORMAT = "1"


class TokenWriter:
    """Collects rows in temporary files; `finish` writes them as one file, atomically. A context manager."""

    def __init__(self):
        self.parts: dict[str, list] = {}  # name: file, dtype, shape of a row, number of rows
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *_) -> None:
        self.stack.close()

    def append(self, name: str, rows: Tensor) -> None:
        """rows: (n, ...) of the dtypes in DTYPES; all of a name have one shape and dtype."""
        rows = rows.detach().cpu().contiguous()
        if name not in self.parts:
            part = self.stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            self.parts[name] = [part, rows.dtype, rows.shape[1:], 0]
        file, dtype, shape, _ = self.parts[name]
        if (rows.dtype, rows.shape[1:]) != (dtype, shape):
            raise ValueError(f"{name} has rows of {dtype} {tuple(shape)}, got {rows.dtype} {tuple(rows.shape[1:])}")
        file.write(rows.numpy().tobytes())
        self.parts[name][3] += len(rows)

    def append_file(self, name: str, path: str | Path) -> None:
        """The bytes of a file, as a tensor of uint8."""
        file = self.stack.enter_context(open(path, "rb"))  # noqa: SIM115
        self.parts[name] = [file, torch.uint8, torch.Size(), file.seek(0, 2)]

    def finish(self, path: str | Path, metadata: dict) -> None:
        names = {dtype: name for name, dtype in DTYPES.items()}
        header: dict[str, dict] = {"__metadata__": {"format": FORMAT, "tokens": json.dumps(metadata)}}
        offset = 0
        for name, (_, dtype, shape, count) in self.parts.items():
            size = count * math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": names[dtype], "shape": [count, *shape], "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for file, *_ in self.parts.values():
                file.seek(0)
                shutil.copyfileobj(file, target, 2**20)


class TokenReader:
    """metadata: what `finish` was given. Raises DamagedFile for a file that is none, or is cut short."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with reading(path, "a token file", "give a file that tokenize_video.py encode wrote"):
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self.start = 8 + length
                size = file.seek(0, 2)
                if not 0 < length < min(size, 2**26):
                    raise ValueError("it has no header")
                file.seek(8)
                self.header = json.loads(file.read(length))
            about = self.header.pop("__metadata__")
            if about["format"] != FORMAT:
                raise ValueError(f"it has format {about['format']}, this version reads {FORMAT}")
            self.metadata = json.loads(about["tokens"])
            end = max(entry["data_offsets"][1] for entry in self.header.values())
            if self.start + end > size:
                raise ValueError("it is cut short")

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows first, ..., first + count - 1 of a tensor, as a copy."""
        entry = self.header[name]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"][1:]
        size = math.prod(shape) * dtype.itemsize
        with open(self.path, "rb") as file:
            file.seek(self.start + entry["data_offsets"][0] + first * size)
            data = bytearray(file.read(count * size))
        if len(data) != count * size:
            raise DamagedFile(f"{self.path} is cut short: it has no row {first + count - 1} of {name}")
        return torch.from_numpy(np.frombuffer(data, np.uint8)).view(dtype).view(count, *shape)

    def copy_file(self, name: str, target: str | Path) -> bool:
        """The bytes given to `append_file`; returns whether there are any."""
        if name not in self.header:
            return False
        first, end = self.header[name]["data_offsets"]
        with open(self.path, "rb") as file, open(target, "wb") as out:
            file.seek(self.start + first)
            left = end - first
            while left:
                piece = file.read(min(left, 2**20))
                if not piece:
                    raise DamagedFile(f"{self.path} is cut short in {name}")
                out.write(piece)
                left -= len(piece)
        return True
