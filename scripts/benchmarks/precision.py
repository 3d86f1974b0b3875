"""How far bfloat16 takes each model from float32: outputs and gradients, relative to float32's.

    python -m scripts.benchmarks.precision [--size small|published] [--models sit larp_ar]

The same random weights (zeros too, or outputs would be zero) and inputs, forward and backward, in float32 and under the
autocast that the scripts train with; for LARP's generator and tokenizer also with the weights cast, as sample.py does.
A deviation is the norm of the difference over the norm in float32. bfloat16 rounds by 2^-9 = 0.002, and a network does
so at every layer: some 0.01 is its order, and 1 would be no likeness at all.
"""
import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.rng import sample_generators
from models.configs import SIT_SIZES
from models.coordtok import CoordTok
from models.discriminator import Discriminator
from models.interpolant import draw_noise
from models.larp_ar import SIZES, LARPGenerator
from models.larp_tokenizer import LARPTokenizer
from models.sit import SiT
from scripts.benchmarks.common import (
    SMALL_AR,
    SMALL_COORDTOK,
    SMALL_DISC,
    SMALL_LARP,
    add_record,
    device_name,
    record,
)
from training.optim import Precision

Run = Callable[[nn.Module], Tensor]  # model -> outputs


def coordtok(small: bool, device: torch.device) -> tuple[nn.Module, Run]:
    with device:
        model = CoordTok(**(SMALL_COORDTOK if small else {}))
    config = model.config
    video = torch.rand(2, 3, *config.video_shape, device=device)
    index = torch.stack([torch.randint(size, (2, 256), device=device) for size in config.grid], -1)
    return model, lambda model: model(video, index)


def sit(small: bool, device: torch.device) -> tuple[nn.Module, Run]:
    size = {"input_size": (16, 16), **SIT_SIZES["SiT-XS/2"]} if small else SIT_SIZES["SiT-L/2"]
    with device:
        model = SiT(**size)
    planes = draw_noise(sample_generators(0, range(2), device), model.plane_shapes)
    t, y = torch.full((2,), 0.5, device=device), torch.zeros(2, dtype=torch.long, device=device)
    return model, lambda model: torch.cat([plane.flatten() for plane in model(planes, t, y)])


def larp_tokenizer(small: bool, device: torch.device) -> tuple[nn.Module, Run]:
    """Decoding: codes, of which encoding takes the nearest, either agree or do not."""
    model = LARPTokenizer(**(SMALL_LARP if small else {})).to(device)
    size = model.config.bottleneck.args.regularizer.args.codebook_size
    codes = torch.randint(size, (2, model.config.bottleneck_token_num), device=device)
    return model, lambda model: model.decode(codes)


def discriminator(small: bool, device: torch.device) -> tuple[nn.Module, Run]:
    model = Discriminator(**(SMALL_DISC if small else {})).to(device)
    config = model.config
    video = torch.rand(2, 3, config.frame_num, config.input_size, config.input_size, device=device)
    return model, lambda model: model(video)


def larp_ar(small: bool, device: torch.device) -> tuple[nn.Module, Run]:
    size = {**SMALL_AR, "max_seq_len": 128, "vocab_size": 1024} if small else SIZES["llama-abs-LP"]
    model = LARPGenerator(**size).to(device)
    codes = torch.randint(model.config.vocab_size, (2, model.config.max_seq_len), device=device)
    cond = torch.zeros(2, dtype=torch.long, device=device)
    return model, lambda model: model(codes, cond)


MODELS = {make.__name__: make for make in (coordtok, sit, larp_tokenizer, discriminator, larp_ar)}
CAST = (LARPTokenizer, LARPGenerator)  # whose weights sample.py casts


def results(model: nn.Module, run: Run, precision: Precision) -> tuple[Tensor, Tensor]:
    """(outputs, gradients), one vector each. The gradient is that of a fixed random projection of the outputs."""
    with precision.autocast():
        outputs = run(model).float().flatten()
    torch.manual_seed(1)
    (outputs * torch.randn_like(outputs)).sum().backward()
    gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return outputs.detach(), torch.cat(gradients)


def deviations(name: str, small: bool, device: torch.device) -> dict[str, tuple[float, float]]:
    """{variant: (deviation of the outputs, of the gradients)}."""
    torch.manual_seed(0)
    model, run = MODELS[name](small, device)
    model.eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    expected = results(model, run, Precision("fp32", device))
    found = {"bf16": results(model, run, Precision("bf16", device))}
    if isinstance(model, CAST):
        found["bf16 weights"] = results(copy.deepcopy(model).bfloat16(), run, Precision("fp32", device))
    return {
        variant: tuple(((a - b).norm() / b.norm()).item() for a, b in zip(vectors, expected))
        for variant, vectors in found.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=["small", "published"], help="default: published on a GPU, small on a CPU")
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    add_record(parser)
    args = parser.parse_args()
    device = torch.device(args.device)
    small = (args.size or ("published" if device.type == "cuda" else "small")) == "small"
    print(f"{device_name(device)}; torch {torch.__version__}; {'small' if small else 'published'} sizes")
    print(f"{'model':<16}{'variant':<14}{'outputs':>9}{'gradients':>11}")
    for name in args.models:
        for variant, (outputs, gradients) in deviations(name, small, device).items():
            print(f"{name:<16}{variant:<14}{outputs:>9.4f}{gradients:>11.4f}", flush=True)
            record(args.record, f"precision {name}", f"{variant}, outputs", deviation=outputs)
            record(args.record, f"precision {name}", f"{variant}, gradients", deviation=gradients)


if __name__ == "__main__":
    main()
