"""Errors in one line: of a file that cannot be read, and at the end of a run, also under torchrun. Needs no torch, so
that the scripts of data/ start at once."""
import argparse
import atexit
import contextlib
import datetime
import errno
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

# --- files ---
REMAKE = "delete it, and it is made again"  # advice for files that the code itself keeps


class MendableError(RuntimeError):
    """An error that a user can mend; its text is one line that says how."""


class DamagedFile(ValueError):
    """A file that exists but is not what it should be; the text is one line with its path and what to do."""


@contextlib.contextmanager
def reading(path: str | Path, expected: str, advice: str) -> Iterator[None]:
    """Context in which a file is read and parsed: any error inside becomes a DamagedFile.

    expected: what the file should be. advice: what to do. Errors of the system (permission, I/O, no such file) and a
    lack of memory do not mean that the file is damaged: they stay OSError and MemoryError, and name the path.
    """
    try:
        yield
    except (DamagedFile, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torch's CheckpointException is not an Exception
        text = str(error)
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a seek to before its start
            raise OSError(error.errno, error.strerror, error.filename or str(path)) from error
        if isinstance(error, MemoryError) or "annot allocate memory" in text or "can't allocate memory" in text:
            raise MemoryError(f"{shown(path)}: not enough memory to read it") from error
        raise DamagedFile(f"{shown(path)} cannot be read as {expected}: {found(path, error)}; {advice}") from error


def read_json(path: str | Path, expected: str, advice: str, kind: type = dict) -> Any:
    """The content of a JSON file, which must be of type `kind`. Raises DamagedFile."""
    with reading(path, expected, advice):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, kind):
            raise ValueError(f"it holds a {type(content).__name__}")
    return content


def found(path: str | Path, error: BaseException) -> str:
    """What is wrong with a file, in a few words."""
    with contextlib.suppress(OSError):
        if os.path.isfile(path) and not os.path.getsize(path):
            return "it is empty"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not {error.encoding}"
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno} is not JSON"
    if name := foreign_name(error):
        return f"it names {name}, which is not admitted"
    if "weights_only" in str(error):  # torch advises to load the file without that
        return "it is not a PyTorch file of plain values and tensors"
    text = (str(error).strip() or "it is cut short").splitlines()[0]
    text = "it is cut short" if isinstance(error, OSError) and error.errno == errno.EINVAL else text
    own = isinstance(error, ValueError | EOFError | OSError | RuntimeError)
    return text if own else f"{type(error).__name__}: {text}"


def foreign_name(error: BaseException) -> str | None:
    """What a pickle names that torch.load(weights_only=True) does not admit, from its error."""
    refused = re.search(r"GLOBAL (\S+) (was not an allowed global|whose module)", str(error))
    return refused and refused[1]


def shown(path: str | Path) -> str:
    """A path as printable text on one line, whatever bytes its name holds."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# --- the end of a run ---
FOLLOW_SECONDS = 1  # between two polls for another process's error

EXIT_SECONDS = 10  # that a process gets to end by itself after its own error

# A script that waits until torchrun's agent has printed its report, then prints the line. On the node of the agent's
# store it waits for the store to close, which is after the report and before the agent ends; on others for the end.
_PRINT_LAST = """
import os, select, socket, sys
agent, host, port, line = sys.argv[1:]
try:
    ends = [os.pidfd_open(int(agent))]
    if host:
        ends.append(socket.create_connection((host, int(port)), 10))
    select.select(ends, [], [])
except OSError:
    pass
print(line, file=sys.stderr, flush=True)
"""

_ending = threading.Event()


def end(line: str, code: int = 1, before: str = "") -> NoReturn:
    """Print `before`, then `line` as the last line of the output, and exit with `code`.

    Under torchrun only the first process that fails prints; the others end within seconds of it (see `follow`).
    """
    _ending.set()
    first = True
    with contextlib.suppress(RuntimeError):  # torchrun's agent is gone
        if store := _store():
            first = store.add(f"{_key()}/count", 1) == 1
            if first:
                store.set(_key(), json.dumps([_node(), line]))
    if first:
        if before:
            print(before, file=sys.stderr, flush=True)
        _print_last(line)
    sys.exit(code)


def follow() -> None:
    """Under torchrun, end this process within seconds of another process's error, even while it waits for that process
    in a collective or to fill a cache. A background thread polls the store of torchrun's agent for the error."""
    store = _store()
    if store is None:
        return

    def watch() -> None:
        try:
            while not store.check([_key()]):
                if over.wait(FOLLOW_SECONDS):
                    return
            node, line = json.loads(store.get(_key()))
        except RuntimeError:  # torchrun's agent is gone
            return
        if _ending.is_set():
            if over.wait(EXIT_SECONDS):
                return
        elif node != _node() and os.environ["LOCAL_RANK"] == "0":  # torchrun reports on every node
            _print_last(line)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)

    # The interpreter ends a thread that is inside the store's C++ code by aborting the process: the thread ends first.
    over, thread = threading.Event(), threading.Thread(target=watch, daemon=True, name="follow")

    def end_thread() -> None:
        over.set()
        thread.join(EXIT_SECONDS)

    atexit.register(end_thread)
    thread.start()


def _store():
    """A connection to the store of torchrun's agent, None without one. RuntimeError where the agent is gone."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
                    timeout=datetime.timedelta(seconds=30))


def _key() -> str:
    return f"video_tokenizers/error/{os.environ['TORCHELASTIC_RESTART_COUNT']}"


def _node() -> str:
    return os.environ["GROUP_RANK"]


def _print_last(line: str) -> None:
    """Print a line. Under torchrun, a helper process that outlives this one prints it after torchrun's own report of
    thirty lines."""
    restarts = [os.environ.get(f"TORCHELASTIC_{name}") for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    if restarts[0] is not None and restarts[0] == restarts[1] and hasattr(os, "pidfd_open"):
        there = (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) if _node() == "0" else ("", "")
        with contextlib.suppress(OSError):
            subprocess.Popen([sys.executable, "-I", "-S", "-c", _PRINT_LAST, str(os.getppid()), *there, line],
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
            return
    print(line, file=sys.stderr, flush=True)


def usage_error(message: str) -> NoReturn:
    """End with exit code 2 and one line. Under torchrun every process finds the same mistake; the first prints it."""
    end(f"error: {' '.join(message.split())} (--help lists the flags)", 2)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with errors of one line: it prints the usage only on --help."""

    def error(self, message: str) -> NoReturn:
        usage_error(message)
