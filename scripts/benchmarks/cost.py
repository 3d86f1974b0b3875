"""What the published recipes cost: GPU hours and memory on 1, 8 and 64 GPUs, as the Markdown table of docs/costs.md.

    python -m scripts.benchmarks.cost [--gpu H100] [--measured coordtok_1=38.5 sit=410]
    python -m scripts.benchmarks.cost --small           (scripts/configs/*_small.yaml on one GPU of 24 GB)

Computed, not measured: time is the FLOPs of flops.py over an assumed share of the GPU's bf16 peak (--mfu), memory is
counted below. A step that has been timed (`samples/s` of scripts/benchmarks/train_step.py, published size, "all") goes
in by --measured, and its row is marked; from it the assumed MFU of several GPUs scales as from one.
"""
import argparse
import importlib
import math
import sys
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch

from models.configs import SIT_SIZES
from models.coordtok import CoordTok, CoordTokConfig
from models.discriminator import Discriminator, DiscriminatorConfig
from models.larp_ar import SIZES, LARPGenerator, LARPGeneratorConfig
from models.larp_tokenizer import LARPTokenizer, LARPTokenizerConfig
from models.prior import PRIOR_SIZES
from models.sit import SiT, SiTConfig
from scripts.benchmarks import flops
from training.flags import larp_ar_config, merge
from training.load import sit_config

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
VGG16 = 14_714_688
LOGIT = 10  # in bf16 and float32, and their log-softmax

MFU = {1: 0.40, 8: 0.38, 64: 0.32}  # assumed, by the number of GPUs
MEMORY_GIB = 70  # of a GPU of 80 GB, less a reserve
SMALL_GPU, SMALL_GIB = "RTX 4090", 21  # the small recipes' GPU, and its memory of 24 GB, less a reserve


class Recipe(NamedTuple):
    title: str
    steps: int
    batch: int  # samples a step
    flops: int  # of a sample
    state_bytes: int  # of a process
    sample_bytes: int  # of the activations of a sample


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# The bytes of activations that a sample keeps, by configuration.
def coordtok_bytes(config: CoordTokConfig, points: int, lpips_frames: int = 0) -> int:
    # Cross-attention keeps 6 bytes a block: keys, values and their input.
    encoding = VIT * config.enc_patch_num_layers + 6 * config.enc_num_layers
    encoding *= math.prod(config.num_tubelets) * config.enc_embed_dim
    return encoding + points * VIT * config.dec_embed_dim * config.dec_num_layers + lpips_frames * LPIPS_FRAME


