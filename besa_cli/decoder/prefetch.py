"""Reading of the next block's tensors while another block is computed."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def start_in_thread(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> "Future[Result]":
    """Call a function in a new thread and return its future; the process does not exit before the call has ended."""
    thread = ThreadPoolExecutor(max_workers=1)
    future = thread.submit(function, *args, **kwargs)
    thread.shutdown(wait=False)
    return future


class Prefetcher:
    """Reader of blocks that reads the next block in the background.

    Parameters
    ----------
    read : callable
        Block index → the block's tensors by name.
    pinned : bool
        Copy prefetched tensors to page-locked memory, from which a GPU copies faster.
    """

    def __init__(self, read: Callable[[int], Mapping[str, Tensor]], *, pinned: bool) -> None:
        self._read, self._pinned = read, pinned
        self._begun: dict[int, Future[dict[str, Tensor]]] = {}

    def prefetch(self, index: int) -> None:
        """Start to read a block, unless it is being read already."""
        if index not in self._begun:
            self._begun[index] = start_in_thread(self._fetch, index)

    def take(self, index: int) -> dict[str, Tensor]:
        """Return a block's tensors, reading them now if they were not prefetched; errors of prefetching raise here."""
        future = self._begun.pop(index, None)
        return future.result() if future else dict(self._read(index))

    def _fetch(self, index: int) -> dict[str, Tensor]:
        return {name: tensor.pin_memory() if self._pinned else tensor for name, tensor in self._read(index).items()}
