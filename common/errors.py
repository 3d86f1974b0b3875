"""Errors in one line: of files that cannot be read, and of a run that ends, under torchrun too."""
import contextlib
import datetime
import errno
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

# --- files ---


class DamagedFile(ValueError):
    """A file that is there, but is not what it should be; the text is one line with its path and what to do."""


@contextlib.contextmanager
def reading(path: str | Path, expected: str, advice: str) -> Iterator[None]:
    """Reads a file and takes it apart: whatever goes wrong inside becomes a DamagedFile.

    Errors of the system (permission, I/O, no such file) and a lack of memory say nothing of the file: they stay OSError
    and MemoryError, and name the path.
    """
    try:
        yield
    except (DamagedFile, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torch's CheckpointException is none of Exception
        text = str(error)
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a seek to before its start
            raise OSError(error.errno, error.strerror, error.filename or str(path)) from error
        if isinstance(error, MemoryError) or "annot allocate memory" in text or "can't allocate memory" in text:
            raise MemoryError(f"{shown(path)}: not enough memory to read it") from error
        raise DamagedFile(f"{shown(path)} cannot be read as {expected}: {found(path, error)}; {advice}") from error


def read_json(path: str | Path, expected: str, advice: str, kind: type = dict) -> Any:
    """The content of a JSON file, which must be of a `kind`. Raises DamagedFile."""
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
    text = (str(error).strip() or "it is cut short").splitlines()[0]
    text = "it is cut short" if isinstance(error, OSError) and error.errno == errno.EINVAL else text
    own = isinstance(error, ValueError | EOFError | OSError | RuntimeError)
    return text if own else f"{type(error).__name__}: {text}"


def shown(path: str | Path) -> str:
    """A path as text of one line, whatever bytes its name is of."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# --- the end of a run ---

FOLLOW_SECONDS = 1  # between two looks for another process's error
EXIT_SECONDS = 10  # that a process has to end itself after its own

# Waits until torchrun's agent has printed its report, then prints the line. The agent's store closes after the report
# and before the agent ends; on other nodes than the store's the end itself must do.
_LAST_WORD = """
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
    """Exit with `code`, and `line` as the last that is printed; `before` is printed first.

    Under torchrun the first process that ends so speaks, and the others end within seconds of it (see `follow`).
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
        _say_last(line)
    sys.exit(code)


def follow() -> None:
    """Under torchrun, end this process within seconds of another one's error, whatever it waits for: the other's share
    of a collective, or of a cache. A thread looks for the error in the store of torchrun's agent."""
    store = _store()
    if store is None:
        return

    def watch() -> None:
        try:
            while not store.check([_key()]):
                time.sleep(FOLLOW_SECONDS)
            node, line = json.loads(store.get(_key()))
        except RuntimeError:  # torchrun's agent is gone
            return
        if _ending.is_set():
            time.sleep(EXIT_SECONDS)
        elif node != _node() and os.environ["LOCAL_RANK"] == "0":  # torchrun reports on every node
            _say_last(line)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="follow").start()


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


def _say_last(line: str) -> None:
    """Print a line; under torchrun after the report of thirty lines that it prints when a process has failed, by a
    helper that outlives this process."""
    restarts = [os.environ.get(f"TORCHELASTIC_{name}") for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    if restarts[0] is not None and restarts[0] == restarts[1] and hasattr(os, "pidfd_open"):
        there = (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) if _node() == "0" else ("", "")
        with contextlib.suppress(OSError):
            subprocess.Popen([sys.executable, "-I", "-S", "-c", _LAST_WORD, str(os.getppid()), *there, line],
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
            return
    print(line, file=sys.stderr, flush=True)
