"""Shared fixtures. The sample clips stand beside the repository and are optional."""
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TINY_COORDTOK, run, tiny_larp

import train_ar
import train_coordtok
import train_larp_tokenizer
import train_sit
from data.video import write_video

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


# The files that take longest: they start first, so that no process waits long for the other at the end.
SLOWEST = ("test_fake_cuda", "test_train_larp_tokenizer", "test_train_coordtok", "test_train_sit", "test_train_ar",
           "test_tune", "test_runs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


@pytest.fixture(scope="session")
def clips() -> Path:
    """Folder of real video files."""
    if not (SHARED / "clips").is_dir():
        pytest.skip("../shared/clips is not here")
    return SHARED / "clips"


class Reference:
    """Cases computed by the authors' implementations (see tests/reference/README.md)."""

    def __init__(self, folder: Path):
        spec = importlib.util.spec_from_file_location("fill", folder / "fill.py")
        fill = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(fill)
        self.folder, self.noise, self.state_dict = folder, fill.noise, fill.filled_state_dict

    def case(self, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
        """(description, tensors) of a case."""
        from safetensors.torch import load_file

        tensors = self.folder / f"{name}.safetensors"
        return json.loads((self.folder / f"{name}.json").read_text()), load_file(tensors) if tensors.exists() else {}


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference(ROOT / "tests" / "reference")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A tiny data set under UCF-101's names: 6 training and 4 test videos of two classes, 6 to 12 frames of 64x48."""
    root = tmp_path_factory.mktemp("data")
    flags = "--classes PanLeft ZoomIn --groups 1 2 8 9 10 --clips 1 --size 64x48 --min_frames 6 --max_frames 12".split()
    run("data/demo.py", "--root", root, *flags)
    run("data/split_ucf.py", "--data_root", root, "--data_name", "UCF-101")
    return root


@pytest.fixture(scope="session")
def coordtok(data, tmp_path_factory) -> Path:
    """The folder of a CoordTok run: six steps of pixels on `data`, in one process."""
    logs = tmp_path_factory.mktemp("logs")
    run("train_coordtok.py", "--data_root", data, "--save_dir", logs, "--exp_name", "one", "--num_iters", 6,
        "--point_per_vid", 16, "--lpips_loss_scale", "0.0", *TINY_COORDTOK)
    return logs / "one"


@pytest.fixture
def scripts(data, coordtok, tmp_path) -> dict:
    """{name: (script, flags)}, the flags with whatever happens at every step."""
    tiny_larp(32, 8, 12).save_pretrained(tmp_path / "tokenizer")
    files = ["--data_root", data, "--num_val", 0, "--log_every", 100]
    larp = "--input_size 32 --frame_num 8 --bottleneck_token_num 16 --codebook_size 64 --encoder_hidden_size 32 " \
        "--decoder_hidden_size 32 --encoder_num_heads 2 --decoder_num_heads 2 --encoder_depth 1 --decoder_depth 1 " \
        "--prior_model gptc-tiny --disc_hidden_size 32 --disc_n_heads 2 --disc_n_layers 1 --lpips_weights random " \
        "--d_update_freq 1 --ema_decays 0.9 --flip --batch_size 2 --accum_iter 2 --video_name UCF-101_train".split()
    ar = ["--tokenizer", tmp_path / "tokenizer", "--dim", 32, "--n_layer", 2, "--n_head", 2, "--multiple_of", 8,
          "--batch_size", 2, "--video_name", "UCF-101_train", "--accum_iter", 2, "--flip", "--ema_decays", 0.9]
    sit = ["--first_model_ckpt", coordtok / "checkpoints", "--model", "SiT-XS/4", "--global_batch_size", 2]
    cached = ["--cache_dir", tmp_path / "cache"]
    return {
        "coordtok_1": (train_coordtok, [*TINY_COORDTOK, *files, "--point_per_vid", 16, "--accum_iter", 2]),
        "coordtok_2": (train_coordtok, [*TINY_COORDTOK, *files, "--point_per_vid", 16, "--is_second_step",
                                        "--first_step_ckpt", coordtok / "checkpoints", "--lpips_weights", "random"]),
        "sit": (train_sit, [*files, *sit, "--accum_iter", 2]),
        "sit_cached": (train_sit, [*files, *sit, "--cache_latents", 1, *cached]),
        "larp_tokenizer": (train_larp_tokenizer, [*files, *larp]),
        "larp_ar": (train_ar, [*files, *ar]),
        "larp_ar_cached": (train_ar, [*files, *ar, "--cache_codes", 1, *cached]),
    }


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Three videos, of 20, 9 and 14 frames and two sizes; frame t of video i is grey 10 t + 3 i."""
    root = tmp_path_factory.mktemp("videos")
    for i, length in enumerate((20, 9, 14)):
        grey = (torch.arange(length) * 10 + 3 * i).view(1, length, 1, 1) / 255
        write_video(root / f"{i}.mp4", grey.expand(3, length, 32, 32 + 8 * (i // 2)))
    return root


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    """The same three, and two that cannot be opened."""
    shutil.copytree(folder, tmp_path / "root")
    (tmp_path / "root" / "a.avi").write_text("not a video")
    (tmp_path / "root" / "b.avi").touch()
    return tmp_path / "root"


# Tiny tensors: threads that wait for one another on a busy machine make them many times slower.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
