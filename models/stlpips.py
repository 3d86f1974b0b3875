"""ST-LPIPS (shift-tolerant LPIPS, arXiv 2207.13686), and the choice between it and LPIPS.

Its backbone and heads are trained together, and PyPI's stlpips-pytorch 0.0.2 (BSD-2) contains them, so its weights are
available wherever packages are. It is another metric than LPIPS: their numbers must not be compared.
"""
import hashlib
import io
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import lpips
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.fetch import Archive, cached_weights, check_sha256
from models.lpips import Distance, FrameDistance, Perceptual
from models.pretrained import load_state, read_released

WHEEL = Archive("ST-LPIPS", "stlpips-pytorch", "stlpips_pytorch-0.0.2-py3-none-any.whl", "--lpips_weights",
                "BSD-2-Clause, as its authors release it (arXiv 2207.13686)")
WHEEL_SHA256 = "a412bf901a97c942b37af57c7c63b6e5d1aebfe8d1dfc17853d4b2f878630645"
MEMBER = "stlpips_pytorch/weights/vST0.0/{}_shift_tolerant.pth"


class STLPIPS(FrameDistance):
    """ST-LPIPS between two clips, frame by frame.

    net: "alex" or "vgg". weights: "auto" is the cache, or a download into it. A path is that of the wheel on PyPI, of
    a .pth file from it, or of our safetensors file. "random" is a fixed random network, good for trying a pipeline
    and not for numbers. Raises WeightsError where a download fails, FileNotFoundError or ValueError for a bad path.
    """

    name = "stlpips"

    def __init__(self, net: str = "alex", weights: str = "auto"):
        super().__init__()
        if net not in SLICES:
            raise ValueError(f"the network of ST-LPIPS is one of {', '.join(SLICES)}, got {net!r}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs too
            network = Network(SLICES[net]())
        if weights == "random":
            source = "RANDOM network"
        else:
            state, path, source = read_network(net, weights)
            load_state(network, state, path)
        self.distance = Distance(network)
        self.description = f"stlpips 0.0.2 {net}, {source}"
        self.freeze()


class Network(nn.Module):
    """Backbone, scaling and heads under the names of the published files."""

    def __init__(self, slices: list[list[nn.Module]]):
        super().__init__()
        self.scaling_layer, self.net = lpips.ScalingLayer(), Backbone(slices)
        for number, layers in enumerate(slices):
            width = [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)][-1]
            head = lpips.NetLinLayer(width, use_dropout=True)  # the published names number the dropout
            head.model[1].weight.data.abs_()  # not negative, like the published ones: a distance stays positive
            self.add_module(f"lin{number}", head)

    @property
    def lins(self) -> nn.ModuleList:
        return nn.ModuleList(getattr(self, f"lin{number}") for number in range(len(self.net)))


class Backbone(nn.Sequential):
    """Slices of layers. The layers are named by their places in the whole sequence."""

    def __init__(self, slices: list[list[nn.Module]]):
        names = iter(range(sum(map(len, slices))))
        super().__init__(OrderedDict(
            (f"slice{number}", nn.Sequential(OrderedDict((str(next(names)), layer) for layer in layers)))
            for number, layers in enumerate(slices, start=1)
        ))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> the output (N, C, h, w) of each slice."""
        outputs = []
        for layers in self:
            x = layers(x)
            outputs.append(x)
        return outputs


class BlurPool(nn.Module):
    filt: Tensor

    """Every second pixel after a blur (arXiv 1904.11486). As published it pads by 2, one more than needed."""

    def __init__(self, dim: int):
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filt", torch.outer(line, line).expand(dim, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), H and W from 3 on -> (N, C, H // 2 + 1, W // 2 + 1)."""
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


def alexnet() -> list[list[nn.Module]]:
    """AlexNet without strides, in five slices."""
    return [
        [nn.Conv2d(3, 64, 11, padding=2), BlurPool(64), nn.ReLU()],
        [nn.MaxPool2d(3, 1), BlurPool(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()],
        [nn.MaxPool2d(3, 1), BlurPool(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()],
    ]


def vgg16() -> list[list[nn.Module]]:
    """VGG16 up to ReLU 5_3, in five slices."""
    slices: list[list[nn.Module]] = []
    dim = 3
    for widths in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
        layers: list[nn.Module] = [nn.MaxPool2d(2, 1), BlurPool(dim)] if slices else []
        for width in widths:
            layers += [nn.Conv2d(dim, width, 3, padding=1), nn.ReLU()]
            dim = width
        slices.append(layers)
    return slices


SLICES: dict[str, Callable[[], list[list[nn.Module]]]] = {"alex": alexnet, "vgg": vgg16}


def read_network(net: str, weights: str) -> tuple[dict[str, Tensor], Path, str]:
    """(state dict of a Network, where it came from, its name in records) for weights "auto" or a path."""
    if weights == "auto":
        path = cached_weights(WHEEL, "stlpips-0.0.2", WHEEL_SHA256, from_wheel)
        source = f"{WHEEL.file} (sha256 {WHEEL_SHA256[:8]})"
    else:
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; {WHEEL.flag} expects {WHEEL.file} or a .pth file of it")
        source = f"{path.name} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:8]})"
    if path.suffix not in (".whl", ".safetensors"):
        return read_released(path), path, source
    try:
        state = from_wheel(path.read_bytes()) if path.suffix == ".whl" else load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); get it anew, or delete it from the cache") from None
    return {name.removeprefix(f"{net}."): state[name] for name in state if name.startswith(f"{net}.")}, path, source


def from_wheel(wheel: bytes) -> dict[str, Tensor]:
    """The tensors of both networks, their names preceded by "alex." and "vgg.". Raises WeightsError."""
    check_sha256(wheel, WHEEL_SHA256, WHEEL.file)
    state: dict[str, Tensor] = {}
    with zipfile.ZipFile(io.BytesIO(wheel)) as file:
        for net in SLICES:
            tensors = torch.load(io.BytesIO(file.read(MEMBER.format(net))), "cpu", weights_only=True)
            state |= {f"{net}.{name}": tensor for name, tensor in tensors.items()}
    return state


def perceptual_metric(
    name: str = "lpips", net: str | None = None, weights: str = "auto", dropout: bool = False
) -> FrameDistance:
    """The learned distance called `name`: "lpips" (`Perceptual`) or "stlpips" (`STLPIPS`).

    net: "vgg" or "alex"; None is vgg for LPIPS and alex for ST-LPIPS. weights: "auto", a path, or "random". dropout: of
    LPIPS, see `Perceptual`.
    """
    if name not in METRICS:
        raise ValueError(f"the perceptual metric is one of {', '.join(METRICS)}, got {name!r}: change --perceptual")
    if dropout and name != "lpips":
        raise ValueError(f"--lpips_dropout is LPIPS's, but --perceptual is {name}: leave it out")
    options = {"dropout": True} if dropout else {}
    return METRICS[name](*([net] if net else []), weights=weights, **options)


METRICS = {"lpips": Perceptual, "stlpips": STLPIPS}
