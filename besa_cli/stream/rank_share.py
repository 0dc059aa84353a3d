"""Work shared by several ranks: each rank holds a part of the calibration samples; only the main rank stores blocks."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from besa_cli.checkpoint.manifests import HeldOut
from besa_cli.checkpoint.reports import BlockReport
from besa_cli.system import partition
from besa_cli.system.ranks import Ranks


class Store(Protocol):
    """Storage of finished blocks, such as `besa_cli.checkpoint.stages.Stage`."""

    def finished(self) -> int:
        """Return the number of finished blocks, counted from block 0 without gaps."""

    def read(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of a finished block."""

    def report(self, index: int) -> BlockReport:
        """Return the report of a finished block."""

    def write(
        self,
        report: BlockReport,
        tensors: Mapping[str, Tensor],
        codes: Mapping[str, Tensor],
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a block atomically: its report, its tensors, and the codes of its quantized linears.

        The state of the check on held-out samples, of the blocks up to this one, is written after it.
        """

    def read_state(self) -> dict[str, Tensor]:
        """Return the newest state of the check on held-out samples; empty if there is none."""

    def write_held_out(self, figures: HeldOut) -> None:
        """Write the result of the check on held-out samples."""


def resumable(store: Store, *, checked: bool) -> int:
    """Return the number of finished blocks, counted from block 0, after which the work can be resumed.

    With a check on held-out samples, its state must be stored, too. If that is missing or ahead of the blocks, as after
    a shard was deleted, all blocks are computed again: finished blocks do not tell what uniform masks would have been.
    """
    if not checked:
        return store.finished()
    blocks = int(store.read_state().get("blocks", 0))
    return blocks if blocks <= store.finished() else 0


class SharedStore(Store):
    """Store of the main rank (None on the other ranks), readable by all ranks through broadcasts.

    With `checked`, a check on held-out samples is to be resumed together with the blocks.
    """

    def __init__(self, store: Store | None, world: Ranks, *, checked: bool = False) -> None:
        self._store, self._world, self._checked = store, world, checked

    @override
    def finished(self) -> int:
        own = resumable(self._store, checked=self._checked) if self._store else None
        return int(self._world.broadcast_json(own))

    @override
    def read(self, index: int) -> dict[str, Tensor]:
        return self._world.broadcast_tensors(self._store.read(index) if self._store else {})

    @override
    def report(self, index: int) -> BlockReport:
        return BlockReport.from_record(
            self._world.broadcast_json(self._store.report(index).record() if self._store else None)
        )

    @override
    def write(
        self,
        report: BlockReport,
        tensors: Mapping[str, Tensor],
        codes: Mapping[str, Tensor],
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        if self._store:
            self._store.write(report, tensors, codes, state)

    @override
    def read_state(self) -> dict[str, Tensor]:
        return self._store.read_state() if self._store else {}

    @override
    def write_held_out(self, figures: HeldOut) -> None:
        if self._store:
            self._store.write_held_out(figures)


class RankShare:
    """Assignment of calibration samples to ranks, and exchange of the samples of a learning step.

    Attributes
    ----------
    samples : int
        Number of samples of all ranks together.
    world : Ranks
    own : range
        Samples that this rank holds.
    """

    def __init__(self, samples: int, world: Ranks | None = None) -> None:
        self.samples, self.world = samples, world or Ranks()
        self.own = partition.samples_of_rank(samples, self.world.rank, self.world.size)
        self._owners = partition.owner_of_sample(samples, self.world.size)

    def fetch(self, chosen: Tensor, *held: Tensor) -> tuple[Tensor, ...]:
        """Fetch this rank's part of the samples of a step from their owners: at most an even share, rounded up.

        Parameters
        ----------
        chosen : integer Tensor of shape (samples in the step,)
            Sample numbers, the same on all ranks.
        held : Tensors of shape (own samples, ...), on the CPU if there are several ranks

        Returns
        -------
        tuple of Tensor of shape (this rank's samples in the step, ...), one for each of `held`
            With one rank the samples are in the order of `chosen`. May be views of `held`: must not be written to.
        """
        rank, size = self.world.rank, self.world.size
        samples = chosen.tolist()
        if size == 1:
            (first, *others) = samples
            # a single sample is a view, not a copy
            return tuple(tensor[chosen] if others else tensor[first : first + 1] for tensor in held)
        owners = [self._owners[sample] for sample in samples]
        workers = partition.assign_samples(owners, size)
        fetched = tuple(torch.empty(workers.count(rank), *tensor.shape[1:], dtype=tensor.dtype) for tensor in held)
        sent: list[tuple[int, int, Tensor]] = []
        received: list[tuple[int, int, Tensor]] = []
        row = 0
        for position, (sample, owner, worker) in enumerate(zip(samples, owners, workers, strict=True)):
            for number, (source, target) in enumerate(zip(held, fetched, strict=True)):
                tag = position * len(held) + number
                if owner == worker == rank:
                    target[row] = source[sample - self.own.start]
                elif owner == rank:
                    sent.append((tag, worker, source[sample - self.own.start]))
                elif worker == rank:
                    received.append((tag, owner, target[row]))
            row += worker == rank
        self.world.exchange(sent, received)
        return fetched
