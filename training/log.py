"""A run's folder and what it says: arguments, metrics.jsonl, the console, wandb where asked; the guards of the loop."""
import collections
import hashlib
import itertools
import json
import os
import resource
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import distributed
from common.console import print_main
from common.errors import reading
from common.files import claim, git_revision, write_whole
from data.clips import Quarantine
from eval.report import as_json


def claim_run(folder: Path) -> None:
    """Keep a run's folder for this run, until it ends. ValueError where another run has it, which it names; OSError
    where it cannot be written to."""
    error = None
    if distributed.is_main():
        try:
            check_writable(folder)
            claim(folder / ".lock", f"{folder} is in use")
        except (ValueError, OSError) as caught:
            error = caught
    if any(distributed.any_rank(error is not None)):
        raise error or SystemExit(1)  # one line is enough


def wandb_id(folder: Path) -> str:
    """What wandb knows a run by: the same each time that it goes on, and another for each folder."""
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]


def check_writable(folder: Path) -> None:
    """Make a run's folder and try to write to it, before anything takes hours. OSError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(2**16))
    except OSError as error:
        raise OSError(f"cannot write to the run's folder {folder}: {error.strerror}; make room, or choose another "
                      "--save_dir or --exp_name") from error


def start_log(args: Namespace, folder: Path, start: int, total: int, what: str) -> "RunLog":
    """Print `what` is trained and how, and open the log of a run that goes from step `start` to step `total`."""
    processes = distributed.world_size()
    print_main(f"{what}; {processes} processes x {args.batch_size // processes} clips; step {start} of {total}")
    return RunLog(folder, vars(args), start, total, args.batch_size, args.wandb)


def count_parameters(model: nn.Module) -> str:
    """The number of a model's parameters, as text."""
    return f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"


def due(step: int, every: int, last: int) -> bool:
    """Whether to do after `step` what is done every `every` steps and after the last one."""
    return step > 0 and (step % every == 0 or step == last)


