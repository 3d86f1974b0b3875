"""LARP tokenizer: clips/s and TFLOP/s of encoding and decoding, beside plain fp32 eager (training: train_step.py).

    python -m scripts.benchmarks.larp_tokenizer [--batch 8] [--rounds 5] [--compile]

The small size on a CPU, the published size on a GPU; the variants run in turn in the same process.
"""
import argparse

import torch

from models.larp_tokenizer import LARPTokenizer
from scripts.benchmarks import flops
from scripts.benchmarks.common import SMALL_LARP, add_record, alternate, device_name, mfu, record
from training.optim import Precision


def make_calls(tokenizer: LARPTokenizer, precision: Precision, video: torch.Tensor) -> dict:
    codes = tokenizer.encode(video)

    @torch.no_grad()
    def encode() -> None:
        with precision.autocast():
            tokenizer.encode(video)

    @torch.no_grad()
    def decode() -> None:
        with precision.autocast():
            tokenizer.decode(codes)

    return {"encode": encode, "decode": decode}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=["small", "published"], help="default: published on a GPU, small on a CPU")
    parser.add_argument("--batch", type=int, help="clips at once (default: 16 on a GPU, 4 on a CPU)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each variant, taken in turn")
    parser.add_argument("--compile", action="store_true", help="compiled variants too: minutes on a CPU")
    add_record(parser)
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    small = (args.size or ("published" if on_gpu else "small")) == "small"
    batch = args.batch or (16 if on_gpu else 4)
    torch.manual_seed(0)
    tokenizer = LARPTokenizer(**(SMALL_LARP if small else {})).to(device).eval()
    config = tokenizer.config
    video = torch.rand(batch, 3, config.frame_num, config.input_size, config.input_size, device=device)
    print(f"{device_name(device)}; torch {torch.__version__}; tokenizer "
          f"{sum(p.numel() for p in tokenizer.parameters()):,} parameters, {config.frame_num} frames of "
          f"{config.input_size}x{config.input_size}, batch {batch}")
    work = {"encode": flops.larp_encode(config), "decode": flops.larp_decode(config)}
    variants = {}
    for compiled in (False, True) if args.compile else (False,):
        if compiled:  # from here on; what was built before it is called through the same modules
            fast = LARPTokenizer(**(SMALL_LARP if small else {})).to(device).eval()
            for part in (fast.encoder, fast.decoder):
                part.compile()
        for name in ("fp32", "bf16"):
            calls = make_calls(fast if compiled else tokenizer, Precision(name, device), video)
            variants |= {(call, f"{name}{' compiled' * compiled}"): run for call, run in calls.items()}
    seconds = alternate(variants, args.rounds, device)
    print(f"{'':<8}{'variant':<16}{'clips/s':>10}{'x fp32':>8}{'TFLOP/s':>9}{'MFU':>7}")
    for (call, name), time_taken in seconds.items():
        ratio, total = seconds[call, "fp32"] / time_taken, batch * work[call]
        share = mfu(total, time_taken, device, name.split()[0])
        print(f"{call:<8}{name:<16}{batch / time_taken:>10.2f}{ratio:>8.2f}{total / time_taken / 1e12:>9.3f}"
              f"{share:>7.1%}")
        record(args.record, f"larp_tokenizer {call}", name, ratio, share)


if __name__ == "__main__":
    main()
