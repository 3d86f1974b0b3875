import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from training.log import NonFiniteGuard, RunLog, StageClock

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
