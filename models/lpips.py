"""LPIPS between clips, and what it shares with ST-LPIPS (models/stlpips.py)."""
import hashlib
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lpips
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights, VGG16_Weights

from models.layers import Fused
from models.pretrained import WeightsError, load_state, read_released


class FrameDistance(nn.Module):
    """Base class of learned distances between two clips, frame by frame. Always frozen and in eval mode.

    `name`: the metric, for logs and columns. `description`: the network and its weights, for records.
    """

    name: str
    description: str
    distance: nn.Module  # two (N, 3, H, W) in [0, 1] -> (N,)

    def freeze(self) -> None:
        """Called at the end of a subclass's __init__."""
        # channels_last: a fifth less time on a CPU, and the layout of a GPU's fast half-precision convolutions.
        self.to(memory_format=torch.channels_last).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FrameDistance":
        """Stays in eval mode."""
        return super().train(False)

    def per_frame(self, pred: Tensor, target: Tensor, chunk: int = 128) -> Tensor:
        """pred, target: (B, 3, T, H, W) float in [0, 1], H and W from 32 on. chunk: frames computed at a time, to
        bound the memory. Returns (B, T) float32 distances."""
        frames = (rearrange(video, "b c t h w -> (b t) c h w").split(chunk) for video in (pred, target))
        return torch.cat([self.distance(*pair) for pair in zip(*frames)]).view(len(pred), -1)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """pred, target: (B, 3, T, H, W) float in [0, 1]. Returns (B,) float32, the mean over frames."""
        return self.per_frame(pred, target).mean(dim=1)


class Perceptual(FrameDistance):
    """LPIPS (arXiv 1801.03924, version 0.1) between two clips, frame by frame.

    net: "vgg" or "alex", whose distances differ fourfold. weights: of the ImageNet backbone below the linear layers of
    the `lpips` package. "auto" is torchvision's download, kept in torch.hub's cache; a path is a copy of that file;
    "random" is a fixed random backbone, good for trying a pipeline and not for numbers.
    dropout: keep the dropout of 0.5 before the linear layers of `lpips` on, as in CoordTok's released training. All
    else stays in eval mode.
    """

    name = "lpips"

    def __init__(self, net: str = "vgg", weights: str = "auto", dropout: bool = False):
        super().__init__()
        self.dropout = dropout
        if net not in BACKBONES:
            raise ValueError(f"net is one of {', '.join(BACKBONES)}, got {net!r}: change --lpips_net")
        with torch.device("meta"), warnings.catch_warnings():  # lpips would build and drop a classifier of 550 MB
            warnings.simplefilter("ignore")  # lpips passes deprecated arguments to torchvision
            self.lpips = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
        self.lpips.to_empty(device="cpu")
        self.lpips.scaling_layer = lpips.ScalingLayer()
        linear = read_released(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth")
        for number, lin in enumerate(self.lpips.lins):
            lin.load_state_dict({"model.1.weight": linear[f"lin{number}.model.1.weight"]})
        if weights == "random":
            source, generator = "RANDOM backbone", torch.Generator().manual_seed(0)
            for conv in (module for module in self.lpips.net.modules() if isinstance(module, nn.Conv2d)):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=generator)
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)
        else:
            state, path, source = backbone_state(net, weights)
            # lpips cuts torchvision's `features` into slices that keep the layers' numbers: slice2.5 is features.5.
            names = {name: "features." + name.split(".", 1)[1] for name in self.lpips.net.state_dict()}
            state = {name: state[original] for name, original in names.items() if original in state}
            load_state(self.lpips.net, state, path)
        self.distance = Distance(self.lpips)
        self.description = f"lpips {version('lpips')} {net}, {source}"
        self.freeze()

    def train(self, mode: bool = True) -> "Perceptual":
        """Stays in eval mode, except for the dropout if it is on."""
        super().train(False)
        for lin in self.lpips.lins:
            lin.train(self.dropout)
        return self


class Distance(Fused):
    """LPIPS of frames.

    network: with the attributes of the `lpips` package's: `scaling_layer`, then `net`, frames (N, 3, H, W) -> features
    of five layers, and `lins`, a head for each layer.
    """

    def __init__(self, network: Any):
        super().__init__()
        self.net, self.scaling_layer, self.lins = network.net, network.scaling_layer, network.lins

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] twice -> (N,). The backbone follows the caller's autocast; the distances are float32,
        since squared differences of unit features vanish in float16."""
        layers = list(zip(*(self.net(self.scaling_layer(2 * x - 1)) for x in (pred, target))))
        with torch.autocast(pred.device.type, enabled=False):
            # F.normalize and not lpips.normalize_tensor, whose gradient is NaN where all features of a pixel are 0.
            units = [[F.normalize(x.float(), dim=1, eps=1e-10) for x in pair] for pair in layers]
            distances = [lin((a - b).square()).mean(dim=(1, 2, 3)) for lin, (a, b) in zip(self.lins, units)]
            return sum(distances, torch.zeros_like(distances[0]))


BACKBONES = {"vgg": VGG16_Weights.IMAGENET1K_V1, "alex": AlexNet_Weights.IMAGENET1K_V1}


def backbone_state(net: str, weights: str) -> tuple[dict[str, Tensor], str, str]:
    """(state dict of torchvision's model, where it came from, its name in records) for weights "auto" or a path.

    Raises WeightsError where the download fails; see `read_released` for what a file may do.
    """
    url = BACKBONES[net].url
    if weights != "auto":
        digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest() if Path(weights).is_file() else ""
        return read_released(weights), weights, f"{Path(weights).name} (sha256 {digest[:8]})"
    try:
        return BACKBONES[net].get_state_dict(progress=False, check_hash=True), url, f"torchvision {BACKBONES[net].name}"
    except (OSError, RuntimeError) as error:  # no network; a download cut short
        raise WeightsError(
            f"LPIPS needs torchvision's weights, and {url} could not be downloaded ({error}): copy "
            f"{url.rsplit('/')[-1]} here and give --lpips_weights PATH, or try the pipeline with --lpips_weights random"
        ) from error
