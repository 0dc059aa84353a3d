"""SIGINT and SIGTERM: both unwind the program like Ctrl-C, so that locks and temporary files are removed."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN = 0.05  # seconds until an ignored interrupt is repeated


@contextmanager
def interrupting(received: list[int], wanted: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Raise `KeyboardInterrupt` in the main thread on either signal within this context.

    If the signal arrives in a callback of an extension, Python can only ignore the exception; the signal is then
    repeated a moment later.

    Parameters
    ----------
    received : list of int
        Collects the numbers of the signals that raised an exception.
    wanted : callable
        Returns whether a signal still counts when it arrives.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        if wanted():
            received.append(number)
            raise KeyboardInterrupt

    def repeat_ignored(ignored: "sys.UnraisableHookArgs") -> None:
        if received and issubclass(ignored.exc_type, KeyboardInterrupt):
            timers.append(threading.Timer(_AGAIN, os.kill, (os.getpid(), received.pop())))
            timers[-1].start()
        else:
            hook(ignored)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    timers: list[threading.Timer] = []
    # a shell lets its background jobs ignore SIGINT
    sigint_ignored = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    numbers = [signal.SIGTERM] if sigint_ignored else [signal.SIGTERM, signal.SIGINT]
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    hook, sys.unraisablehook = sys.unraisablehook, repeat_ignored
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for timer in timers:
            timer.cancel()
        for number, handler in previous.items():
            signal.signal(number, handler)
