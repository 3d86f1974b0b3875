"""Floating-point operations of the models by arithmetic, and their share of a GPU's peak. Multiply-add is two.

Counted are matrix products, convolutions and attention, as torch.utils.flop_counter does; not norms, activations,
softmax, embeddings, interpolation, losses and optimisers, which are few operations on much memory. Causal attention
counts whole, with the half that is masked, and what activation checkpointing and flash attention compute again does
not count: both are the custom of reported MFU (PaLM, arXiv 2204.02311, appendix B).

Every function takes a model's configuration and returns the operations of one sample: those of a forward pass, and
`*_training` those of forward and backward. A product has two more in the backward pass, one for the gradient of either
factor; but none for pixels, noise and frozen weights.
"""
import math
from itertools import pairwise

from common.cli import is_none
from models.coordtok import CoordTokConfig
from models.discriminator import DiscriminatorConfig
from models.larp_ar import LARPGeneratorConfig
from models.larp_tokenizer import LARPTokenizerConfig
from models.prior import PRIOR_SIZES
from models.sit import SiTConfig


def linear(rows: int, width_in: int, width_out: int) -> int:
    return 2 * rows * width_in * width_out


def attention(queries: int, keys: int, dim: int) -> int:
    """Logits and weighted sums, all heads together; the projections are linear layers."""
    return 4 * queries * keys * dim


def transformer(tokens: int, dim: int, depth: int) -> int:
    """Blocks of self-attention and an MLP of ratio 4: qkv is 3 dim x dim, the projection 1, the MLP 4 and 4."""
    return depth * (linear(tokens, dim, 12 * dim) + attention(tokens, tokens, dim))


# CoordTok


def coordtok_tubelets(c: CoordTokConfig) -> int:
    """The embedding of pixels."""
    tubelet = 3 * c.enc_patch_size_t * c.enc_patch_size_xy**2
    return linear(math.prod(c.num_tubelets), tubelet, c.enc_embed_dim)


def coordtok_encode(c: CoordTokConfig) -> int:
    tokens, dim = math.prod(c.num_tubelets), c.enc_embed_dim
    rows = c.latent_resolution_xy // c.latent_patch_size_xy  # query tokens along the side of a plane
    rows_t = c.latent_resolution_t // c.latent_patch_size_t
    queries = rows * rows + 2 * rows_t * rows
    latents = c.latent_resolution_xy**2 + 2 * c.latent_resolution_t * c.latent_resolution_xy
    planes = linear(latents * c.latent_n_features, 1, dim)  # to query tokens; from them, as much again
    block = linear(queries, dim, 14 * dim)  # cross-attention's q and projection, self-attention's 4, the MLP's 8
    block += linear(tokens, dim, 2 * dim)  # cross-attention's k and v
    block += attention(queries, tokens, dim) + attention(queries, queries, dim)
    video = coordtok_tubelets(c) + transformer(tokens + 1, dim, c.enc_patch_num_layers)
    return video + c.enc_num_layers * block + 2 * planes


def coordtok_decode(c: CoordTokConfig, points: int) -> int:
    """`points` patches of one clip as one sequence."""
    dim, pixels = c.dec_embed_dim, 3 * c.dec_patch_size_t * c.dec_patch_size_xy**2
    ends = linear(points, 3 * c.latent_n_features, dim) + linear(points, dim, pixels)
    return transformer(points, dim, c.dec_num_layers) + ends


def coordtok_training(c: CoordTokConfig, points: int, lpips: bool = False) -> int:
    """lpips: step 2, where the points are whole frames."""
    _, *side = c.video_shape
    frames = points // math.prod(c.grid[1:]) * c.dec_patch_size_t if lpips else 0
    without_pixels = 3 * (coordtok_encode(c) + coordtok_decode(c, points)) - coordtok_tubelets(c)
    return without_pixels + frames * lpips_training(*side)


# LPIPS

VGG16 = [(3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512)]  # 3x3, pooling


def vgg16(height: int, width: int) -> int:
    """The convolutions, for one image."""
    return sum(
        linear((height >> stage) * (width >> stage), 9 * channels_in, channels_out)
        for stage, channels in enumerate(VGG16)
        for channels_in, channels_out in pairwise(channels)
    )


