"""Clips a second of the I3D feature extractor, against a plain use of the same network in the same run.

    python -m scripts.benchmarks.i3d [--num_clips 4] [--batch_size 4] [--num_frames 16] [--size 128] [--repeats 3]

Plain: the network as it is written in the ports, one clip at a time with autograd recording. Ours: batch norms folded
into the convolutions, poolings axis by axis on a CPU, inference mode, batched. They take turns, so that they share the
noise. The limit is what a large float32 matrix product reaches on the same device, without TF32, as the extractor.
"""
import argparse
import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from eval.i3d import I3D, Pool, Unit, same_pad
from scripts.benchmarks.common import add_record, alternate, device_name, record


def plain_forward(layer: Unit | Pool, x: torch.Tensor) -> torch.Tensor:
    """A layer of I3D, operation by operation."""
    if isinstance(layer, Pool):
        return F.max_pool3d(same_pad(x, layer.kernel, layer.stride), layer.kernel, layer.stride)
    return F.relu(layer.bn(layer.conv3d(same_pad(x, layer.conv3d.kernel_size, layer.conv3d.stride))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_clips", type=int, help="default: 64 on a GPU, 4 on a CPU")
    parser.add_argument("--batch_size", type=int, help="default: 32 on a GPU, 4 on a CPU")
    parser.add_argument("--num_frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    add_record(parser)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    num_clips, batch_size = args.num_clips or (64 if on_gpu else 4), args.batch_size or (32 if on_gpu else 4)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = I3D().to(device)  # time does not depend on the weights
    network = copy.deepcopy(model)
    for module in network.modules():
        if isinstance(module, Unit | Pool):
            module.forward = partial(plain_forward, module)
    model.fold().requires_grad_(False)
    clips = torch.rand(num_clips, 3, args.num_frames, args.size, args.size, device=device)

    def plain() -> torch.Tensor:
        return torch.cat([network(clip[None]) for clip in clips]).detach()

    @torch.inference_mode()
    def ours() -> torch.Tensor:
        return torch.cat([model(batch) for batch in clips.split(batch_size)])

    difference = (plain() - ours()).abs().max().item()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(clips[:1])
    work = counter.get_total_flops() * num_clips

    size = 8192 if on_gpu else 2048
    matrix = torch.rand(size, size, device=device)
    times = alternate({"plain": plain, "ours": ours, "product": lambda: matrix @ matrix}, args.repeats, device)
    limit = 2 * size**3 / times["product"]

    print(f"I3D on {device_name(device)}: {num_clips} clips of {args.num_frames} frames of {args.size}x{args.size}")
    for label, batch in (("plain", 1), ("ours", batch_size)):
        speed = work / times[label]
        print(
            f"{label:6} batch {batch:3d} {num_clips / times[label]:8.2f} clips/s {speed / 1e12:8.3f} TFLOP/s, "
            f"{speed / limit:.1%} of a float32 matrix product's"
        )
    record(args.record, "i3d", "ours", times["plain"] / times["ours"])
    print(f"largest difference between their logits: {difference:.1e}")


if __name__ == "__main__":
    main()
