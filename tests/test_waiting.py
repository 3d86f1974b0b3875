"""No training step waits for the device: reading a value of a tensor would stall a GPU, at every step."""
import traceback
from collections import Counter

import pytest
import torch
from helpers import run_here
from torch.utils._python_dispatch import TorchDispatchMode

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
