"""LARP tokenizer: clips/s, memory and TFLOP/s of encode, decode and a whole training step, beside plain fp32 eager.

    python -m scripts.benchmarks.larp_tokenizer [--batch 8] [--rounds 5]

The small size on a CPU, the published size on a GPU. The variants (fp32 and bf16, eager and compiled) run in turn in
the same process. A training step is the tokenizer's (L1, quantiser, prior, generator loss) and the discriminator's,
without LPIPS. FLOPs are torch's count of one plain call; the share of the peak is left to the reader, as it depends on
the clock.
"""
import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.discriminator import Discriminator
from models.gan import discriminator_loss, frozen, generator_loss
from models.larp_tokenizer import LARPTokenizer
from training.log import memory_gib
from training.optim import Precision, adam, update

SMALL = {
    "bottleneck": {"args": {"regularizer": {"args": {"codebook_size": 1024}}}},
    "prior_model": {"name": "gptc-tiny"},
    "bottleneck_token_num": 128,
    "input_size": 64,
    "encoder_hidden_size": 256,
    "decoder_hidden_size": 256,
    "encoder_num_heads": 4,
    "decoder_num_heads": 4,
    "encoder_depth": 4,
    "decoder_depth": 4,
}
SMALL_DISC = {"hidden_size": 256, "n_heads": 4, "n_layers": 4, "input_size": 64}


def make_calls(
    tokenizer: LARPTokenizer, discriminator: Discriminator, precision: Precision, compiled: bool, video: torch.Tensor
) -> dict[str, Callable[[], None]]:
    optimizer = adam(tokenizer.parameters(), 1e-4, betas=(0.5, 0.9))
    disc_optimizer = adam(discriminator.parameters(), 3e-5, betas=(0.5, 0.9))
    if compiled:  # as train_larp_tokenizer.py does it
        for part in (tokenizer.encoder, tokenizer.decoder, tokenizer.prior_model, discriminator):
            part.compile()
    codes = tokenizer.encode(video)

    @torch.no_grad()
    def encode() -> None:
        with precision.autocast():
            tokenizer.encode(video)

    @torch.no_grad()
    def decode() -> None:
        with precision.autocast():
            tokenizer.decode(codes)

    def train() -> None:
        with precision.autocast():
            output = tokenizer(video, 0.25)
            fake = output.video.float()
            real_logits, fake_logits = discriminator(torch.cat([video, fake.detach()])).chunk(2)
        discriminator_loss(real_logits, fake_logits, "ns_smooth")[0].backward()
        update(disc_optimizer, precision.scaler)
        with frozen(discriminator):
            with precision.autocast():
                loss = generator_loss(discriminator(fake), "ns_smooth")
            loss = (fake - video).abs().mean() + 0.3 * loss + 0.1 * output.loss_q + 0.06 * output.loss_prior
            loss.backward()
        update(optimizer, precision.scaler)

    return {"encode": encode, "decode": decode, "train": train}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=["small", "published"], help="default: published on a GPU, small on a CPU")
    parser.add_argument("--batch", type=int, help="clips at once (default: 16 on a GPU, 4 on a CPU)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each variant, taken in turn")
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    small = (args.size or ("published" if on_gpu else "small")) == "small"
    batch = args.batch or (16 if on_gpu else 4)
    torch.manual_seed(0)
    tokenizer = LARPTokenizer(**(SMALL if small else {})).to(device)
    discriminator = Discriminator(**(SMALL_DISC if small else {})).to(device)
    config = tokenizer.config
    video = torch.rand(batch, 3, config.frame_num, config.input_size, config.input_size, device=device)
    print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU, ' + str(torch.get_num_threads()) + ' threads'}; torch "
          f"{torch.__version__}; tokenizer {sum(p.numel() for p in tokenizer.parameters()):,} parameters, "
          f"{config.frame_num} frames of {config.input_size}x{config.input_size}, batch {batch}")

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    flops, variants = {}, {}
    for name in ("fp32", "bf16"):
        for compiled in (False, True):
            models = copy.deepcopy(tokenizer), copy.deepcopy(discriminator)
            for call, function in make_calls(*models, Precision(name, device), compiled, video).items():
                if call not in flops:
                    with FlopCounterMode(display=False) as counter:
                        function()
                    flops[call] = counter.get_total_flops()
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                for _ in range(2):  # compilation and warm-up
                    function()
                wait()
                variants[call, f"{name}{' compiled' * compiled}"] = (function, memory_gib(device), [])
    for _ in range(args.rounds):
        for function, _, seconds in variants.values():
            wait()
            start = time.perf_counter()
            function()
            wait()
            seconds.append(time.perf_counter() - start)
    print("peak GiB (on a CPU: of the process so far)")
    print(f"{'':<8}{'variant':<16}{'clips/s':>10}{'x fp32':>8}{'TFLOP/s':>9}{'GiB':>7}")
    for (call, name), (_, memory, seconds) in variants.items():
        median = sorted(seconds)[args.rounds // 2]
        plain = sorted(variants[call, "fp32"][2])[args.rounds // 2]
        print(f"{call:<8}{name:<16}{batch / median:>10.2f}{plain / median:>8.2f}{flops[call] / median / 1e12:>9.3f}"
              f"{memory:>7.2f}")


if __name__ == "__main__":
    main()
