"""One CoordTok training step (step 1: encode, decode 1,024 points, backward, AdamW): samples/s, memory, TFLOP/s.

    python -m scripts.benchmarks.train_step [--batch 8] [--rounds 5]

The small size on a CPU, the published size on a GPU. Variants alternate in the same run: fp32 and bf16, eager and
compiled. FLOPs are those of one eager step, as torch counts them.
"""
import argparse
import copy
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.coordtok import CoordTok
from models.losses import patch_loss
from models.planes import gather_patches
from training.log import memory_gib
from training.optim import Precision, adamw

SMALL = {
    "video_shape": (16, 64, 64),
    "enc_embed_dim": 256,
    "enc_num_layers": 2,
    "enc_num_heads": 4,
    "enc_patch_size_xy": 8,
    "enc_patch_size_t": 4,
    "enc_patch_num_layers": 2,
    "latent_resolution_t": 16,
    "latent_patch_size_xy": 4,
    "latent_patch_size_t": 4,
    "dec_embed_dim": 256,
    "dec_num_layers": 2,
    "dec_num_heads": 4,
}


def make_step(model: CoordTok, precision: Precision, compiled: bool, batch: int, points: int, device: torch.device):
    config = model.config
    video = torch.rand(batch, 3, *config.video_shape, device=device)
    index = torch.stack([torch.randint(n, (batch, points), device=device) for n in config.grid], dim=-1)
    target = gather_patches(video, index, config.dec_patch_size_t, config.dec_patch_size_xy) * 2 - 1
    optimizer = adamw(model.parameters(), lr=1e-4, weight_decay=1e-3)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with precision.autocast():
            patches = forward(video, index)
        patch_loss(patches, target).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=["small", "published"], help="default: published on a GPU, small on a CPU")
    parser.add_argument("--batch", type=int, help="videos a step (default: 16 on a GPU, 8 on a CPU)")
    parser.add_argument("--eager", action="store_true", help="no compiled variants: compiling takes minutes on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each variant, taken in turn")
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    config = {} if (args.size or ("published" if on_gpu else "small")) == "published" else SMALL
    batch, points = args.batch or (16 if on_gpu else 8), 1024
    torch.manual_seed(0)
    with device:
        model = CoordTok(**config)
    print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU, ' + str(torch.get_num_threads()) + ' threads'}; torch "
          f"{torch.__version__}; CoordTok {sum(p.numel() for p in model.parameters()):,} parameters, batch {batch}, "
          f"{points} points")

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    variants, flops = {}, 0
    for name in ("fp32", "bf16"):
        for compiled in (False,) if args.eager else (False, True):
            step = make_step(copy.deepcopy(model), Precision(name, device), compiled, batch, points, device)
            if not flops:
                with FlopCounterMode(display=False) as counter:
                    step()
                flops = counter.get_total_flops()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            for _ in range(3):  # compilation and warm-up
                step()
            wait()
            variants[f"{name}{' compiled' * compiled}"] = (step, memory_gib(device), [])
    for _ in range(args.rounds):
        for step, _, seconds in variants.values():
            wait()
            start = time.perf_counter()
            step()
            wait()
            seconds.append(time.perf_counter() - start)
    plain = sorted(variants["fp32"][2])[args.rounds // 2]
    print(f"{flops / batch / 1e9:.1f} GFLOP a sample; peak GiB (on a CPU: of the process so far)")
    print(f"{'variant':<16}{'samples/s':>10}{'x fp32':>8}{'TFLOP/s':>9}{'GiB':>7}")
    for name, (_, memory, seconds) in variants.items():
        median = sorted(seconds)[args.rounds // 2]
        print(f"{name:<16}{batch / median:>10.2f}{plain / median:>8.2f}{flops / median / 1e12:>9.3f}{memory:>7.2f}")


if __name__ == "__main__":
    main()
