"""How a run ends in an error, under torchrun too: common/errors.py, common/distributed.py, common/console.py."""
import subprocess
import sys

import pytest
from helpers import ROOT, environment

import common.errors
from common.cli import one_line_errors

SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from common import distributed
from common.cli import one_line_errors

import common.errors
if sys.argv[1] == "nothing":
    common.errors.FOLLOW_SECONDS = 0  # nearly always inside the store
with one_line_errors():
    distributed.setup("cpu")
    signal.signal(signal.SIGTERM, lambda *_: None)  # as a run that saves first; torchrun then waits for 30 seconds
    what = sys.argv[1]
    if what == "nothing":
        time.sleep(1)
        sys.exit()
    if what == "unforeseen":
        {{}}["x"]
    if distributed.rank() == 1 and what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if distributed.rank() == 1 or what == "all":
        raise ValueError("no videos in a folder")
    if what == "waits":
        time.sleep(1000)
    distributed.any_rank(True)
"""


@pytest.fixture(scope="module")
def endings(tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
    """Two processes of torchrun that end in an error, by what happens to them. They run beside one another."""
    script = tmp_path_factory.mktemp("script") / "fails.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    running = {
        what: subprocess.Popen([*launch, script, what], env=environment(), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
        for what in ("all", "waits", "exchanges", "unforeseen", "killed", "nothing")
    }
    done = {}
    for what, process in running.items():
        out, err = process.communicate(timeout=300)
        done[what] = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    return done


def test_a_run_without_errors_ends_without_them(endings):
    """Its thread that looks for errors is not ended inside C++ code, which would abort the process."""
    assert endings["nothing"].returncode == 0, endings["nothing"].stderr


@pytest.mark.parametrize("what", ["all", "waits", "exchanges"])
def test_under_torchrun_the_one_line_comes_last(endings, what):
    lines = endings[what].stderr.splitlines()
    assert endings[what].returncode == 1
    assert [line for line in lines if line.startswith("error")] == lines[-1:], endings[what].stderr
    assert lines[-1].startswith("error (rank ") and lines[-1].endswith("): no videos in a folder")
    # torchrun's report says how the others ended: by themselves, not killed by it after its 30 seconds.
    assert "SIGKILL" not in endings[what].stderr
    # The only traceback is the one that torchrun prints of its own.
    assert endings[what].stderr.count("Traceback") == 1


def test_under_torchrun_a_mistake_of_the_code_keeps_its_traceback(endings):
    *before, last = endings["unforeseen"].stderr.splitlines()
    assert last.endswith("KeyError: 'x' (unexpected: see the traceback above)")
    assert before.count("KeyError: 'x'") == 1


def test_a_process_that_was_killed_is_told_by_another(endings):
    last = endings["killed"].stderr.splitlines()[-1]
    assert last.startswith("error (rank 0): another process of this run has ended without an error message")


def ending(capsys, error: BaseException) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise error
    return stopped.value.code, capsys.readouterr().err.splitlines()


def test_every_error_ends_in_one_line(capsys):
    assert ending(capsys, ValueError()) == (1, ["error: ValueError"])
    assert ending(capsys, KeyboardInterrupt()) == (130, ["error: interrupted by Ctrl-C"])
    expected = "error: not enough memory: the system has none left: lower the batch size or --num_workers"
    assert ending(capsys, MemoryError())[1] == [expected]
    code, lines = ending(capsys, KeyError("x"))
    assert code == 1 and lines[0].startswith("Traceback")
    assert lines[-1] == "error: KeyError: 'x' (unexpected: see the traceback above)"


def test_errors_of_the_system_are_not_damage(tmp_path):
    path = tmp_path / "a\nb\udcff"
    with pytest.raises(FileNotFoundError), common.errors.reading(path, "a list", "make it anew"):
        path.read_text()
    reading = common.errors.reading(path, "a list", "make it anew")
    with pytest.raises(MemoryError, match=r"a\\nb\\xff: not enough memory"), reading:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    reading = common.errors.reading(path, "a list", "make it anew")
    with pytest.raises(ValueError, match=r"a\\nb\\xff cannot be read as a list: it has no 'x'; make it anew$"), reading:
        raise KeyError("x")
