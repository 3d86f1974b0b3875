"""The largest micro-batch that fits the memory (--micro_batch auto), found at the start of a run by trying steps."""
import contextlib
import importlib
import multiprocessing
import os
import re
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import distributed
from common.cli import one_line
from common.console import print_main
from models.checkpoint_files import list_checkpoints
from models.checkpoint_files import load as load_checkpoint

RESERVE = 0.05  # of a GPU's memory that a tried step leaves, for what grows later


def fit_micro_batch(args: Namespace, folder: Path, attempt: Callable[[Namespace], str | None] | None = None) -> None:
    """Set args.accum_iter so that a step fits: from the flag's value on, micro-batches are halved while a tried step
    runs out of memory. A run that resumes keeps the value of its checkpoint.

    Every process must call this; the first one tries. attempt: tries a step with such flags, and returns None where it
    fits, or the line that says what memory lacked. Raises ValueError where not even one clip at a time fits, or the
    batch cannot be shared equally.
    """
    if args.resume and (held := resumed(args, folder)):
        args.accum_iter = held
        return
    if getattr(args, "fsdp", False):
        raise ValueError("--micro_batch auto tries a step of one process, but --fsdp shares the model out: leave one "
                         "of them out")
    share = args.batch_size // distributed.world_size()
    micro = share // args.accum_iter
    if args.batch_size % (distributed.world_size() * args.accum_iter) or not micro:
        raise ValueError(f"--batch_size {args.batch_size} does not divide by {distributed.world_size()} processes "
                         f"times --accum_iter {args.accum_iter}: change one of them")
    outcome: int | str = search(args, share, micro, attempt or try_step) if distributed.is_main() else 0
    outcome = distributed.broadcast(outcome)
    if isinstance(outcome, str):
        raise ValueError(outcome)
    args.accum_iter = share // outcome
    print_main(f"--micro_batch auto: {outcome} clips at a time fit, --accum_iter is {args.accum_iter}")


def resumed(args: Namespace, folder: Path) -> int | None:
    """--accum_iter of the checkpoint that the run in `folder` continues; None where there is none."""
    source = folder / "checkpoints" if args.resume == "auto" else args.resume
    if args.resume == "auto" and not list_checkpoints(Path(source)):
        return None
    return load_checkpoint(source, mmap=True)["args"]["accum_iter"]


def search(args: Namespace, share: int, micro: int, attempt: Callable[[Namespace], str | None]) -> int | str:
    """The number of clips at a time that fit, or the error. share: clips of a process. micro: the first number tried.
    The numbers tried divide the share, and each is at most half the one before."""
    while True:
        tried = {**vars(args), "batch_size": micro, "accum_iter": 1, "micro_batch": "off", "resume": None}
        try:
            lacked = attempt(Namespace(**tried))
        except ValueError as error:
            return str(error)
        if lacked is None:
            return micro
        if micro == 1:
            return f"--micro_batch auto: not even one clip at a time fits ({lacked}); try --gradient_checkpointing"
        micro = max(size for size in range(1, micro // 2 + 1) if share % size == 0)


def try_step(args: Namespace) -> str | None:
    """Train one step with these flags in a process of its own, whose memory is free afterwards, in a temporary folder.
    As `attempt` of `fit_micro_batch`; ValueError where the step ends with another error."""
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        flags = {**vars(args), "save_dir": folder, "exp_name": "try", "num_iters": 1, "num_val": 0, "num_samples": 0,
                 "stat_clips": 1, "disc_start": 0.0, "d_update_freq": 1, "wandb": "disabled"}
        flags = {name: value for name, value in flags.items() if name in args}
        if distributed.world_size() > 1:  # all processes fill the caches later; with them less memory is needed
            flags |= {name: type(flags[name])(0) for name in flags if name in CACHES}
        # The child is no daemon, as its loader has workers.
        child = spawn.Process(target=_train, args=(Path(sys.argv[0]).stem, Namespace(**flags), answers))
        child.start()
        child.join()
        answer = None if answers.empty() else answers.get()
    if child.exitcode == 0 and answer is None:
        return None
    if answer is None:  # killed by the system, which is out of memory
        return f"the step was killed, exit code {child.exitcode}"
    kind, line = answer
    if kind == "memory":
        return line
    raise ValueError(f"--micro_batch auto: the step that was tried has failed: {line}")


CACHES = ("cache_clips", "cache_latents", "cache_codes")


def _train(script: str, args: Namespace, answers) -> None:
    """Run the entry script's main with these flags, without torchrun and checkpoints; put (kind, text) of an error."""
    for name in list(os.environ):
        if name.startswith("TORCHELASTIC_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
    from training import checkpoint

    main = importlib.import_module(script).main
    home: Any = sys.modules[main.__module__]
    home.parse_args = lambda: args
    checkpoint.save_run = lambda *_, **__: None
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1 - RESERVE)
    with open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        try:
            main()
        except Exception as error:
            lacks = isinstance(error, torch.OutOfMemoryError | MemoryError) or re.search("allocate memory", str(error))
            answers.put(("memory" if lacks else "other", one_line(error) or repr(error)))
        finally:
            distributed.teardown()
