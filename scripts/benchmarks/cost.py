"""What the published recipes cost: GPU hours and memory on 1, 8 and 64 GPUs, as the Markdown table of the README.

    python -m scripts.benchmarks.cost [--gpu H100] [--measured coordtok_1=38.5 sit=410]

Computed, not measured: time is the FLOPs of flops.py over an assumed share of the GPU's bf16 peak (--mfu), memory is
counted below. A step that has been timed (`samples/s` of scripts/benchmarks/train_step.py, published size, "all") goes
in by --measured, and its row is marked; from it the assumed MFU of several GPUs scales as from one.
"""
import argparse
import math
from typing import NamedTuple

import torch

from models.coordtok import CoordTok
from models.discriminator import Discriminator
from models.larp_ar import SIZES, LARPGenerator
from models.larp_tokenizer import LARPTokenizer
from models.prior import PRIOR_SIZES
from models.sit import SIT_SIZES, SiT
from scripts.benchmarks import flops

UCF101_TRAIN = 9_537
K600_TRAIN = 392_622  # of the data set as published (arXiv 1808.01340); some of it is gone from the web

# Bytes a parameter: float32 weight, gradient and Adam's two moments, and the bf16 weight that autocast keeps.
TRAINED, AVERAGED, FROZEN = 4 * 4 + 2, 4, 4 + 2

# Bytes that the backward pass keeps a token, block and unit of width, under bf16 autocast with fused attention, where
# norms are float32 and products bf16. VIT: norm 4, input of qkv 2, q k v 6, input of the projection 2, norm 4, input of
# the MLP 2, before and after its activation 16. SIT: also what gates and modulation multiply. LLAMA: SwiGLU, RMSNorm
# and dropout masks keep more. Checked by a test; of autograd's own count, as is LPIPS of a frame of 128x128.
VIT, SIT, LLAMA = 36, 45, 55
LPIPS_FRAME = 36 << 20
LOGIT = 10  # in bf16 and float32, and their log-softmax

MFU = {1: 0.40, 8: 0.38, 64: 0.32}  # assumed, by the number of GPUs
MEMORY_GIB = 70  # of a GPU of 80 GB, less a reserve


