"""A run's folder, its log (args.json, metrics.jsonl, the console, wandb if asked for), and what guards its loop."""
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
from typing import Any, Literal, NoReturn, TextIO

import torch
from torch import Tensor, nn

from common import distributed
from common.console import Progress, print_main
from common.errors import reading
from common.files import atomic_write, claim, git_revision
from data.clips import Quarantine
from eval.report import as_json

WandbMode = Literal["online", "offline", "disabled"]


def claim_run(folder: Path) -> None:
    """Reserve a run's folder until this run ends. Raises ValueError, naming the other run, if one uses it; OSError if
    the folder cannot be written to."""
    error = None
    if distributed.is_main():
        try:
            check_writable(folder)
            claim(folder / ".lock", f"{folder} is in use")
        except (ValueError, OSError) as caught:
            error = caught
    if any(distributed.any_rank(error is not None)):
        raise error or SystemExit(1)  # rank 0 prints the error


def wandb_id(folder: Path) -> str:
    """wandb's id of a run. It depends on the folder alone, so a resumed run continues the same one."""
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]


def check_writable(folder: Path) -> None:
    """Make a run's folder and try to write to it, before hours of work. Raises OSError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(2**16))
    except OSError as error:
        raise OSError(f"cannot write to the run's folder {folder}: {error.strerror}; make room, or choose another "
                      "--save_dir or --exp_name") from error


def start_log(args: Namespace, folder: Path, start: int, total: int, what: str) -> "RunLog":
    """Print a line about `what` is trained, and open the log of a run from step `start` to step `total`."""
    processes = distributed.world_size()
    print_main(f"{what}; {processes} processes x {args.batch_size // processes} clips; step {start} of {total}")
    return RunLog(folder, vars(args), start, total, args.batch_size, args.wandb)


def count_parameters(model: nn.Module) -> str:
    """The number of a model's parameters, as text, and of those that are trained where some are frozen."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{total:,} parameters" + (f", {trained:,} of them trained" if trained < total else "")


def due(step: int, every: int, last: int) -> bool:
    """Whether something is due after `step` that happens every `every` steps and after the last one."""
    return step > 0 and (step % every == 0 or step == last)


