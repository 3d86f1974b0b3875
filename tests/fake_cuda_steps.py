"""The scripts on CUDA tensors without data: what a step waits for, the memory it takes, and what decoding a code reads.

FAKE_CUDA_PUBLISHED=1 takes the published depths, which needs 16 GB of memory and ten minutes.
"""
import os
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda, size, unavailable
from helpers import run, run_here, tiny_larp

import train_ar
import train_coordtok
import train_larp_tokenizer
import train_sit
from models import decode_kernels
from models.configs import SIT_SIZES
from models.coordtok import CoordTok
from models.decoding import Draws, KVCache, Sampling, decode_fused
from models.discriminator import Discriminator
from models.larp_ar import SIZES, LARPGenerator
from models.larp_tokenizer import LARPTokenizer
from models.sit import SiT
from scripts.benchmarks import cost
from training import checkpoint
from training.log import NonFiniteGuard, RunLog

PUBLISHED = os.environ.get("FAKE_CUDA_PUBLISHED") == "1"
CASES = ["coordtok_1", "coordtok_2", "sit", "sit_cached", "larp_tokenizer", "larp_ar", "larp_ar_cached"]


# Averages are deep copies, which ask a fake tensor for its address.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.fixture(autouse=True)
def available():
    if reason := unavailable():
        pytest.skip(reason)


def second_step(monkeypatch, script, *flags) -> tuple[FakeCuda, list[int]]:
    """Run two steps of a script on fake CUDA, and look at the second: (what it did, [live bytes before it, peak bytes
    in it])."""
    memory, end_step, check = [], RunLog.end_step, NonFiniteGuard.check

    def between_steps() -> None:
        if len(memory) < 2:
            cuda.counting = not memory
            memory.append(cuda.peak if memory else cuda.live)
            cuda.peak = cuda.live

    def after_end(*args) -> None:
        end_step(*args)
        between_steps()

    def before_reading(guard: NonFiniteGuard) -> None:  # what the last step logs is read
        between_steps()
        check(guard)

    monkeypatch.setattr(RunLog, "end_step", after_end)
    monkeypatch.setattr(NonFiniteGuard, "check", before_reading)
    monkeypatch.setattr(checkpoint, "save", lambda *_, **__: None)  # fake tensors hold no data
    with fake_cuda() as cuda:
        run_here(monkeypatch, script, *flags, "--device", "cuda", "--num_iters", 2)
    return cuda, memory


@pytest.mark.parametrize("name, precision", [
    *[(name, "bf16") for name in CASES],
    *[(name, "fp16") for name in (CASES if PUBLISHED else ["larp_tokenizer", "larp_ar_cached"])],
    *[(name, "fp32") for name in (CASES if PUBLISHED else ["coordtok_1"])],
])
def test_no_step_waits(scripts, monkeypatch, tmp_path, name, precision):
    """For the device: it would stand still. Clips are short, mirrored and in micro-batches; averages are kept."""
    script, flags = scripts[name]
    folder = "--results_dir" if script is train_sit else "--save_dir"
    tokenizers = []
    if load := {train_sit: "load_coordtok", train_ar: "load_larp_tokenizer"}.get(script):
        released = getattr(script, load)
        monkeypatch.setattr(script, load, lambda *args: tokenizers.append(released(*args)) or tokenizers[-1])
    cuda, _ = second_step(monkeypatch, script, *flags, folder, tmp_path / "runs", "--precision", precision)
    assert not cuda.waits()
    assert sum(cuda.kernels.values()) > 300  # it did run there
    # A frozen tokenizer is on the GPU only where it encodes at every step.
    devices = {parameter.device.type for tokenizer in tokenizers for parameter in tokenizer.parameters()}
    assert devices == ({"cpu" if "cached" in name else "cuda"} if load else set())


