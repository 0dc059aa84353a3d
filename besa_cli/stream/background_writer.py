"""Write a finished block in a background thread while the next block is computed."""

import contextlib
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType

from torch import Tensor
from typing_extensions import override

from besa_cli.checkpoint.manifests import HeldOut
from besa_cli.checkpoint.reports import BlockReport
from besa_cli.decoder.prefetch import start_in_thread
from besa_cli.stream.rank_share import Store


class BackgroundWriter(Store):
    """Context manager around a `Store` that writes one block at a time in a background thread.

    Every method first waits for the pending write, so errors of a write are raised by the next call or on exit. On exit
    all blocks are on disk.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._writing: Future[None] | None = None

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():  # keep the original error
            self._wait()

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    @override
    def finished(self) -> int:
        self._wait()
        return self._store.finished()

    @override
    def read(self, index: int) -> dict[str, Tensor]:
        self._wait()
        return self._store.read(index)

    @override
    def report(self, index: int) -> BlockReport:
        self._wait()
        return self._store.report(index)

    @override
    def write(
        self,
        report: BlockReport,
        tensors: Mapping[str, Tensor],
        codes: Mapping[str, Tensor],
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._wait()
        self._writing = start_in_thread(self._store.write, report, tensors, codes, state)

    @override
    def read_state(self) -> dict[str, Tensor]:
        self._wait()
        return self._store.read_state()

    @override
    def write_held_out(self, figures: HeldOut) -> None:
        self._wait()
        self._store.write_held_out(figures)