def sit_bytes(config: SiTConfig) -> int:
    rows_t, rows = (size // config.patch_size for size in config.input_size)
    tokens = rows * rows + 2 * rows_t * rows
    return tokens * SIT * config.hidden_size * config.depth


def larp_tokenizer_bytes(config: LARPTokenizerConfig, disc: DiscriminatorConfig) -> int:
    codes, (prior_depth, prior_width, _) = config.bottleneck_token_num, PRIOR_SIZES[config.prior_model.name]
    coders = config.encoder_hidden_size * config.encoder_depth + config.decoder_hidden_size * config.decoder_depth
    prior = config.prior_model.n_rounds * codes * (
        VIT * prior_width * prior_depth + LOGIT * flops.codebook_size(config)
    )
    judge = flops.disc_tokens(disc) * VIT * disc.hidden_size * disc.n_layers
    return 2 * codes * VIT * coders + prior + judge + config.frame_num * LPIPS_FRAME


def larp_ar_bytes(config: LARPGeneratorConfig) -> int:
    blocks = config.num_positions * LLAMA * config.dim * config.n_layer
    return blocks + config.max_seq_len * LOGIT * config.vocab_size


def recipes() -> dict[str, Recipe]:
    """By the names of train_step.py, but for frame prediction, whose sequences are longer."""
    with torch.device("meta"):
        coordtok, sit = CoordTok(), SiT(**SIT_SIZES["SiT-L/2"])
        tokenizer, disc = LARPTokenizer(), Discriminator()
        ar = LARPGenerator(**SIZES["llama-abs-LP"])
        fp = LARPGenerator(**SIZES["llama-abs-LP"], frame_prediction=True, cls_token_num=1025)
        c, s, t, d = coordtok.config, sit.config, tokenizer.config, disc.config

    vgg = VGG16 * FROZEN
    return {
        "coordtok_1": Recipe("CoordTok, step 1", 1_000_000, 256, flops.coordtok_training(c, 1024),
                             parameters(coordtok) * TRAINED, coordtok_bytes(c, 1024)),
        "coordtok_2": Recipe("CoordTok, step 2", 50_000, 256, flops.coordtok_training(c, 4096, lpips=True),
                             parameters(coordtok) * TRAINED + vgg, coordtok_bytes(c, 4096, 16)),
        "sit": Recipe("SiT-L/2 on cached latents", 600_000, 64, flops.sit_training(s),
                      parameters(sit) * (TRAINED + AVERAGED), sit_bytes(s)),
        "larp_tokenizer": Recipe("LARP tokenizer, K600 + UCF-101", 150 * ((K600_TRAIN + UCF101_TRAIN) // 128), 128,
                                 flops.larp_tokenizer_training(t, d),
                                 (parameters(tokenizer) + parameters(disc)) * TRAINED + vgg,
                                 larp_tokenizer_bytes(t, d)),
        "larp_ar": Recipe("LARP-AR-LP on cached codes, UCF-101", 3000 * (UCF101_TRAIN // 64), 64,
                          flops.larp_ar_training(ar.config), parameters(ar) * TRAINED, larp_ar_bytes(ar.config)),
        "larp_ar_fp": Recipe("LARP-AR-LP, frame prediction, K600", 75 * (K600_TRAIN // 64), 64,
                             flops.larp_ar_training(fp.config), parameters(fp) * TRAINED, larp_ar_bytes(fp.config)),
    }


def flags_of(script: str, config: str) -> argparse.Namespace:
    """The flags of an entry script with a file of scripts/configs."""
    path = Path(__file__).parents[1] / "configs" / f"{config}.yaml"
    needed = {"train_sit": ["--first_model_ckpt", "none"]}.get(script, [])
    with patch.object(sys, "argv", [f"{script}.py", "--config", str(path), *needed]):
        return importlib.import_module(script).parse_args()


def small_recipes() -> dict[str, Recipe]:
    """Those of scripts/configs/*_small.yaml, by the name of the file; step 2 of CoordTok takes 10,000 steps."""
    coordtok_flags = flags_of("train_coordtok", "coordtok_small")
    sit_flags, larp_flags = flags_of("train_sit", "sit_small"), flags_of("train_larp_tokenizer", "larp_tokenizer_small")
    ar_flags = flags_of("train_ar", "larp_ar_small")
    sit_flags.num_classes = ar_flags.num_classes = 101  # "auto" counts the user's
    with torch.device("meta"):
        coordtok = CoordTok(**merge(CoordTokConfig, coordtok_flags))
        sit = SiT(**sit_config(sit_flags, coordtok.config))
        tokenizer = LARPTokenizer(**merge(LARPTokenizerConfig, larp_flags))
        disc = Discriminator(**merge(DiscriminatorConfig, larp_flags))
        ar = LARPGenerator(**larp_ar_config(ar_flags, tokenizer.config)[0])
    c, s, t, d, a = coordtok.config, sit.config, tokenizer.config, disc.config, ar.config
    points, vgg = coordtok_flags.point_per_vid, VGG16 * FROZEN
    frames = points // math.prod(c.grid[1:])

    def recipe(title: str, flags: argparse.Namespace, *rest: int, steps: int | None = None) -> Recipe:
        return Recipe(title, steps or flags.num_iters, flags.batch_size, *rest)

    return {
        "coordtok_small": recipe("CoordTok, step 1", coordtok_flags, flops.coordtok_training(c, points),
                                 parameters(coordtok) * TRAINED, coordtok_bytes(c, points)),
        "coordtok_small, step 2": recipe("CoordTok, step 2", coordtok_flags,
                                         flops.coordtok_training(c, points, lpips=True),
                                         parameters(coordtok) * TRAINED + vgg, coordtok_bytes(c, points, frames),
                                         steps=10_000),
        "sit_small": recipe("SiT-B/2 on cached latents", sit_flags, flops.sit_training(s),
                            parameters(sit) * (TRAINED + AVERAGED), sit_bytes(s)),
        "larp_tokenizer_small": recipe("LARP tokenizer", larp_flags, flops.larp_tokenizer_training(t, d),
                                       parameters(tokenizer) * (TRAINED + AVERAGED) + parameters(disc) * TRAINED + vgg,
                                       larp_tokenizer_bytes(t, d)),
        "larp_ar_small": recipe("LARP-AR-B on cached codes", ar_flags, flops.larp_ar_training(a),
                                parameters(ar) * (TRAINED + AVERAGED), larp_ar_bytes(a)),
    }


def small_table() -> str:
    """In Markdown: the small recipes on one GPU."""
    peak = 1e12 * flops.PEAKS[SMALL_GPU]["bf16"]
    rows = [["recipe", "config", "steps", "clips a step", "TFLOP each", "time", "at a time", "GiB"], ["---"] * 8]
    for name, recipe in small_recipes().items():
        samples, gib = memory(recipe, 1, SMALL_GIB)
        rows.append([recipe.title, f"`{name.split(',')[0]}.yaml`", f"{recipe.steps:,}", str(recipe.batch),
                     f"{recipe.flops / 1e12:.2f}", in_words(hours(recipe, 1, peak, MFU, None)), str(samples),
                     f"{gib:.0f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
    parser.add_argument("--small", action="store_true", help=f"the small recipes, on one {SMALL_GPU}")
    args = parser.parse_args()
    if args.small:
        print(small_table())
        return
    measured = {}
    for word in args.measured:
        name, _, value = word.partition("=")
        if name not in recipes() or not value:
            parser.error(f"--measured takes STEP=SAMPLES_PER_SECOND, STEP of {', '.join(recipes())}; got {word!r}")
        measured[name] = float(value)
    print(table(args.gpu, dict(zip(MFU, args.mfu)), args.memory_gib, measured))


if __name__ == "__main__":
    main()
