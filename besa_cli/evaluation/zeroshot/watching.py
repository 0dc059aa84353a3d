"""Callback types by which an evaluation reports progress to its caller."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int, float], None]  # called with the number of the finished step, from 0, and its seconds
Progress = Callable[[int], AbstractContextManager[Advance]]  # called with the number of steps


@contextmanager
def no_progress(steps: int) -> Iterator[Advance]:
    """Ignore progress: the default of functions that take a `Progress`."""
    yield lambda index, seconds: None
