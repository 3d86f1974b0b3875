"""Reads folders of sharded tensors, which `training/fsdp.py` writes: whole, on the CPU, without a process group."""
import io
import pathlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from models.pretrained import check_finite, verify


class _IndexUnpickler(pickle.Unpickler):
    """Admits what `write` puts into an index and nothing else, so that reading one runs no code that it carries.
    Tensors alone: torch would unpickle other entries with whatever they name."""

    ALLOWED = {
        **{(kind.__module__, kind.__qualname__): kind for kind in (
            metadata.Metadata, metadata.TensorStorageMetadata, metadata.ChunkStorageMetadata, metadata.TensorProperties,
            metadata.MetadataIndex, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo,
            torch.serialization._get_layout,
        )},
        ("torch", "Size"): torch.Size,
        # The path that it was written to, which nobody reads; Python 3.13 has the class in another module.
        **dict.fromkeys([("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")], pathlib.PurePosixPath),
        **{("torch", str(value).removeprefix("torch.")): value
           for value in vars(torch).values() if isinstance(value, torch.dtype)},
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise ValueError(f"its index names {module}.{name}, which no checkpoint of this project holds: do not use "
                             "this folder")
        return self.ALLOWED[module, name]


class IndexReader(dcp.FileSystemReader):
    """Reads a folder of shards without running code from its index."""

    def read_metadata(self, *args, **kwargs) -> metadata.Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            try:
                found = _IndexUnpickler(file).load()
            except (ValueError, OSError):
                raise
            except Exception as error:  # an unpickler fails on foreign bytes in too many ways to list
                raise ValueError(f"its index .metadata is damaged ({error})") from error
        if not isinstance(found, metadata.Metadata):
            raise ValueError("its index .metadata is damaged: it holds no list of tensors")
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found

    def _slice_file(self, file, entry) -> io.BytesIO:
        """One tensor's part of a file, whose checksum is right."""
        file.seek(entry.offset)
        part = io.BytesIO(file.read(entry.length))
        try:
            verify(part)
        except (ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{entry.relative_path} is damaged: {error}") from error
        part.seek(0)
        return part


def load_tensors(tensors: Mapping[str, Tensor], folder: Path, **options) -> None:
    """Read tensors in place. ValueError, in one line, where they are damaged."""
    try:
        dcp.load(dict(tensors), storage_reader=IndexReader(folder), **options)
    except dcp.api.CheckpointException as error:
        reasons = [str(reason) for reason, _ in error.failures.values()]
        raise ValueError(f"{folder} cannot be read as a checkpoint: {reasons[0]}") from error


def check(folder: Path) -> None:
    """Raises ValueError where a file of shards is missing or cut short, OSError where their index is."""
    sizes: dict[str, int] = {}
    for entry in IndexReader(folder).read_metadata().storage_data.values():
        sizes[entry.relative_path] = max(sizes.get(entry.relative_path, 0), entry.offset + entry.length)
    for name, size in sizes.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size < size:
            raise ValueError(f"{name} is missing, or shorter than its {size:,} bytes")


def read_whole(folder: Path, path: str) -> dict[str, Tensor]:
    """The tensors whose path starts with `path`, whole and on the CPU, by the rest of their name. Needs no process
    group."""
    held = IndexReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
               for name, entry in held.items()
               if name.startswith(path) and isinstance(entry, metadata.TensorStorageMetadata)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant to be
        load_tensors(tensors, folder, no_dist=True)
    check_finite(tensors, folder)
    return {name.removeprefix(path): tensor for name, tensor in tensors.items()}