class Recipe(NamedTuple):
    title: str
    steps: int
    batch: int  # samples a step
    flops: int  # of a sample
    state_bytes: int  # of a process
    sample_bytes: int  # of the activations of a sample


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def recipes() -> dict[str, Recipe]:
    """By the names of train_step.py, but for frame prediction, whose sequences are longer."""
    with torch.device("meta"):
        coordtok, sit = CoordTok(), SiT(**SIT_SIZES["SiT-L/2"])
        tokenizer, disc = LARPTokenizer(), Discriminator()
        ar = LARPGenerator(**SIZES["llama-abs-LP"])
        fp = LARPGenerator(**SIZES["llama-abs-LP"], frame_prediction=True, cls_token_num=1025)
        c, s, t, d = coordtok.config, sit.config, tokenizer.config, disc.config

    # Cross-attention keeps 6 bytes a block: keys, values and their input.
    encoding = VIT * c.enc_patch_num_layers + 6 * c.enc_num_layers
    encoding *= math.prod(c.num_tubelets) * c.enc_embed_dim
    point = VIT * c.dec_embed_dim * c.dec_num_layers
    codes, latent_tokens = t.bottleneck_token_num, 64 + 128 + 128
    prior_depth, prior_width, _ = PRIOR_SIZES[t.prior_model.name]
    larp = 2 * codes * VIT * (t.encoder_hidden_size * t.encoder_depth + t.decoder_hidden_size * t.decoder_depth)
    larp += t.prior_model.n_rounds * codes * (VIT * prior_width * prior_depth + LOGIT * flops.codebook_size(t))
    larp += flops.disc_tokens(d) * VIT * d.hidden_size * d.n_layers + t.frame_num * LPIPS_FRAME

    def ar_bytes(model: LARPGenerator) -> int:
        g = model.config
        return g.num_positions * LLAMA * g.dim * g.n_layer + g.max_seq_len * LOGIT * g.vocab_size

    vgg = 14_714_688 * FROZEN
    return {
        "coordtok_1": Recipe("CoordTok, step 1", 1_000_000, 256, flops.coordtok_training(c, 1024),
                             parameters(coordtok) * TRAINED, encoding + 1024 * point),
        "coordtok_2": Recipe("CoordTok, step 2", 50_000, 256, flops.coordtok_training(c, 4096, lpips=True),
                             parameters(coordtok) * TRAINED + vgg, encoding + 4096 * point + 16 * LPIPS_FRAME),
        "sit": Recipe("SiT-L/2 on cached latents", 600_000, 64, flops.sit_training(s),
                      parameters(sit) * (TRAINED + AVERAGED), latent_tokens * SIT * s.hidden_size * s.depth),
        "larp_tokenizer": Recipe("LARP tokenizer, K600 + UCF-101", 150 * ((K600_TRAIN + UCF101_TRAIN) // 128), 128,
                                 flops.larp_tokenizer_training(t, d),
                                 (parameters(tokenizer) + parameters(disc)) * TRAINED + vgg, larp),
        "larp_ar": Recipe("LARP-AR-LP on cached codes, UCF-101", 3000 * (UCF101_TRAIN // 64), 64,
                          flops.larp_ar_training(ar.config), parameters(ar) * TRAINED, ar_bytes(ar)),
        "larp_ar_fp": Recipe("LARP-AR-LP, frame prediction, K600", 75 * (K600_TRAIN // 64), 64,
                             flops.larp_ar_training(fp.config), parameters(fp) * TRAINED, ar_bytes(fp)),
    }


def hours(recipe: Recipe, gpus: int, peak: float, mfus: dict[int, float], measured: float | None) -> float:
    """Of wall time. peak: FLOP/s of a GPU. measured: samples/s on one GPU, or None."""
    speed = measured * mfus[gpus] / mfus[1] if measured else mfus[gpus] * peak / recipe.flops  # samples/s of a GPU
    return recipe.steps * recipe.batch / (gpus * speed) / 3600


def memory(recipe: Recipe, gpus: int, limit_gib: float) -> tuple[int, float]:
    """Of a GPU: (samples at a time, GiB), the most that fit and share the batch equally; the rest is accumulated."""
    share = recipe.batch // gpus
    gib = {n: (recipe.state_bytes + n * recipe.sample_bytes) / 2**30 for n in range(1, share + 1) if share % n == 0}
    fitting = [n for n, size in gib.items() if size <= limit_gib] or [1]
    return max(fitting), gib[max(fitting)]


def in_words(hours: float) -> str:
    return f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:.1f} hours"


def table(gpu: str, mfus: dict[int, float], limit_gib: float, measured: dict[str, float]) -> str:
    """In Markdown. measured: samples/s by the name of the recipe."""
    peak = 1e12 * flops.PEAKS[gpu]["bf16"]
    rows = [["recipe", "samples", "TFLOP each", "GPU hours on 8"] + [f"{n} GPU{'s' * (n > 1)}" for n in mfus]]
    rows.append(["---"] * len(rows[0]))
    for name, recipe in recipes().items():
        taken = {n: hours(recipe, n, peak, mfus, measured.get(name)) for n in mfus}
        row = [recipe.title + " (measured)" * (name in measured), f"{recipe.steps * recipe.batch / 1e6:,.1f}M"]
        row += [f"{recipe.flops / 1e12:.2f}", f"{8 * taken[8]:,.0f}"]
        for n in mfus:
            samples, gib = memory(recipe, n, limit_gib)
            row.append(f"{in_words(taken[n])}; {samples} at a time, {gib:.0f} GiB")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=flops.PEAKS, default="H100")
    parser.add_argument("--memory_gib", type=float, default=MEMORY_GIB, help="of a GPU, less a reserve")
    parser.add_argument("--mfu", type=float, nargs=3, default=MFU.values(), help="assumed, of 1, 8 and 64 GPUs")
    parser.add_argument("--measured", nargs="+", default=[], metavar="STEP=SAMPLES_PER_SECOND", help="on one GPU")
    args = parser.parse_args()
    measured = {}
    for word in args.measured:
        name, _, value = word.partition("=")
        if name not in recipes() or not value:
            parser.error(f"--measured takes STEP=SAMPLES_PER_SECOND, STEP of {', '.join(recipes())}; got {word!r}")
        measured[name] = float(value)
    print(table(args.gpu, dict(zip(MFU, args.mfu)), args.memory_gib, measured))


if __name__ == "__main__":
    main()
