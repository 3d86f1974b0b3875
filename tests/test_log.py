import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.loader import Loader, init_worker
from tests.helpers import ROOT, run
from training.log import NonFiniteGuard, RunLog, StageClock, StopSignal

CPU = torch.device("cpu")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resuming_drops_what_a_killed_run_wrote_beyond_its_checkpoint(tmp_path):
    log = RunLog(tmp_path, {"lr": 1}, start=0, total=9, samples_per_step=2, wandb_mode="disabled")
    for step in range(1, 6):
        log.train(step, CPU, loss=step / 10)
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "ki')  # killed in the middle of a line
    log = RunLog(tmp_path, {"lr": 1}, start=3, total=9, samples_per_step=2, wandb_mode="disabled")
    log.train(4, CPU, loss=0.4)
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert {"loss", "samples_per_s", "data_wait", "memory_gib"} <= lines(tmp_path)[-1].keys()
    assert json.loads((tmp_path / "args.json").read_text())["lr"] == 1


def test_runs_of_one_name_are_two_to_wandb(tmp_path, monkeypatch):
    """wandb goes on with the run that has the id: another folder's would be continued, and lower steps dropped."""
    given = []
    fake = SimpleNamespace(init=lambda **options: given.append(options) or SimpleNamespace(finish=list))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "a" / "run", tmp_path / "b" / "run", Path("a/run"), Path("b/../a/run")):
        RunLog(folder, {}, start=0, total=9, samples_per_step=2, wandb_mode="offline").close()
    ids = [options["id"] for options in given]
    assert ids[0] != ids[1] and ids[2:] == [ids[0]] * 2
    assert all(re.fullmatch(r"[0-9a-f]{16}", each) for each in ids)
    assert {options["name"] for options in given} == {"run"}


def test_metrics_are_json(tmp_path):
    log = RunLog(tmp_path, {}, start=0, total=9, samples_per_step=2, wandb_mode="disabled")
    log.write(1, "val", rfvd=1.5, rfvd_floor=math.nan, psnr_clip=math.inf)
    log.close()
    (line,) = lines(tmp_path)
    assert line["rfvd"] == 1.5 and line["rfvd_floor"] is None and line["psnr_clip"] is None
    assert line["rfvd_floor_note"] == "not defined for fewer than four clips"


def test_guard_names_the_first_bad_step_and_its_files():
    guard = NonFiniteGuard(CPU)
    guard.watch(1, torch.tensor(1.0), ["a.avi"])
    guard.check()
    guard.watch(2, torch.tensor(float("nan")), ["b.avi", "c.avi"])
    guard.watch(3, torch.tensor(float("inf")), ["d.avi"])
    with pytest.raises(FloatingPointError, match="not finite at step 2 on rank 0; its batch: b.avi, c.avi;"):
        guard.check()


def test_stages_share_the_time(monkeypatch):
    times = iter([10.0, 11.0, 14.0, 14.5, 15.5, 18.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = StageClock(CPU)
    for stage in ("loading", "computing", "loading", "computing", "writing"):
        clock.mark(stage)
    assert clock.seconds() == {"loading": 1.5, "computing": 4, "writing": 2.5}
    assert str(clock) == "8.0 s: loading 19 %, computing 50 %, writing 31 %"


# --- leaving ---

@pytest.fixture
def stop():
    """With the handlers of this process put back afterwards."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    yield StopSignal()
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def never():
    yield 1
    yield 2
    time.sleep(60)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_loop_that_waits_for_data(stop, monkeypatch, capsys, number, code):
    monkeypatch.setattr("training.log.GRACE", 0.1)
    saved, batches = [], never()
    assert [stop.next(batches, step, saved.append) for step in (5, 6)] == [1, 2]
    threading.Timer(0.1, os.kill, [os.getpid(), number]).start()
    with pytest.raises(SystemExit) as left:
        stop.next(batches, 7, saved.append)
    assert left.value.code == code and saved == [6] and "saved step 6; go on with --resume" in capsys.readouterr().out


def test_a_batch_that_comes_in_time_is_used(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.next(iter([3]), 1, None) == 3 and stop.anywhere()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_what_is_done_is_saved_before_a_loader_s_error(stop):
    def fails():
        yield 1
        raise OSError("the disk is away")

    saved, batches = [], fails()
    stop.next(batches, 1, saved.append)
    with pytest.raises(OSError, match="the disk is away"):
        stop.next(batches, 2, saved.append)
    assert saved == [1]


def test_a_worker_that_dies_does_not_end_a_step(stop):
    """torch raises wherever the process is: here in the middle of a step, whose work would be lost."""
    loader = Loader(range(100), num_workers=1, worker_init_fn=init_worker, batch_size=None)
    others = set(multiprocessing.active_children())
    saved, batches = [], iter(loader)
    assert stop.next(batches, 1, saved.append) == 0
    assert stop.next(batches, 2, saved.append) == 1
    worker, = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGKILL)
    for _ in range(50):
        time.sleep(0.01)  # the step
    with pytest.raises(ChildProcessError, match="DataLoader worker .pid.* killed by signal"):
        for step in range(3, 9):
            stop.next(batches, step, saved.append)
    assert saved and saved[0] >= 2


def test_a_second_ctrl_c_ends_at_once(stop):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    loop = tmp_path / "loop.py"
    loop.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from common import distributed
from training.log import StopSignal
distributed.setup("cpu")
stop = StopSignal()
for step in range(1, 10):
    if step == 3 and distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    stop.next(iter([step]), step, None)
    if stop.anywhere():
        os.write(1, b"stopped after %d\\n" % step)  # one write: the lines of two processes do not mix
        break
distributed.teardown()
""")
    assert run(str(loop), processes=2).stdout.count("stopped after 3") == 2