@pytest.mark.parametrize("name", ["coordtok_1", "sit_cached", "larp_tokenizer", "larp_ar_cached"])
def test_waits_are_found(scripts, monkeypatch, tmp_path, name):
    """A value that is read, copies that block, and a tensor on the CPU, put into a step of each script."""
    script, flags = scripts[name]
    watch = NonFiniteGuard.watch

    def waiting(guard, step, loss, files):
        loss.item()
        loss.detach().cpu()
        torch.ones(3).to(loss.device)
        torch.ones(3).to(loss.device, non_blocking=True)  # not of pinned memory
        watch(guard, step, loss + torch.ones(()), files)

    monkeypatch.setattr(NonFiniteGuard, "watch", waiting)
    folder = "--results_dir" if script is train_sit else "--save_dir"
    cuda, _ = second_step(monkeypatch, script, *flags, folder, tmp_path / "runs")
    for counter, lines in (
        (cuda.reads, ["loss.detach().cpu()", "loss.item()"]),
        (cuda.blocking, ["torch.ones(3).to(loss.device)", "torch.ones(3).to(loss.device, non_blocking=True)"]),
        (cuda.mixed, ["watch(guard, step, loss + torch.ones(()), files)"]),
    ):
        assert sorted(line.split(":", 1)[1].split(" ", 1)[1].split("  #")[0] for line in counter) == lines


@pytest.fixture(scope="module")
def long_videos(tmp_path_factory) -> Path:
    """64 videos of 130 frames in two classes, so that no published clip is short."""
    root = tmp_path_factory.mktemp("long")
    flags = "--classes PanLeft ZoomIn --groups 8 --clips 1 --size 64x48 --min_frames 130 --max_frames 130".split()
    run("data/demo.py", "--root", root, *flags)
    for path in sorted(root.rglob("*.avi")):
        folder = root / "UCF-101_train" / path.parent.name
        folder.mkdir(parents=True)
        for group in range(32):
            shutil.copy(path, folder / f"v_{folder.name}_g{group + 8:02d}_c01.avi")
    return root