class RunLog:
    """Writes the log on rank 0; silent on other ranks. Also handles the signals that stop a run (see StopSignal).

    folder: the run's folder. args: effective arguments, saved as args.json. start: the step that the run starts or
    resumes from. Metrics of later steps, written by a run that was killed, are dropped, since they will be written
    again.
    """

    def __init__(self, folder: Path, args: dict, start: int, total: int, samples_per_step: int, wandb_mode: WandbMode):
        self.folder, self.samples_per_step = folder, samples_per_step
        self.start, self.step, self.total, self.waiting = start, start, total, 0.0
        self.stop = StopSignal()
        self.clock = time.perf_counter()
        self.main = distributed.is_main()
        # In a terminal the bar shows the metrics; in a file they are lines of their own.
        self.bar = Progress(desc="training", total=total, initial=start, disable=not self.main, unit="steps")
        self.shown = ""  # the newest of them
        self.file: TextIO | None = None
        self.wandb: Any = None
        kept = self.open(args, wandb_mode) if self.main else []
        # What is logged already for the step that the run resumes from: {kind: values}.
        lines = [line for line in map(json.loads, kept) if line["step"] == start]
        self.known = distributed.broadcast({line.pop("kind"): line for line in lines})

    def open(self, args: dict, wandb_mode: WandbMode) -> list[str]:
        """Rank 0's part. Returns the lines of metrics.jsonl that stay."""
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"git_revision": git_revision(), "world_size": distributed.world_size(), "torch": torch.__version__}
        with atomic_write(folder / "args.json", "w") as file:
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
        with atomic_write(path, "w") as file:
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
        """`StopSignal.next`, timed: the time counts as waiting for data in the next `train` line."""
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
        self.shown = f"step {step}: {text}"
        if self.bar.terminal:
            self.bar.set_postfix_str(text)
        else:
            print_main(self.shown)
        self.write(step, "train", **values, **speed)

    def scores(self, step: int, kind: str, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Compute, write and print the scores after a step, whose checkpoint has been saved.

        A run that resumes from this step takes the scores from its log if they are there. So a run killed between
        saving and scoring computes them when it resumes, and no run computes them twice. The random state is restored
        afterwards, so that training does not depend on when scores are computed.
        """
        if step == self.start and kind in self.known:
            return self.known[kind]
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            values = compute()
        self.write(step, kind, **values)
        said = "".join(f", {name} {value:.4g}" for name, value in values.items())
        print_main(f"step {step}, {kind}{said or ': pictures alone, no scores'}")
        return values

    def write(self, step: int, kind: str, **values) -> None:
        """Append {"step", "kind", values...} to metrics.jsonl, null where a value is not finite, and to wandb."""
        if self.file is None:
            return
        self.file.write(json.dumps({"step": step, "kind": kind, **as_json(values)}, allow_nan=False) + "\n")
        if self.wandb:
            self.wandb.log({f"{kind}/{k}": v for k, v in values.items()}, step=step)

    def make_up(self, scores: list[tuple[Callable[[int], None], int]]) -> None:
        """Compute the scores that were due after the step that the run resumes from, if it was killed before them.

        scores: as in `end_step`.
        """
        for score, every in scores:
            if due(self.start, every, self.total):
                score(self.start)

    def end_step(self, step: int, save: Callable[[int], None], save_every: int,
                 scores: list[tuple[Callable[[int], None], int]]) -> None:
        """Do what is due after a step. Saves first and then computes scores, so a run that is killed while scoring
        loses nothing. After a signal it saves and ends the run.

        scores: pairs of a function of the step, and the number of steps between its calls.
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
        """Close the log, and print where damaged files are listed and where the checkpoints are."""
        self.close()
        if len(quarantine):
            print_main(f"{len(quarantine)} damaged files are listed in {quarantine.path}")
        print_main(f"checkpoints: {self.folder / 'checkpoints'}")

    def close(self) -> None:
        self.bar.close()
        if self.bar.terminal and self.shown:  # the bar is gone
            print_main(self.shown)
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


class StageClock:
    """Measures how much of a loop's time each stage takes, without waiting for the device.

    On a GPU the marks are CUDA events, so a stage lasts until the GPU has finished it. Work that the host does while
    the GPU is busy counts as nothing; time that the GPU spends waiting counts.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, Any]] = []  # an event of the device's, or a time in seconds
        self.mark("start")

    def mark(self, stage: str) -> None:
        """Mark the end of a stage, which began at the previous mark."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((stage, event))
        else:
            self.marks.append((stage, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, in the order in which they first ended. Waits for the last stage to end."""
        on_gpu = self.device.type == "cuda"
        seconds: dict[str, float] = collections.defaultdict(float)
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
    """Peak memory: of the GPU if `device` is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class NonFiniteGuard:
    """Stops a run whose loss is not finite, naming the step, the rank and the files.

    `watch` records on the device the first step with such a loss, without waiting for the device. `check` reads the
    record, which waits: call it where values are read anyway, and before a checkpoint is written.
    """

    def __init__(self, device: torch.device):
        self.first = torch.full((), -1, dtype=torch.long, device=device)
        self.files: list[tuple[int, list[str]]] = []

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


GRACE = 10.0  # seconds to wait for a batch after a signal


class NoBatchError(BaseException):
    """No batch came in time. Not an Exception, so that the waiting loader does not catch it."""


class StopSignal:
    """Remembers a SIGTERM or Ctrl-C, so that the loop can save and end between two steps. A second Ctrl-C ends the
    process at once.

    `next` saves the run if the loader fails or hangs, so that no step is lost to that either.
    """

    def __init__(self) -> None:
        self.received, self.told, self.waiting = 0, False, False
        self.first: int | None = None
        self.died: Exception | None = None
        self.torch_handler: Callable | None = None
        signal.signal(signal.SIGTERM, self.receive)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # it is ignored in background jobs of a script
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
        """The next batch, for `step`; every process calls it. If the loader of one process fails, or gives no batch for
        GRACE seconds after a signal, the state after the previous step is saved and the run ends."""
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
        if step > self.first:  # otherwise nothing was trained since the last checkpoint
            save(step - 1)
        if isinstance(error, Exception):
            raise error
        if error is None and not self.received:
            sys.exit(1)  # the process whose loader failed prints the error
        return self.leave(step - 1, saved=step > self.first)

    def _defer_deaths(self) -> None:
        """Defer torch's error of a dead worker to the next request for a batch. torch raises it from a signal handler,
        so it could interrupt a step."""
        handler = signal.getsignal(signal.SIGCHLD)
        owner = getattr(handler, "__self__", None)
        if callable(handler) and owner is not self:
            self.torch_handler = owner.torch_handler if isinstance(owner, StopSignal) else handler
            signal.signal(signal.SIGCHLD, self._worker_died)

    def _worker_died(self, *args) -> None:
        try:
            if self.torch_handler:
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
        """End with the exit code of the signal, so that a calling script does not use the unfinished model."""
        number = self.received or signal.SIGTERM
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        print_main(f"{name}: {'saved' if saved else 'left at'} step {step}; go on with --resume auto")
        distributed.teardown()
        sys.exit(128 + number)