class RunLog:
    """Writes on rank 0 and is silent elsewhere. It also minds the signals that stop a run, from its start on.

    folder: the run's folder. args: effective arguments, saved as args.json. start: the step the run (re)starts from;
    metrics that a killed run wrote beyond it are dropped, for they are about to be written again.
    """

    def __init__(self, folder: Path, args: dict, start: int, total: int, samples_per_step: int, wandb_mode: str):
        self.folder, self.samples_per_step = folder, samples_per_step
        self.start, self.step, self.total, self.waiting = start, start, total, 0.0
        self.stop = StopSignal()
        self.clock = time.perf_counter()
        self.main = distributed.is_main()
        # In a terminal a bar; in a file a line each time metrics are written.
        quiet = None if self.main else True
        self.bar = tqdm(total=total, initial=start, disable=quiet, unit="step", dynamic_ncols=True)
        self.file = self.wandb = None
        kept = self.open(args, wandb_mode) if self.main else []
        # What the log has of the step that the run goes on from: {kind: its values}.
        lines = [line for line in map(json.loads, kept) if line["step"] == start]
        self.known = distributed.broadcast({line.pop("kind"): line for line in lines})

    def open(self, args: dict, wandb_mode: str) -> list[str]:
        """Rank 0's part. Returns the lines of metrics.jsonl that stay."""
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"git_revision": git_revision(), "world_size": distributed.world_size(), "torch": torch.__version__}
        with write_whole(folder / "args.json", "w") as file:
            file.write(json.dumps({**args, **facts}, indent=2, default=str) + "\n")
        path = folder / "metrics.jsonl"
        kept = []
        if self.start and path.exists():
            # A line cut short by a kill is dropped with the rest.
            lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            for number, line in enumerate(lines, 1):
                with reading(path, "a run's metrics", f"delete or mend line {number}, or move the file away"):
                    if json.loads(line)["step"] <= self.start:
                        kept.append(line.decode())
        with write_whole(path, "w") as file:
            file.write("".join(kept))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the run
        if wandb_mode != "disabled":
            import wandb

            self.wandb = wandb.init(
                project="video-tokenizers", name=folder.name, dir=folder, config=args, mode=wandb_mode,
                id=wandb_id(folder), resume="allow",
            )
        return kept

    def next(self, batches: Iterator, step: int, save: Callable[[int], None]):
        """The next batch, as `StopSignal.next` gives it. Its time counts as waiting in the next `train` line."""
        began = time.perf_counter()
        batch = self.stop.next(batches, step, save)
        self.waiting += time.perf_counter() - began
        return batch

    def train(self, step: int, device: torch.device, **values: float) -> None:
        """One line of training metrics with speed, memory and the share of time spent waiting for data."""
        now = time.perf_counter()
        seconds = now - self.clock
        speed = {
            "samples_per_s": (step - self.step) * self.samples_per_step / seconds,
            "data_wait": self.waiting / seconds,
            "memory_gib": memory_gib(device),
        }
        self.step, self.waiting, self.clock = step, 0.0, now
        text = ", ".join(f"{k} {v:.4g}" for k, v in {**values, **speed}.items())
        if self.bar.disable:
            print_main(f"step {step}: {text}")
        else:
            self.bar.set_postfix_str(text)
        self.write(step, "train", **values, **speed)

    def scores(self, step: int, kind: str, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Compute scores after a step, whose checkpoint is saved; write and print them. Where a run goes on from this
        step and has them in its log, they are taken from there: a run killed between the two makes up for them, and no
        other computes them twice. Training draws the same numbers with them as without."""
        if step == self.start and kind in self.known:
            return self.known[kind]
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            values = compute()
        self.write(step, kind, **values)
        print_main(f"step {step}, {kind}" + "".join(f", {name} {value:.4g}" for name, value in values.items()))
        return values

    def write(self, step: int, kind: str, **values) -> None:
        """Append {"step", "kind", values...} to metrics.jsonl, null where a value is not finite, and to wandb."""
        if not self.main:
            return
        self.file.write(json.dumps({"step": step, "kind": kind, **as_json(values)}, allow_nan=False) + "\n")
        if self.wandb:
            self.wandb.log({f"{kind}/{k}": v for k, v in values.items()}, step=step)

    def make_up(self, scores: list[tuple[Callable[[int], None], int]]) -> None:
        """Compute the scores that were due after the step the run goes on from, where it was stopped before them.
        scores: as `end_step` takes them."""
        for score, every in scores:
            if due(self.start, every, self.total):
                score(self.start)

    def end_step(self, step: int, save: Callable[[int], None], save_every: int,
                 scores: list[tuple[Callable[[int], None], int]]) -> None:
        """What is due after a step: save, then compute scores, so that a run killed meanwhile loses nothing. After a
        signal, save and leave.

        scores: (function of the step, steps between its calls) each.
        """
        self.bar.update()
        scoring = [score for score, every in scores if due(step, every, self.total)]
        stopping = self.stop.anywhere()
        if stopping or scoring or due(step, save_every, self.total):
            save(step)
        if stopping:
            self.close()
            self.stop.leave(step)
        for score in scoring:
            score(step)

    def finish(self, quarantine: Quarantine) -> None:
        """Close the log, and say which files were damaged and where the checkpoints are."""
        self.close()
        if len(quarantine):
            print_main(f"{len(quarantine)} damaged files, listed in {quarantine.path}")
        print_main(f"checkpoints: {self.folder / 'checkpoints'}")

    def close(self) -> None:
        self.bar.close()
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


class StageClock:
    """How the time of a loop is shared by its stages, found without waiting for the device.

    On a GPU the marks are events of its stream: a stage lasts until the GPU has come to its end, so that what the host
    does meanwhile takes no time, and what the GPU waits for does.
    """

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []
        self.mark("start")

    def mark(self, stage: str) -> None:
        """The end of a stage, which began at the mark before."""
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((stage, now))

    def seconds(self) -> dict[str, float]:
        """By stage, in the order of their first ends. Waits for the last one's."""
        on_gpu, seconds = self.device.type == "cuda", collections.defaultdict(float)
        if on_gpu:
            self.marks[-1][1].synchronize()
        for (_, start), (stage, end) in itertools.pairwise(self.marks):
            seconds[stage] += start.elapsed_time(end) / 1000 if on_gpu else end - start
        return dict(seconds)

    def __str__(self) -> str:
        """12.3 s: STAGE 81 %, STAGE 19 %"""
        seconds = self.seconds()
        total = sum(seconds.values())
        return f"{total:.1f} s: " + ", ".join(f"{stage} {100 * part / total:.0f} %" for stage, part in seconds.items())


def memory_gib(device: torch.device) -> float:
    """Peak memory: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class NonFiniteGuard:
    """Stops a run whose loss is no longer finite, naming the step, the rank and the files, without a sync per step.

    `watch` notes on the device the first step whose loss was not finite; `check` reads the note, so it waits for the
    device: call it where values are read anyway, and before a checkpoint is written.
    """

    def __init__(self, device: torch.device):
        self.first = torch.full((), -1, dtype=torch.long, device=device)
        self.files = collections.deque()

    def watch(self, step: int, loss: Tensor, files: list[str]) -> None:
        bad = ~torch.isfinite(loss.detach()) & (self.first < 0)
        self.first = torch.where(bad, step, self.first)
        self.files.append((step, files))

    def check(self) -> None:
        step = int(self.first)
        if step >= 0:
            files = sorted({file for at, files in self.files if at == step for file in files})
            raise FloatingPointError(
                f"the loss is not finite at step {step} on rank {distributed.rank()}; its batch: {', '.join(files)}; "
                "no checkpoint was written since: lower --lr, set --clip_grad, or use --precision fp32"
            )
        self.files.clear()


GRACE = 10.0  # seconds for which a batch is waited for once a signal has come


class NoBatchError(BaseException):
    """No batch came in time. Not an Exception, so that the loader that waits does not handle it."""


class StopSignal:
    """Remembers a SIGTERM or Ctrl-C, so that the loop can save and leave between two steps; a second Ctrl-C ends the
    process at once.

    `next` sees to it that a loader which fails or hangs costs no step either.
    """

    def __init__(self):
        self.received, self.told, self.waiting, self.first, self.died = 0, False, False, None, None
        signal.signal(signal.SIGTERM, self.receive)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is of a script's background jobs
            signal.signal(signal.SIGINT, self.receive)
        signal.signal(signal.SIGALRM, self.give_up)

    def receive(self, number: int, _) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self.waiting:
            signal.setitimer(signal.ITIMER_REAL, GRACE)

    def give_up(self, *_) -> None:
        if self.waiting:
            raise NoBatchError

    def next(self, batches: Iterator, step: int, save: Callable[[int], None]):
        """The next batch, for `step`; all processes call it. Where on one of them the loader fails, or after a signal
        gives none for GRACE seconds, the state after the step before is saved and the run ends."""
        self.first, batch, error = self.first or step, None, None
        self._defer_deaths()
        self.waiting = True
        try:
            if self.received:
                signal.setitimer(signal.ITIMER_REAL, GRACE)
            if self.died:
                raise self.died
            batch = next(batches)
        except (Exception, NoBatchError) as caught:
            error = caught
        finally:
            self.waiting = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        failed, self.told = distributed.any_rank(error is not None, self.received > 0)
        if not failed:
            return batch
        if step > self.first:  # else it is there, or nothing was done
            save(step - 1)
        if isinstance(error, Exception):
            raise error
        if error is None and not self.received:
            sys.exit(1)  # the process whose loader failed says so
        return self.leave(step - 1, saved=step > self.first)

    def _defer_deaths(self) -> None:
        """torch raises an error wherever the process is when a worker dies, in the middle of a step too. That waits
        until a batch is asked for."""
        handler = signal.getsignal(signal.SIGCHLD)
        owner = getattr(handler, "__self__", None)
        if callable(handler) and owner is not self:
            self.torch_handler = owner.torch_handler if isinstance(owner, StopSignal) else handler
            signal.signal(signal.SIGCHLD, self._worker_died)

    def _worker_died(self, *args) -> None:
        try:
            self.torch_handler(*args)
        except RuntimeError as error:
            if self.waiting:
                raise
            self.died = ChildProcessError(str(error).splitlines()[0])

    def anywhere(self) -> bool:
        """Whether any process was told to stop; all processes get the same answer. Several processes know of one
        another what `next` exchanged for this step: a step exchanges flags once."""
        return self.told if distributed.world_size() > 1 else self.received > 0

    def leave(self, step: int, saved: bool = True) -> NoReturn:
        """End with the exit code of the signal, so that a script does not go on with an unfinished model."""
        number = self.received or signal.SIGTERM
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        print_main(f"{name}: {'saved' if saved else 'left at'} step {step}; go on with --resume auto")
        distributed.teardown()
        sys.exit(128 + number)

