"""FLOPs by arithmetic against torch's count of the real modules, at sizes where no two dimensions agree."""
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.coordtok import CoordTok, coordtok_loss
from models.decoding import KVCache, decode_one
from models.discriminator import Discriminator
from models.gan import frozen
from models.interpolant import Interpolant
from models.larp_ar import SIZES, LARPGenerator, LARPGeneratorConfig, code_loss
from models.larp_tokenizer import LARPTokenizer
from models.lpips import Perceptual
from models.sit import SiT
from models.triplane import Planes
from scripts.benchmarks import flops


def count(function) -> int:
    """torch's count. Its table has no fused attention of a CPU, so attention is taken apart into its products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def perceptual() -> Perceptual:
    return Perceptual(weights="random")


@pytest.fixture
def coordtok() -> CoordTok:
    return CoordTok(
        video_shape=(8, 32, 48), enc_embed_dim=24, enc_num_layers=2, enc_num_heads=2, enc_patch_size_xy=16,
        enc_patch_size_t=2, enc_patch_num_layers=3, latent_resolution_xy=8, latent_resolution_t=6, latent_n_features=5,
        latent_patch_size_xy=4, latent_patch_size_t=2, dec_embed_dim=20, dec_num_layers=2, dec_num_heads=4,
        dec_patch_size_xy=16, dec_patch_size_t=2,
    ).train()


def test_coordtok(coordtok, perceptual):
    config, video = coordtok.config, torch.rand(1, 3, 8, 32, 48)
    index = torch.cartesian_prod(torch.tensor([1, 3]), torch.arange(2), torch.arange(3))[None]  # two times, 4 frames
    planes = coordtok.encode(video)
    assert count(lambda: coordtok.encode(video)) == flops.coordtok_encode(config)
    assert count(lambda: coordtok.decode(planes, index)) == flops.coordtok_decode(config, 12)
    target = torch.rand(1, 12, 2 * 16 * 16 * 3)
    for metric in (None, perceptual):
        counted = count(
            lambda: coordtok_loss(coordtok(video, index), target, index, config, metric, 1.0)[0].backward()  # noqa: B023
        )
        assert counted == flops.coordtok_training(config, 12, lpips=metric is not None)


def test_lpips(perceptual):
    images = torch.rand(2, 1, 3, 1, 35, 48)
    assert count(lambda: perceptual(*images)) == flops.lpips(35, 48)
    pred = images[0].requires_grad_()
    assert count(lambda: perceptual(pred, images[1].detach()).backward()) == flops.lpips_training(35, 48)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_sit(learn_sigma):
    model = SiT(input_size=(12, 8), hidden_size=32, depth=2, num_heads=4, in_channels=3, learn_sigma=learn_sigma)
    planes, y = Planes(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 12, 8), torch.rand(1, 3, 12, 8)), torch.tensor([0])
    assert count(lambda: model(planes, torch.rand(1), y)) == flops.sit(model.config)
    loss = lambda: Interpolant().loss(model, planes, y=y)[0].sum().backward()  # noqa: E731
    assert count(loss) == flops.sit_training(model.config)


@pytest.mark.parametrize("options", [
    {}, {"n_rounds": 3}, {"avg_loss_over_rounds": False}, {"no_grad_before_last_round": True}, {"use_mix_ss": False}
])
def test_larp_tokenizer(options, perceptual):
    bottleneck = {"args": {"bottleneck_dim": 6, "regularizer": {"args": {"codebook_size": 50}}}}
    model = LARPTokenizer(
        input_size=32, frame_num=4, temporal_patch_size=2, decoder_temporal_patch_size=4, decoder_patch_size=16,
        bottleneck_token_num=7, bottleneck=bottleneck, prior_model={"name": "gptc-tiny", **options},
        encoder_hidden_size=24, decoder_hidden_size=20,
        encoder_num_heads=2, decoder_num_heads=4, encoder_depth=2, decoder_depth=1,
    ).train()
    disc = Discriminator(hidden_size=28, n_heads=2, n_layers=2, input_size=32, temporal_patch_size=2, frame_num=4)
    config, video = model.config, torch.rand(1, 3, 4, 32, 32)
    codes = model.encode(video)
    assert count(lambda: model.encode(video)) == flops.larp_encode(config)
    assert count(lambda: model.decode(codes)) == flops.larp_decode(config)
    assert count(lambda: disc(video)) == flops.discriminator(disc.config)

    def generator_step():
        output = model(video, 0.5)
        with frozen(disc):
            judged = disc(output.video).sum()
        (judged + perceptual(output.video, video).sum() + output.loss_q + output.loss_prior).backward()

    own_step = flops.discriminator_training(disc.config)
    assert count(lambda: disc(torch.cat([video, codes.sum() + video])).sum().backward()) == own_step
    assert count(generator_step) + own_step // 5 == flops.larp_tokenizer_training(config, disc.config, 5)


@pytest.mark.parametrize("frame_prediction", [False, True])
def test_larp_generator(frame_prediction, monkeypatch):
    model = LARPGenerator(
        dim=48, n_layer=2, n_head=4, n_kv_head=2, multiple_of=16, vocab_size=50, max_seq_len=9, num_classes=3,
        frame_prediction=frame_prediction, cls_token_num=10 if frame_prediction else 1,
    )
    config, codes = model.config, torch.randint(50, (1, 9))
    cond = model.frame_condition(codes) if frame_prediction else torch.tensor([2])
    assert count(lambda: model(codes, cond)) == flops.larp_ar(config)
    assert count(lambda: code_loss(model(codes, cond), codes)[0].backward()) == flops.larp_ar_training(config)
    model.eval()
    cache = KVCache(config, 1, torch.float32, torch.device("cpu"))
    # Attends as on a GPU: of embedding bags, a CPU's way, torch counts nothing.
    monkeypatch.setattr("models.decoding.value_rows", lambda *_: None)
    step = torch.no_grad()(lambda: decode_one(model, cache, codes[:, 0], 5))
    assert count(step) == flops.larp_ar_decode(config, 6)


def test_larp_generator_is_six_operations_a_weight():
    """The rule of thumb: 6 N a token, and 12 layers x dim x tokens for attention (PaLM, appendix B)."""
    config = LARPGeneratorConfig(**SIZES["llama-abs-LP"])
    weights = 632.0e6 - (8192 + 102 + 1024) * 1280  # less the tables, which are looked up
    expected = 1024 * (6 * weights + 12 * config.n_layer * config.dim * 1024)
    assert math.isclose(flops.larp_ar_training(config), expected, rel_tol=1e-3)


def test_peaks():
    assert flops.peak("NVIDIA H100 80GB HBM3", "bf16") == flops.peak("NVIDIA H200", "fp16") == 989e12
    assert flops.peak("NVIDIA H100 PCIe", "tf32") == 378e12
    assert flops.peak("CPU, 2 threads", "fp32") is None
