"""LARP's generator sharded by PyTorch's FSDP2 (the third stage of ZeRO, arXiv 1910.02054): every process holds an equal
share of each weight, with its gradient, moving average and optimizer states, and gathers a layer while it computes.

A sharded tensor is a DTensor. All processes must call these functions. What reads a folder of them without a process
group is models/sharded.py.
"""
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common import distributed
from models.larp_ar import LARPGenerator
from models.sharded import IndexReader, load_tensors
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
    load_tensors(shards, folder)
    _place(state, like)


def _place(state: dict, like: dict) -> None:
    for key, value in like.items():
        if isinstance(value, DTensor):
            state[key] = value
        elif isinstance(value, dict):
            _place(state.setdefault(key, {}), value)
