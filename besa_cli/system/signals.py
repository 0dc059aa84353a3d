"""SIGINT and SIGTERM: both unwind the program as Ctrl-C does, so that locks and temporary files go away."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN = 0.05  # seconds until an interrupt that was swallowed comes again


@contextmanager
def interrupting(came: list[int], wanted: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Within, either signal raises KeyboardInterrupt in the main thread.

    Where it falls into a callback of an extension, Python can only say that it was ignored; it comes again a moment
    later then.

    Parameters
    ----------
    came : list of int
        Gets the number of each signal that came and was not swallowed.
    wanted : callable
        Whether signals still count when one comes.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        if wanted():
            came.append(number)
            raise KeyboardInterrupt

    def swallowed(ignored: "sys.UnraisableHookArgs") -> None:
        if came and issubclass(ignored.exc_type, KeyboardInterrupt):
            timers.append(threading.Timer(_AGAIN, os.kill, (os.getpid(), came.pop())))
            timers[-1].start()
        else:
            hook(ignored)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    timers: list[threading.Timer] = []
    unheard = signal.getsignal(signal.SIGINT) is not signal.default_int_handler  # as in the background of a shell
    numbers = [signal.SIGTERM] if unheard else [signal.SIGTERM, signal.SIGINT]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    hook, sys.unraisablehook = sys.unraisablehook, swallowed
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for timer in timers:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
