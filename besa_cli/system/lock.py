"""Locks of run directories: one process at a time writes to each."""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from besa_cli.errors import BesaError
from besa_cli.system import disk, records


@dataclass(frozen=True, kw_only=True)
class _Holder:
    """The process that holds a lock, as recorded in ``.holder.json``."""

    pid: int
    host: str
    command: str


@contextlib.contextmanager
def hold(run: Path, command: str) -> Iterator[None]:
    """Hold the lock of a run directory; the operating system releases it when the process dies for any reason.

    Raises
    ------
    BesaError
        Another process holds the lock (it is named), or the directory cannot be written.
    """
    holder, new = run / ".holder.json", not run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / ".lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise _in_use(run, holder) from error
    except OSError as error:
        raise _unwritable(run, error) from error
    try:
        disk.sweep(holder)
        disk.write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "command": command})
        yield
    finally:
        holder.unlink(missing_ok=True)
        empty = new and run.exists() and all(path.name == ".lock" for path in run.iterdir())
        if empty:
            (run / ".lock").unlink()  # while it is held: a new process creates its own lock
        lock.release()
        if empty:
            with contextlib.suppress(OSError):  # another process uses it
                run.rmdir()


@contextlib.contextmanager
def hold_existing(run: Path) -> Iterator[None]:
    """Hold the lock of a run directory, if it has one, without creating any file: for commands that only read.

    Raises
    ------
    BesaError
        Another process writes there (it is named).
    """
    lock = FileLock(run / ".lock", timeout=0)
    try:
        if (run / ".lock").exists():
            lock.acquire()
    except Timeout as error:
        raise _in_use(run, run / ".holder.json") from error
    except OSError as error:
        raise _unwritable(run, error) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def hold_results(run: Path) -> Iterator[None]:
    """Hold the lock of a run directory's results for one write, waiting for other holders.

    Pruning holds another lock, for hours: neither waits for the other.

    Raises
    ------
    BesaError
        The directory cannot be written, or another process holds the lock for a minute.
    """
    file = run / ".eval.lock"
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, timeout=60)
        lock.acquire()
    except Timeout as error:
        raise BesaError(f"{file} is held by another process", "end it, or name another directory with --run") from error
    except OSError as error:
        raise _unwritable(run, error) from error
    try:
        yield
    finally:
        lock.release()


def require_writable(run: Path) -> None:
    """Check before measuring that results can be written in a run directory.

    Raises
    ------
    BesaError
        The directory cannot be written, or another process holds the lock of its results for a minute.
    """
    with hold_results(run):
        pass


def _describe_holder(holder: Path) -> str:
    try:
        process = records.read(_Holder, holder)
        return f"'{process.command}' (process {process.pid} on {process.host})"
    except BesaError:  # it may just be starting or ending
        return "another besa process"


def _unwritable(run: Path, error: OSError) -> BesaError:
    return BesaError(f"cannot write {run}: {error.strerror or error}", "name another directory with --run")


def _in_use(run: Path, holder: Path) -> BesaError:
    return BesaError(
        f"{run} is in use by {_describe_holder(holder)}", "wait for it to end, or name another directory with --run"
    )