def coordtok(folder: Path, second: bool) -> tuple[list, int]:
    depths = {"enc_num_layers": 24, "enc_patch_num_layers": 8, "dec_num_layers": 24}
    depths = depths if PUBLISHED else {name: depth // 8 for name, depth in depths.items()}
    model, points, batch = CoordTok(**depths), (4096 if second else 1024), (4 if second else 16)
    flags = [*as_flags(depths), "--num_views", batch, "--point_per_vid", points, "--num_val", 0]
    if second:
        state = {"format": checkpoint.FORMAT, "kind": "coordtok", "config": asdict(model.config)}
        torch.save({**state, "model": model.state_dict()}, folder / "first.pt")
        flags += ["--is_second_step", "--first_step_ckpt", folder / "first.pt", "--lpips_weights", "random"]
    memory = cost.parameters(model) * cost.TRAINED + second * cost.VGG16 * cost.FROZEN
    return flags, memory + batch * cost.coordtok_bytes(model.config, points, second * 16)


def sit(folder: Path) -> tuple[list, int]:
    tokenizer = CoordTok(enc_embed_dim=64, enc_num_layers=1, enc_num_heads=1, enc_patch_num_layers=1, dec_embed_dim=64,
                         dec_num_layers=1, dec_num_heads=1)
    state = {"format": checkpoint.FORMAT, "kind": "coordtok", "config": asdict(tokenizer.config)}
    torch.save({**state, "model": tokenizer.state_dict()}, folder / "tokenizer.pt")
    with torch.device("meta"):
        model = SiT(**SIT_SIZES["SiT-L/2"])
    flags = ["--first_model_ckpt", folder / "tokenizer.pt", "--cache_latents", 1, "--cache_dir", folder / "cache",
             "--global_batch_size", 64, "--num_val", 0]
    return flags, cost.parameters(model) * (cost.TRAINED + cost.AVERAGED) + 64 * cost.sit_bytes(model.config)


def larp_tokenizer(_: Path) -> tuple[list, int]:
    depths = {} if PUBLISHED else {"encoder_depth": 2, "decoder_depth": 2}
    disc = {} if PUBLISHED else {"n_layers": 2}
    with torch.device("meta"):
        model, discriminator = LARPTokenizer(**depths), Discriminator(**disc)
    flags = [*as_flags(depths), *as_flags({f"disc_{name}": n for name, n in disc.items()}), "--csv_file", "null128.csv",
             "--d_update_freq", 1, "--batch_size", 4, "--lpips_weights", "random", "--num_val", 0]
    memory = sum(map(cost.parameters, (model, discriminator))) * cost.TRAINED + cost.VGG16 * cost.FROZEN
    return flags, memory + 4 * cost.larp_tokenizer_bytes(model.config, discriminator.config)


def larp_ar(folder: Path) -> tuple[list, int]:
    depth = {} if PUBLISHED else {"n_layer": 3}
    with torch.device("meta"):
        model = LARPGenerator(**{**SIZES["llama-abs-LP"], **depth})
    tiny_larp(32, 8, 1024, codebook_size=8192).save_pretrained(folder / "tokenizer")
    flags = [*as_flags(depth), "--tokenizer", folder / "tokenizer", "--cache_codes", 1, "--cache_dir", folder / "cache",
             "--batch_size", 8, "--num_val", 0]
    return flags, cost.parameters(model) * cost.TRAINED + 8 * cost.larp_ar_bytes(model.config)


def as_flags(options: dict) -> list:
    return [word for name, value in options.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize("script, make", [
    (train_coordtok, partial(coordtok, second=False)), (train_coordtok, partial(coordtok, second=True)),
    (train_sit, sit), (train_larp_tokenizer, larp_tokenizer), (train_ar, larp_ar),
], ids=["coordtok_1", "coordtok_2", "sit", "larp_tokenizer", "larp_ar"])
def test_memory_is_as_computed(monkeypatch, long_videos, tmp_path, script, make):
    """At the published widths, sequences and recipes, in bf16."""
    if not PUBLISHED:
        monkeypatch.setitem(SIT_SIZES, "SiT-L/2", {**SIT_SIZES["SiT-L/2"], "depth": 3})
    flags, computed = make(tmp_path)
    listed = [] if "--csv_file" in flags else ["--data_root", long_videos, "--video_name", "UCF-101_train"]
    folder = "--results_dir" if script is train_sit else "--save_dir"
    cuda, (before, peak) = second_step(monkeypatch, script, *flags, *listed, folder, tmp_path / "runs")
    print(f"{computed / 2**30:.2f} GiB computed, {peak / 2**30:.2f} counted, {before / 2**30:.2f} between steps")
    assert not cuda.waits()
    assert peak == pytest.approx(computed, rel=0.2)


def test_a_code_takes_few_kernels_and_reads_weights_and_filled_cache_once(monkeypatch):
    """LARP-AR-LP, batch 64 with guidance, bf16, the cache half full. Triton's kernels do not run here: what stands for
    each has its shapes, and reads what it reads (`fused_decoding.py` holds that no more of the cache is)."""
    filled = 512

    def rms_norm(x, weight, eps):
        cuda.launch("rms_norm", size(x) + size(weight))
        return torch.empty_like(x)

    def silu_times(x):
        cuda.launch("silu_times", size(x))
        return x.new_empty(len(x), x.shape[1] // 2)

    def attend(qkv, cache, position, splits):
        cuda.launch("attend", size(qkv) + size(cache[:, : len(qkv), :, :filled]))
        if splits > 1:
            cuda.launch("merge", 0)
        heads = qkv.shape[1] // cache.shape[-1] - 2 * cache.shape[2]
        return qkv.new_empty(len(qkv), heads * cache.shape[-1])

    for kernel in (rms_norm, silu_times, attend):
        monkeypatch.setattr(decode_kernels, kernel.__name__, kernel)
    with fake_cuda() as cuda, torch.no_grad():
        device = torch.device("cuda", 0)
        with device:
            model = LARPGenerator(**SIZES["llama-abs-LP"]).to(torch.bfloat16).eval()
        cache, draws = KVCache(model.config, 128, torch.bfloat16, device), Draws(64, 1024, device)
        cache.read_weights(model)
        cuda.kernels.clear()
        cuda.read_bytes, cuda.counting = 0, True
        sampling = Sampling(cfg_scale=1.25, num_guided=1024)
        draws.add(decode_fused(model, cache, draws.last, draws.position), sampling)
        weights = sum(size(p) for name, p in model.named_parameters() if "embed" not in name and name != "abs_pe")
        expected = weights + size(cache.buffer[:, :, :, :, :filled])
    assert not cuda.waits()
    print(cuda.kernels, f"{cuda.read_bytes / 1e9:.2f} GB read, {expected / 1e9:.2f} GB of weights and filled cache")
    assert sum(cuda.kernels.values()) <= 350
    assert cuda.read_bytes == pytest.approx(expected, rel=0.05)
