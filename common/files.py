"""Atomic writes, lock files that name their holder, and the identity of data and code: manifests and git revision.

Errors are one line with the path and the cause. Needs the standard library alone.
"""
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

# Errors that are about the path itself, not about a disk, a permission or a limit.
PATH_ERRORS = {errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO}


def of_system(error: Exception) -> bool:
    """Whether an error is the system's (disk, permission, memory, limit) and does not mean that the file is damaged."""
    if isinstance(error, MemoryError) or re.search("allocate memory|bad_alloc", str(error)):
        return True
    return isinstance(error, OSError) and error.errno is not None and error.errno not in PATH_ERRORS


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb", **options) -> Iterator:
    """Write a file atomically: it replaces `path` when the block ends without an error. Until then it is written beside
    it, under a hidden name of this host and process. Raises OSError as `writing` does."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    with writing(partial, path, mode, **options) as file:
        yield file
    os.replace(partial, path)


@contextlib.contextmanager
def writing(partial: str | Path, path: str | Path, mode: str = "wb", **options) -> Iterator:
    """Open the file `partial` for writing. It is locked while the block runs, synced to the disk when it ends, and
    removed if it fails. Raises OSError "PATH cannot be written: CAUSE".

    path: the name for messages. mode, options: those of open().
    """
    recorder = None
    try:
        with open(partial, mode, **options) as file:
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            recorder = _Recorder(file)
            yield recorder
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        cause = recorder and recorder.error or error
        if isinstance(cause, OSError):
            raise OSError(f"{path} cannot be written: {cause.strerror or cause}") from error
        raise


class _Recorder:
    """Remembers the first OSError of a write to a file: numpy, torch and Pillow raise other errors in its place."""

    def __init__(self, file):
        self._file, self.error = file, None

    def write(self, content):
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def remove_partials(folder: Path) -> None:
    """Remove the files that killed processes left in `atomic_write`. Those still being written are locked, and stay."""
    for path in folder.glob("*.partial"):
        with contextlib.suppress(OSError), open(path, "rb+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


_held: dict[str, IO] = {}  # lock files of this process, open until it ends


def claim(path: Path, used: str) -> None:
    """Hold the lock file `path` until this process ends, however it ends. Raises ValueError, naming process and host,
    where another process holds it.

    used: what is locked, for the message: "FOLDER is in use". Child processes do not inherit the lock.
    """
    if str(path.absolute()) in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115 - open until the process ends
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise OSError(f"{path} cannot be locked: {error.strerror}") from error
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(f"{used} by {holder}: wait until it ends, or choose another folder") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    _held[str(path.absolute())] = file


def release(path: Path) -> None:
    """Release a lock of this process, and remove its file."""
    if file := _held.pop(str(path.absolute()), None):
        path.unlink(missing_ok=True)
        file.close()


def manifest_sha256(paths: Iterable[str | Path], root: str | Path | None = None) -> str:
    """SHA-256 of a list of files in its order, one POSIX path a line; relative to `root` where given, so that the same
    data set in another folder has the same value. ValueError where a path is not under `root`."""
    lines = (path if root is None else path.relative_to(root) for path in map(Path, paths))
    text = "".join(f"{line.as_posix()}\n" for line in lines)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def git_revision() -> str:
    """Commit of this code, with "-dirty" where tracked files differ from it, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"
