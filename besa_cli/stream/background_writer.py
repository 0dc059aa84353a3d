"""A store that is written to while the next block is computed."""

import contextlib
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType

from torch import Tensor

from besa_cli.checkpoint.reports import BlockReport
from besa_cli.decoder.prefetch import start_in_thread
from besa_cli.stream.rank_share import Store


class BackgroundWriter:
    """Hands one block at a time to a thread that writes it; used as a context, it ends when all is on disk.

    What goes wrong is raised when the next block is handed over, or at the end. Nothing else is done to the store
    meanwhile.

    Parameters
    ----------
    store : Store
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._writing: Future[None] | None = None

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():  # the first error is the one to show
            self._settle()

    def _settle(self) -> None:
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def finished(self) -> int:
        """See `Store`."""
        self._settle()
        return self._store.finished()

    def read(self, index: int) -> dict[str, Tensor]:
        """See `Store`."""
        self._settle()
        return self._store.read(index)

    def report(self, index: int) -> BlockReport:
        """See `Store`."""
        self._settle()
        return self._store.report(index)

    def write(self, report: BlockReport, tensors: Mapping[str, Tensor], codes: Mapping[str, Tensor]) -> None:
        """Begin to put a block on disk, when the one before is there."""
        self._settle()
        self._writing = start_in_thread(self._store.write, report, tensors, codes)
