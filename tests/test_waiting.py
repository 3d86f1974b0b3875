"""No training step waits for the device: reading a value of a tensor would stall a GPU, at every step."""
import traceback
from collections import Counter

import pytest
import torch
from helpers import TINY_COORDTOK, run_here, tiny_larp
from torch.utils._python_dispatch import TorchDispatchMode

import train_ar
import train_coordtok
import train_larp_tokenizer
import train_sit

WAITING = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
           torch.ops.aten.equal, torch.ops.aten.unique_dim, torch.ops.aten._unique2}


class Waits(TorchDispatchMode):
    """Counts the operations whose outcome the host must know, by the line that asks for it."""

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in WAITING:
            frames = reversed(traceback.extract_stack()[:-1])
            place = next(frame for frame in frames if "site-packages" not in frame.filename)
            if 'batch["' not in place.line:  # what the loader brings is on the host
                self.places[f"{place.filename}:{place.lineno} {place.line}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def scripts(data, coordtok, tmp_path) -> dict:
    """{name: (script, flags)}, the flags with whatever happens at every step."""
    tiny_larp(32, 8, 12).save_pretrained(tmp_path / "tokenizer")
    files = ["--data_root", data, "--num_val", 0, "--log_every", 100]
    larp = "--input_size 32 --frame_num 8 --bottleneck_token_num 16 --codebook_size 64 --encoder_hidden_size 32 " \
        "--decoder_hidden_size 32 --encoder_num_heads 2 --decoder_num_heads 2 --encoder_depth 1 --decoder_depth 1 " \
        "--prior_model gptc-XXS --disc_hidden_size 32 --disc_n_heads 2 --disc_n_layers 1 --lpips_weights random " \
        "--d_update_freq 1 --ema_decays 0.9 --flip --batch_size 2 --video_name UCF-101_train".split()
    ar = ["--tokenizer", tmp_path / "tokenizer", "--dim", 32, "--n_layer", 2, "--n_head", 2, "--multiple_of", 8,
          "--batch_size", 2, "--video_name", "UCF-101_train", "--accum_iter", 2, "--flip", "--ema_decays", 0.9]
    sit = ["--first_model_ckpt", coordtok / "checkpoints", "--model", "SiT-XS/4", "--global_batch_size", 2]
    cached = ["--cache_dir", tmp_path / "cache"]
    return {
        "coordtok_1": (train_coordtok, [*TINY_COORDTOK, *files, "--point_per_vid", 16, "--accum_iter", 2]),
        "coordtok_2": (train_coordtok, [*TINY_COORDTOK, *files, "--lpips_loss_scale", 1, "--lpips_weights", "random"]),
        "sit": (train_sit, [*files, *sit, "--accum_iter", 2]),
        "sit_cached": (train_sit, [*files, *sit, "--cache_latents", 1, *cached]),
        "larp_tokenizer": (train_larp_tokenizer, [*files, *larp]),
        "larp_ar": (train_ar, [*files, *ar]),
        "larp_ar_cached": (train_ar, [*files, *ar, "--cache_codes", 1, *cached]),
    }


@pytest.mark.parametrize(
    "name", ["coordtok_1", "coordtok_2", "sit", "sit_cached", "larp_tokenizer", "larp_ar", "larp_ar_cached"]
)
def test_no_step_waits(scripts, monkeypatch, tmp_path, name):
    script, flags = scripts[name]
    folder = "--results_dir" if script is train_sit else "--save_dir"
    run_here(monkeypatch, script, *flags, "--num_iters", 1, folder, tmp_path / "warm")  # fills caches
    counts = []
    for steps in (1, 3):  # three steps are an epoch
        with Waits() as waits:
            run_here(monkeypatch, script, *flags, "--num_iters", steps, folder, tmp_path / str(steps))
        counts.append(waits.places)
    assert counts[1] - counts[0] == Counter()
