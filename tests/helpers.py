"""Running the scripts as users do."""
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from common import distributed
from common.cli import one_line_errors
from data.clips import ClipDataset
from data.lists import list_folder
from models.larp_tokenizer import LARPTokenizer

ROOT = Path(__file__).parents[1]
LONG = pytest.mark.skipif("VT_LONG_TESTS" not in os.environ, reason="takes a minute or more: VT_LONG_TESTS=1 runs it")
TINY_COORDTOK = (
    "--num_frames 8 --img_size 32 --enc_embed_dim 32 --enc_num_layers 1 --enc_num_heads 2 --enc_patch_size_xy 8 "
    "--enc_patch_size_t 4 --enc_patch_num_layers 1 --latent_resolution_xy 8 --latent_resolution_t 8 "
    "--latent_n_features 4 --latent_patch_size_xy 4 --latent_patch_size_t 4 --dec_embed_dim 32 --dec_num_layers 1 "
    "--dec_num_heads 2 --num_views 4 --num_workers 1 --num_val 0 --log_every 1"
).split()


def tiny_larp(input_size: int, frame_num: int, bottleneck_token_num: int, codebook_size: int = 64) -> LARPTokenizer:
    """An untrained LARP tokenizer in evaluation mode, whose codes depend on the clip, and whose clips on the codes."""
    torch.manual_seed(0)
    args = {"bottleneck_dim": 4, "regularizer": {"args": {"codebook_size": codebook_size}}}
    tokenizer = LARPTokenizer(
        input_size=input_size, frame_num=frame_num, bottleneck_token_num=bottleneck_token_num,
        bottleneck={"args": args}, prior_model={"name": "none"}, encoder_hidden_size=16, decoder_hidden_size=16,
        encoder_num_heads=2, decoder_num_heads=2, encoder_depth=1, decoder_depth=1,
    ).eval()
    tokenizer.x_embedder.proj.weight.data.mul_(10)
    torch.nn.init.xavier_uniform_(tokenizer.final_layer.linear.weight)
    return tokenizer


def command(script: str, *flags, processes: int = 0) -> list[str]:
    """The command line: `python script flags`, or with torchrun in `processes` processes."""
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc_per_node={processes}"]
    return [*launch, script, *map(str, flags)]


def environment() -> dict[str, str]:
    # One thread a process: the tests compare numbers, and share two cores.
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(script: str, *flags, processes: int = 0, fails: bool = False) -> subprocess.CompletedProcess:
    """Run a script to its end, which must be a success, or with `fails` an error."""
    line = command(script, *flags, processes=processes)
    if processes:
        done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True)
    else:
        done = run_fork(line)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


@functools.cache
def fork_server() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, ROOT / "tests" / "fork_server.py"], env=environment(), text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def run_fork(line: list[str]) -> subprocess.CompletedProcess:
    """As subprocess.run of this command line with text and captured output, by tests/fork_server.py."""
    with tempfile.TemporaryDirectory() as folder:
        out = [os.path.join(folder, name) for name in ("out", "err")]
        job = {"argv": line[1:], "cwd": str(ROOT), "environ": environment(), "out": out}
        server = fork_server()
        print(json.dumps(job), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(line, code, *(Path(path).read_text() for path in out))


def run_bash(script: str, *flags, gpus: int) -> None:
    """Run a bash script to its end, which must be a success, in `gpus` processes."""
    done = subprocess.run(
        ["bash", script, *map(str, flags)], cwd=ROOT, env={**environment(), "GPUS": str(gpus)}, capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def start(script: str, *flags) -> subprocess.Popen:
    """Start a script in a session of its own, to be killed."""
    return subprocess.Popen(
        command(script, *flags), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait(running: subprocess.Popen, until: Callable[[], bool]) -> None:
    """Until the condition holds, or the script has ended."""
    while running.poll() is None and not until():
        time.sleep(0.001)


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line that a user's mistake gets."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return errors[0]


def run_here(monkeypatch, script: ModuleType, *flags) -> None:
    """Run an imported script's main in this process, without loader workers."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags), "--num_workers", "0"])
    try:
        script.main()
    finally:
        distributed.teardown()


def mistake(monkeypatch, capsys, script: ModuleType, *flags) -> str:
    """The one line that a user's mistake gets, as `run_here` runs the script."""
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        run_here(monkeypatch, script, *flags)
    assert stopped.value.code in (1, 2)  # 2: of the command line
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ")
    return errors[0]


def num_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def logged(run: Path, kind: str) -> dict[int, dict]:
    """{step: what a run's folder says of it}, of one kind of line."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["kind"] == kind}


def known(results: dict) -> dict:
    """The numbers of a report.json, without those that are null, and without notes."""
    return {name: value for name, value in results.items() if isinstance(value, int | float)}


def losses(run: Path, kind: str = "train") -> dict[int, float]:
    """{step: loss} of a run's folder."""
    return {step: line["loss"] for step, line in logged(run, kind).items()}


def dataset(root: Path, **options) -> ClipDataset:
    """Clips of the videos of a folder, 8 frames of 16x16 unless told."""
    return ClipDataset(list_folder(root), **{"num_frames": 8, "size": 16, "rule": "coordtok", **options})


def equal(one: dict, two: dict) -> bool:
    """Whether two samples or batches have the same content."""
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
