"""A command line typed in a fork of this process, with bounds on time, memory and files."""

import contextlib
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from faults import fault_injection
from faults.hostile.frame import Line, Seen

ADDRESSES = 6 << 30  # bytes of addresses more than a fork begins with: beyond, it is out of memory
LARGEST_FILE = 1 << 30  # bytes


def typed(each: Line, place: Path) -> Seen:
    """Type a command line in a fork of this process, which has imported what commands import."""

    def main() -> int:
        from besa_cli.app import main

        return main(each.words)

    return forked(main, place, each)


def forked(work: Callable[[], int], place: Path, how: Line) -> Seen:
    """Do some work in a fork of this process, with bounds on time, memory and files."""
    with contextlib.ExitStack() as stack:
        logs = [Path(f"{place}.{name}") for name in ("in", "out", "err")]
        for log in logs:
            log.write_text(how.answers if log.suffix == ".in" else "")
            stack.callback(log.unlink)
        began = _now()
        process = os.fork()
        if process == 0:
            _child(work, place, how, logs)
        handle = os.pidfd_open(process)
        stack.callback(os.close, handle)
        if not select.select([handle], [], [], how.seconds + 1)[0]:
            os.killpg(process, signal.SIGKILL)
        _, status, usage = os.wait4(process, 0)
        out, err = (log.read_bytes().decode(errors="replace") for log in logs[1:])
        used = usage.ru_maxrss * 1024 - _resident()
        return Seen(code=os.waitstatus_to_exitcode(status), out=out, err=err, seconds=_now() - began, memory=used)


def _now() -> float:
    return os.times().elapsed


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _child(work: Callable[[], int], place: Path, how: Line, logs: Sequence[Path]) -> None:
    """The fork; it ends here, as the interpreter would end."""
    code = 1  # of an interpreter that an exception ends
    try:
        fault_injection.settle_fork()
        os.setsid()
        _limit()
        _redirect(how, logs)
        os.chdir(place)
        for name, value in {"PWD": str(place), **how.environment}.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        code = _worked(work)
    except BaseException:  # noqa: BLE001 - what leaves `main` is what is looked for
        with contextlib.suppress(BaseException):
            traceback.print_exc()
            sys.stderr.flush()
    finally:
        os._exit(code)


def _worked(work: Callable[[], int]) -> int:
    """The exit code of an interpreter that does this work, and writes out at its end what is left to write."""
    try:
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            code = 120
    return code


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for kind, most in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + ADDRESSES),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _redirect(how: Line, logs: Sequence[Path]) -> None:
    """Standard input, output and error, as files and as Python's streams."""
    os.dup2(os.open(logs[0], os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    for number, name, kind, log in ((1, "stdout", how.out, logs[1]), (2, "stderr", how.err, logs[2])):
        if kind == "closed":
            os.close(number)
            setattr(sys, name, None)
            continue
        if kind == "broken":
            reader, writer = os.pipe()
            os.dup2(writer, number)
            os.close(reader)
        else:
            os.dup2(os.open("/dev/full" if kind == "full" else log, os.O_WRONLY | os.O_APPEND), number)
        setattr(sys, name, open(number, "w", buffering=-1 if number == 1 else 1, closefd=False))  # noqa: SIM115
