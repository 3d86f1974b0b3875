"""What only a GPU can show: training steps in every precision against the CPU's, and the scripts themselves."""
import copy
import json
import warnings

import numpy as np
import pytest
import torch
from helpers import run_here
from torch import Tensor, nn

import train_ar
import train_larp_tokenizer
import train_sit
from common.rng import sample_generators
from data.patch_sampling import random_frames
from models.configs import SIT_SIZES
from models.coordtok import CoordTok, coordtok_loss
from models.discriminator import Discriminator
from models.gan import discriminator_loss, frozen, generator_loss, r1_penalty
from models.interpolant import Interpolant, draw_noise
from models.larp_ar import LARPGenerator, code_loss
from models.larp_tokenizer import LARPTokenizer
from models.layers import compile_blocks
from models.lpips import Perceptual
from models.patches import gather_patches
from models.sit import SiT
from models.triplane import Planes
from scripts.benchmarks.common import SMALL_AR, SMALL_COORDTOK, SMALL_DISC, SMALL_LARP
from training.optim import Precision, adamw, update

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
STEPS = 3


def coordtok():
    """Whole frames and LPIPS, as in the second step; one clip of the two is short."""
    model, perceptual = CoordTok(**SMALL_COORDTOK), Perceptual(weights="random")
    config = model.config
    rng = np.random.default_rng(0)
    index = torch.from_numpy(np.stack([
        random_frames(rng, 128, config.grid, frames, config.dec_patch_size_t) for frames in (16, 9)
    ]))
    video, n_frames = torch.rand(2, 3, *config.video_shape), torch.tensor([16, 9])
    target = gather_patches(video, index, config.dec_patch_size_t, config.dec_patch_size_xy) * 2 - 1

    def loss(model: nn.Module, perceptual: nn.Module, video: Tensor, index: Tensor, n_frames: Tensor, target: Tensor):
        return coordtok_loss(model(video, index, n_frames), target, index, config, perceptual, 1.0)[0].sum()

    return [model, perceptual], (video, index, n_frames, target), loss


def sit():
    model = SiT(input_size=(16, 16), **SIT_SIZES["SiT-XS/2"])
    planes, noise = (draw_noise(sample_generators(seed, range(4), CPU), model.plane_shapes) for seed in (0, 1))
    interpolant = Interpolant()

    def loss(model: nn.Module, t: Tensor, y: Tensor, *planes: Tensor):
        data, noise = Planes(*planes[:3]), Planes(*planes[3:])
        return interpolant.loss(model, data, interpolant.training_times(t), noise, y=y)[0].mean()

    return [model], (torch.rand(4), torch.zeros(4, dtype=torch.long), *planes, *noise), loss


def larp_tokenizer():
    """All of the tokenizer's losses, with the nearest codes and no dropout, so that nothing is drawn."""
    size = {"frame_num": 4, "input_size": 32}
    config = copy.deepcopy(SMALL_LARP)
    config["bottleneck"]["args"]["regularizer"]["args"]["stochastic"] = False
    model, discriminator = LARPTokenizer(**{**config, **size}), Discriminator(**{**SMALL_DISC, **size})
    model.prior_model.eval()
    perceptual = Perceptual(weights="random")

    def loss(model: nn.Module, discriminator: nn.Module, perceptual: nn.Module, video: Tensor):
        output = model(video, 0.0)
        fake = output.video.float()
        real_logits, fake_logits = discriminator(torch.cat([video, fake.detach()])).chunk(2)
        judged = discriminator_loss(real_logits, fake_logits, "hinge")[0] + 0.1 * r1_penalty(discriminator, video)
        with frozen(discriminator):
            total = (fake - video).abs().mean() + perceptual(fake, video).mean()
            total = total + 0.3 * generator_loss(discriminator(fake), "hinge") + 0.1 * output.loss_q
        return judged + total + 0.06 * output.loss_prior

    return [model, discriminator, perceptual], (torch.rand(2, 3, 4, 32, 32),), loss


def larp_ar():
    off = dict.fromkeys(("token_dropout_p", "resid_dropout_p", "ffn_dropout_p"), 0.0)
    model = LARPGenerator(**{**SMALL_AR, "max_seq_len": 128, "vocab_size": 1024}, **off).train()

    def loss(model: nn.Module, codes: Tensor, labels: Tensor, drop: Tensor):
        return code_loss(model(codes, labels, drop), codes)[0]

    return [model], (torch.randint(1024, (4, 128)), torch.arange(4), torch.arange(4) == 2), loss


def losses(make, device: torch.device, precision: str, compiled: bool = False) -> list[float]:
    """Of three training steps from the same weights, whatever the device."""
    torch.manual_seed(0)
    modules, inputs, loss = make()
    modules = [module.to(device) for module in modules]
    optimizer = adamw([p for module in modules for p in module.parameters() if p.requires_grad], lr=1e-3)
    precision, found = Precision(precision, device), []
    for module in modules if compiled else []:
        compile_blocks(device, module)
    for _ in range(STEPS):
        with precision.autocast():
            value = loss(*modules, *(tensor.to(device) for tensor in inputs))
        precision.scaler.scale(value).backward()
        update(optimizer, precision.scaler)
        found.append(value.detach())
    return torch.stack(found).tolist()


@pytest.fixture(scope="module")
def expected() -> dict:
    """Each trainer's losses on the CPU in float32."""
    return {make.__name__: losses(make, CPU, "fp32") for make in (coordtok, sit, larp_tokenizer, larp_ar)}


@pytest.mark.parametrize("make", [coordtok, sit, larp_tokenizer, larp_ar])
@pytest.mark.parametrize(("precision", "compiled", "tolerance"), [
    ("fp32", False, 1e-3), ("bf16", False, 3e-2), ("fp16", False, 3e-2), ("bf16", True, 3e-2),
])
def test_steps_on_a_gpu_are_those_of_the_cpu(make, precision, compiled, tolerance, expected):
    """Which code is nearest can depend on rounding, so that the LARP tokenizer's losses part sooner."""
    if make is larp_tokenizer:
        tolerance *= 3
    assert losses(make, GPU, precision, compiled) == pytest.approx(expected[make.__name__], rel=tolerance)


@pytest.mark.parametrize(
    "name", ["coordtok_1", "coordtok_2", "sit", "sit_cached", "larp_tokenizer", "larp_ar", "larp_ar_cached"]
)
def test_scripts_run_on_a_gpu_and_no_step_waits(scripts, monkeypatch, tmp_path, name):
    script, flags = scripts[name]
    folder = "--results_dir" if script is train_sit else "--save_dir"
    flags = [*flags, "--device", "cuda", "--precision", "bf16", "--exp_name", "run", "--log_every", 1]
    if script is train_larp_tokenizer or script is train_ar:
        flags += ["--eval_every", 100, "--save_every", 100]
    run_here(monkeypatch, script, *flags, "--num_iters", 1, folder, tmp_path / "warm")  # fills caches
    counts = []
    for steps in (2, 5):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 0)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run_here(monkeypatch, script, *flags, "--log_every", 100, "--num_iters", steps, folder,
                         tmp_path / str(steps))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append([str(w.message)[:90] + f" {w.filename}:{w.lineno}" for w in caught
                       if "synchroniz" in str(w.message).lower()])
    lines = (tmp_path / "5" / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines if json.loads(line)["kind"] == "train")
    assert len(counts[1]) <= len(counts[0]), sorted(set(counts[1]))
