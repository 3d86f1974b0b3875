"""LARP's generator sharded by PyTorch's FSDP2 (the third stage of ZeRO, arXiv 1910.02054): every process holds an equal
share of each weight, with its gradient, moving average and optimizer states, and gathers a layer while it computes.

A sharded tensor is a DTensor. All processes must call these functions, except `check` and `read_whole`.
"""
import io
import pathlib
import pickle
import warnings
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common import distributed
from models.larp_ar import LARPGenerator
from models.pretrained import check_finite
from training.optim import DTYPES


# --- models ---
def shard(model: LARPGenerator, device: torch.device, precision: str) -> None:
    """Shard a model in place; it must be equal on all processes. It moves to the device layer by layer, so no GPU ever
    holds all of it. Layers' weights are gathered in `precision` (fp32 or bf16); gradients are reduced in float32.

    Autocast still chooses what is computed in bf16, so activations between layers stay float32, as without sharding.
    Embeddings and the output layer, a small part of the weights, are gathered in float32.
    """
    if precision == "fp16":
        raise ValueError("--precision fp16 needs its loss scaled, which --fsdp does not do: give bf16 or fp32")
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    policy = MixedPrecisionPolicy(DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def compile_blocks(model: LARPGenerator) -> None:
    """Compile the modules inside the layers: the layers themselves gather weights, which cannot be traced."""
    for layer in model.layers:
        for module in (layer.attention, layer.feed_forward):
            module.compile(dynamic=False)


def unsharded(model: LARPGenerator) -> LARPGenerator:
    """The model itself or, if it is sharded, a plain copy of it on each process. Validation and sampling need it: the
    number of passes depends on a process's number of clips, and a gather would wait for processes that have fewer."""
    if not isinstance(model, FSDPModule):
        return model
    weights = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
               for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        copy = LARPGenerator(**asdict(model.config))
    copy.load_state_dict(weights, assign=True)
    return copy.requires_grad_(False)


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Create the states of an optimizer that has not stepped yet, so that `fill` can read into them."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the step below must change nothing; training sets the rate before each step
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# --- checkpoints: plain values in one file, sharded tensors in a file of each process ---
def split(state: dict, path: str = "") -> tuple[dict, dict[str, DTensor]]:
    """A nested state without its sharded tensors, and those tensors by path: "model/layers.0.attention.wo.weight"."""
    plain, shards = {}, {}
    for key, value in state.items():
        if isinstance(value, DTensor):
            shards[f"{path}{key}"] = value
            continue
        plain[key], inner = split(value, f"{path}{key}/") if isinstance(value, dict) else (value, {})
        shards |= inner
    return (plain, shards) if shards else (state, {})


def write(folder: Path, shards: dict[str, DTensor]) -> None:
    """Write each process's share to files of its own, and an index. All nodes write to the same folder."""
    dcp.save(shards, checkpoint_id=folder)


def verify(file: BinaryIO | Path) -> None:
    """Raise ValueError if a file of torch.save is damaged. It is a zip file, which holds checksums."""
    with zipfile.ZipFile(file) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it is not what was written")


class _IndexUnpickler(pickle.Unpickler):
    """Accepts only the classes that `write` puts into an index, so that reading a foreign index runs no code."""

    ALLOWED = {
        **{(kind.__module__, kind.__qualname__): kind for kind in (
            metadata.Metadata, metadata.TensorStorageMetadata, metadata.ChunkStorageMetadata, metadata.TensorProperties,
            metadata.MetadataIndex, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo,
            torch.serialization._get_layout,
        )},
        ("torch", "Size"): torch.Size,
        # The path that the index was written to, which is not used. Python 3.13 has the class in another module.
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
        """One tensor's part of a file. Raises ValueError if its checksum is wrong."""
        file.seek(entry.offset)
        part = io.BytesIO(file.read(entry.length))
        try:
            verify(part)
        except (ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{entry.relative_path} is damaged: {error}") from error
        part.seek(0)
        return part


def _load(tensors: dict[str, Any], folder: Path, **options) -> None:
    """Read into `tensors` in place. Raises a one-line ValueError if the files are damaged."""
    try:
        dcp.load(tensors, storage_reader=IndexReader(folder), **options)
    except dcp.api.CheckpointException as error:
        reasons = [str(reason) for reason, _ in error.failures.values()]
        raise ValueError(f"{folder} cannot be read as a checkpoint: {reasons[0]}") from error


def check(folder: Path) -> None:
    """Raise ValueError if a file of shards is missing or cut short, and OSError if the index is missing."""
    sizes: dict[str, int] = {}
    for entry in IndexReader(folder).read_metadata().storage_data.values():
        sizes[entry.relative_path] = max(sizes.get(entry.relative_path, 0), entry.offset + entry.length)
    for name, size in sizes.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size < size:
            raise ValueError(f"{name} is missing, or shorter than its {size:,} bytes")


def fill(state: dict, like: dict) -> None:
    """Read the sharded tensors in the folder `state["shards"]` into those of `like`, and put these into `state`.

    like: a nested state with all sharded tensors that are wanted; its plain values are ignored. The number of processes
    may differ from the one that saved them.
    """
    folder, shards = state.pop("shards"), split(like)[1]
    held = IndexReader(folder).read_metadata().state_dict_metadata
    if missing := [name for name in shards if name not in held]:
        raise ValueError(f"{folder} has no {missing[0]}, one of {len(missing)} tensors that this run needs: give the "
                         "flags that it was saved with")
    _load(shards, folder)
    _place(state, like)


def _place(state: dict, like: dict) -> None:
    for key, value in like.items():
        if isinstance(value, DTensor):
            state[key] = value
        elif isinstance(value, dict):
            _place(state.setdefault(key, {}), value)


def read_whole(folder: Path, path: str) -> dict[str, Tensor]:
    """The tensors whose path starts with `path`, unsharded and on the CPU, by the rest of their path. Needs no process
    group."""
    held = IndexReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
               for name, entry in held.items()
               if name.startswith(path) and isinstance(entry, metadata.TensorStorageMetadata)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose
        _load(tensors, folder, no_dist=True)
    check_finite(tensors, folder)
    return {name.removeprefix(path): tensor for name, tensor in tensors.items()}

