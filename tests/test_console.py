"""Progress in terminals and files, and the loader workers that fit a machine."""
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import warnings

import pytest
from helpers import ROOT, environment

from common import console
from common.cli import fitting_workers
from common.console import Progress, print_main
from data.loader import make_loader


def drive(monkeypatch, seconds: float, initial: int = 0, **options) -> str:
    """What a loop of 100 steps, which lasts so long by a clock of its own, writes to a file."""
    file, now = io.StringIO(), [1000.0]
    monkeypatch.setattr(sys, "stderr", file)
    bar = Progress(total=initial + 100, desc="clips", unit="clips", initial=initial, **options)
    bar._time, bar.start_t = lambda: now[0], now[0]
    for _ in range(100):
        now[0] += seconds / 100
        bar.update()
        bar.refresh()
        print_main("between")
    bar.close()
    return file.getvalue()


def test_a_file_gets_a_line_every_few_seconds_with_the_time_left(monkeypatch, capsys):
    written = drive(monkeypatch, seconds=50)
    assert written.splitlines() == [
        "clips: 20 of 100 clips, 00:10 gone, 00:40 left", "clips: 40 of 100 clips, 00:20 gone, 00:30 left",
        "clips: 60 of 100 clips, 00:30 gone, 00:20 left", "clips: 80 of 100 clips, 00:40 gone, 00:10 left",
        "clips: 100 of 100 clips, 00:50 gone, 00:00 left"]
    assert drive(monkeypatch, seconds=9) == ""
    assert drive(monkeypatch, seconds=50, disable=True) == ""
    resumed = drive(monkeypatch, seconds=100, initial=900).splitlines()[0]
    assert resumed == "clips: 910 of 1000 clips, 00:10 gone, 01:30 left"
    assert len(drive(monkeypatch, seconds=86400).splitlines()) <= 100
    assert "\r" not in written and capsys.readouterr().out.count("between") == 500


SCRIPT = """
from common.console import Progress, print_main
for i in Progress(range(3), "clips", disable=False):
    print_main("line", i)
with Progress(total=3, desc="batches") as outer:
    for _ in range(3):
        list(Progress(range(5), "inner"))
        outer.update()
print("end")
"""


def screen(output: str) -> list[str]:
    """The lines that a terminal shows after this output: carriage returns and moves up are followed."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|\x1b\[\d*[A-Za-z]|\r|\n|[^\r\n\x1b]+", output):
        if part == "\x1b[A":
            row -= 1
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part):]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


def test_a_terminal_keeps_no_dead_bars():
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    running = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment(), stdout=child, stderr=child)
    os.close(child)
    output = b""
    try:
        while part := os.read(parent, 4096):
            output += part
    except OSError:  # the other end is closed
        pass
    os.close(parent)
    assert running.wait() == 0
    assert "clips:" in output.decode() and "batches:" in output.decode(), "bars were shown"
    assert screen(output.decode()) == ["line 0", "line 1", "line 2", "end"]


@pytest.mark.parametrize(("cores", "processes", "workers"), [(2, 1, 2), (2, 2, 1), (1, 4, 1), (64, 4, 8), (24, 8, 3)])
def test_the_default_number_of_workers_fits_the_machine(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert fitting_workers(8) == workers


def test_torch_does_not_warn_of_the_default_workers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_loader([], [], fitting_workers(16))
    assert console.LINE_EVERY >= 5