def lpips_heads(height: int, width: int) -> int:
    return sum(linear((height >> i) * (width >> i), channels[-1], 1) for i, channels in enumerate(VGG16))


def lpips(height: int, width: int) -> int:
    """The distance of two images."""
    return 2 * vgg16(height, width) + lpips_heads(height, width)


def lpips_training(height: int, width: int) -> int:
    """With the gradient of one of the images; the weights are frozen."""
    return lpips(height, width) + vgg16(height, width) + lpips_heads(height, width)


# SiT


def sit_inputs(c: SiTConfig) -> int:
    """What reads noisy planes and times: embeddings of patches and of 256 sinusoids."""
    rows_t, rows = c.input_size
    values = (rows * rows + 2 * rows_t * rows) * c.in_channels
    return (1 + c.condition_on_previous) * linear(values, 1, c.hidden_size) + linear(1, 256, c.hidden_size)


def sit(c: SiTConfig) -> int:
    """One network call: the tokens of the three planes as one sequence."""
    rows_t, rows = (size // c.patch_size for size in c.input_size)
    tokens, dim = rows * rows + 2 * rows_t * rows, c.hidden_size
    condition = linear(1, dim, dim) + c.depth * linear(1, dim, 6 * dim) + 3 * linear(1, dim, 2 * dim)
    values = c.patch_size**2 * c.in_channels * (2 if c.learn_sigma else 1)
    return sit_inputs(c) + condition + transformer(tokens, dim, c.depth) + linear(tokens, dim, values)


def sit_training(c: SiTConfig) -> int:
    return 3 * sit(c) - sit_inputs(c)


# LARP's tokenizer


def larp_tubelets(c: LARPTokenizerConfig) -> int:
    """The embedding of pixels."""
    tubelet = c.in_channels * c.temporal_patch_size * c.patch_size**2
    return linear(math.prod(c.grid), tubelet, c.encoder_hidden_size)


def larp_similarity(c: LARPTokenizerConfig) -> int:
    """Every latent compared with every code."""
    return linear(c.bottleneck_token_num, c.bottleneck.args.bottleneck_dim, codebook_size(c))


def codebook_size(c: LARPTokenizerConfig) -> int:
    return c.bottleneck.args.regularizer.args.codebook_size


def larp_encode(c: LARPTokenizerConfig) -> int:
    """To codes."""
    codes, dim = c.bottleneck_token_num, c.encoder_hidden_size
    tokens = transformer(math.prod(c.grid) + codes, dim, c.encoder_depth)
    return larp_tubelets(c) + tokens + linear(codes, dim, c.bottleneck.args.bottleneck_dim) + larp_similarity(c)


def larp_decode(c: LARPTokenizerConfig) -> int:
    """From codes."""
    codes, patches, dim = c.bottleneck_token_num, math.prod(c.decoder_grid), c.decoder_hidden_size
    pixels = c.in_channels * c.decoder_temporal_patch_size * c.decoder_patch_size**2
    tokens = transformer(codes + patches, dim, c.decoder_depth)
    return linear(codes, c.bottleneck.args.bottleneck_dim, dim) + tokens + linear(patches, dim, pixels)


def prior_logits(c: LARPTokenizerConfig) -> int:
    """A round's predictions compared with every code."""
    return linear(c.bottleneck_token_num - 1, c.bottleneck.args.bottleneck_dim, codebook_size(c))


def prior(c: LARPTokenizerConfig) -> int:
    """One round, 0 without a prior."""
    if is_none(c.prior_model.name):
        return 0
    depth, dim, _ = PRIOR_SIZES[c.prior_model.name]
    tokens = c.bottleneck_token_num - 1
    ends = 2 * linear(tokens, c.bottleneck.args.bottleneck_dim, dim)
    return transformer(tokens, dim, depth) + ends + prior_logits(c)


def prior_training(c: LARPTokenizerConfig) -> int:
    """All rounds; the codebook is held fixed."""
    if is_none(c.prior_model.name):
        return 0
    rounds = c.prior_model.n_rounds if c.prior_model.use_mix_ss else 1
    only_last = c.prior_model.no_grad_before_last_round or not c.prior_model.avg_loss_over_rounds
    trained = 1 if only_last else rounds
    return (rounds + 2 * trained) * prior(c) - trained * prior_logits(c)


def disc_tubelets(c: DiscriminatorConfig) -> int:
    """The embedding of pixels."""
    return linear(disc_tokens(c) - 1, c.in_channels * c.temporal_patch_size * c.patch_size**2, c.hidden_size)


def disc_tokens(c: DiscriminatorConfig) -> int:
    return c.frame_num // c.temporal_patch_size * (c.input_size // c.patch_size) ** 2 + 1


def discriminator(c: DiscriminatorConfig) -> int:
    """The judgement of one clip."""
    return disc_tubelets(c) + transformer(disc_tokens(c), c.hidden_size, c.n_layers) + linear(1, c.hidden_size, 1)


def discriminator_training(c: DiscriminatorConfig) -> int:
    """Its own step: a real clip and a reconstruction."""
    return 2 * (3 * discriminator(c) - disc_tubelets(c))


def discriminator_frozen(c: DiscriminatorConfig) -> int:
    """The generator's loss: a gradient for the clip and none for the weights. Attention has no weights."""
    return 2 * discriminator(c) + c.n_layers * attention(disc_tokens(c), disc_tokens(c), c.hidden_size)


def larp_tokenizer_training(
    c: LARPTokenizerConfig, disc: DiscriminatorConfig | None = None, d_update_freq: int = 5, lpips: bool = True
) -> int:
    """The published losses: L1, LPIPS, quantiser, prior, discriminator (None: without), which itself takes a step in
    d_update_freq. Not counted: R1, the entropy loss and a learned temperature, which are off."""
    total = 3 * (larp_encode(c) + larp_decode(c)) - larp_tubelets(c) - 2 * larp_similarity(c) + prior_training(c)
    if lpips:
        total += c.frame_num * lpips_training(c.input_size, c.input_size)
    if disc:
        total += discriminator_frozen(disc) + discriminator_training(disc) // d_update_freq
    return total


# LARP's generator


def larp_ar_layers(c: LARPGeneratorConfig, tokens: int, keys: int) -> int:
    """All layers on `tokens` tokens that each look at `keys` positions."""
    qkv_and_projection = linear(tokens, c.dim, (2 * c.n_head + 2 * c.kv_heads) * c.head_dim)
    return c.n_layer * (qkv_and_projection + 3 * linear(tokens, c.dim, c.ffn_dim) + attention(tokens, keys, c.dim))


def larp_ar(c: LARPGeneratorConfig) -> int:
    """The scores of all codes of a clip."""
    return larp_ar_layers(c, c.num_positions, c.num_positions) + linear(c.max_seq_len, c.dim, c.vocab_size)


def larp_ar_training(c: LARPGeneratorConfig) -> int:
    return 3 * larp_ar(c)


def larp_ar_decode(c: LARPGeneratorConfig, length: int) -> int:
    """One code by the cache of keys and values, `length` positions of which it looks at."""
    return larp_ar_layers(c, 1, length) + linear(1, c.dim, c.vocab_size)


# Peak TFLOP/s of dense products, by what torch.cuda.get_device_name() contains, the more special names first. NVIDIA's
# data sheets (H100 and H200 Tensor Core GPU, A100 Tensor Core GPU); those of H100 and H200 give twice as much, with
# sparsity. fp32 is that of the CUDA cores.
PEAKS = {
    "H100 PCIe": {"bf16": 756, "tf32": 378, "fp32": 51},
    "H100 NVL": {"bf16": 835, "tf32": 418, "fp32": 60},
    "H200 NVL": {"bf16": 836, "tf32": 418, "fp32": 60},
    "H100": {"bf16": 989, "tf32": 495, "fp32": 67},
    "H200": {"bf16": 989, "tf32": 495, "fp32": 67},
    "A100": {"bf16": 312, "tf32": 156, "fp32": 19.5},
    "RTX 4090": {"bf16": 165, "tf32": 83, "fp32": 83},  # NVIDIA Ada GPU Architecture
}


def peak(device: str, dtype: str) -> float | None:
    """FLOP/s. device: its name. dtype: bf16, fp16 (as fast), tf32 or fp32. None where it is not in the table, as that
    of every CPU, which hangs on its clock."""
    peaks = next((peaks for name, peaks in PEAKS.items() if name in device), None)
    return peaks and 1e12 * peaks["bf16" if dtype == "fp16" else dtype]
