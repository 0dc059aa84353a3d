"""How the caller hears of the work: one-line notes, and steps of known number."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Notify = Callable[[str], None]
Advance = Callable[[int, float], None]  # number of the step that is done, from 0, and its seconds
Progress = Callable[[int], AbstractContextManager[Advance]]  # given the number of steps


@contextmanager
def unwatched(steps: int) -> Iterator[Advance]:
    """Progress that nobody looks at."""
    yield lambda index, seconds: None
