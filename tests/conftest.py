"""Shared fixtures. The reference cases and sample clips stand beside the repository and are optional."""
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers import TINY_COORDTOK, run

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def clips() -> Path:
    """Folder of real video files."""
    if not (SHARED / "clips").is_dir():
        pytest.skip("../shared/clips is not here")
    return SHARED / "clips"


class Reference:
    """Cases computed by the authors' implementations (see ../shared/reference/README.md)."""

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
    if not (SHARED / "reference").is_dir():
        pytest.skip("../shared/reference is not here")
    return Reference(SHARED / "reference")


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


# Tiny tensors: threads that wait for one another on a busy machine make them many times slower.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
