"""The tensors of a block that is wanted soon, read while another one is computed."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from torch import Tensor

Given = ParamSpec("Given")
Found = TypeVar("Found")


def begun(function: Callable[Given, Found], *args: Given.args, **kwargs: Given.kwargs) -> "Future[Found]":
    """Call a function in a thread of its own, which ends with it; the process does not end before."""
    thread = ThreadPoolExecutor(max_workers=1)
    future = thread.submit(function, *args, **kwargs)
    thread.shutdown(wait=False)
    return future


class Prefetcher:
    """Reads blocks before they are wanted.

    Parameters
    ----------
    read : function of a block's number to its tensors
    pinned : bool
        Put what is read ahead into page-locked memory, which a GPU copies from at once.
    """

    def __init__(self, read: Callable[[int], Mapping[str, Tensor]], *, pinned: bool) -> None:
        self._read, self._pinned = read, pinned
        self._begun: dict[int, Future[dict[str, Tensor]]] = {}

    def prefetch(self, index: int) -> None:
        """Begin to read a block."""
        if index not in self._begun:
            self._begun[index] = begun(self._fetch, index)

    def take(self, index: int) -> dict[str, Tensor]:
        """A block's tensors, read now unless they were expected; what went wrong meanwhile is raised here."""
        future = self._begun.pop(index, None)
        return future.result() if future else dict(self._read(index))

    def _fetch(self, index: int) -> dict[str, Tensor]:
        return {name: tensor.pin_memory() if self._pinned else tensor for name, tensor in self._read(index).items()}
