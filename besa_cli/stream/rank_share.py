"""What several ranks share: the calibration samples, of which each holds a part, and the blocks that one keeps."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from besa_cli.checkpoint.reports import BlockReport
from besa_cli.system import partition
from besa_cli.system.ranks import Ranks


class Store(Protocol):
    """Where finished blocks go: see `besa_cli.checkpoint.stages.Stage`."""

    def finished(self) -> int:
        """How many blocks are on disk, from the first on without a gap."""

    def read(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block."""

    def report(self, index: int) -> BlockReport:
        """The report of a finished block."""

    def write(self, report: BlockReport, tensors: Mapping[str, Tensor], codes: Mapping[str, Tensor]) -> None:
        """Put a block on disk, whole or not at all; the codes of linears on a grid beside its tensors."""


class SharedStore:
    """A store that the first rank has (None elsewhere) and all ranks read; see `Store`."""

    def __init__(self, store: Store | None, world: Ranks) -> None:
        self._store, self._world = store, world

    def finished(self) -> int:
        """See `Store`."""
        return int(self._world.broadcast_json(self._store.finished() if self._store else None))

    def read(self, index: int) -> dict[str, Tensor]:
        """See `Store`."""
        return self._world.broadcast_tensors(self._store.read(index) if self._store else {})

    def report(self, index: int) -> BlockReport:
        """See `Store`."""
        return BlockReport.from_record(
            self._world.broadcast_json(self._store.report(index).record() if self._store else None)
        )

    def write(self, report: BlockReport, tensors: Mapping[str, Tensor], codes: Mapping[str, Tensor]) -> None:
        """See `Store`."""
        if self._store:
            self._store.write(report, tensors, codes)


class RankShare:
    """The calibration samples that this rank holds, and those of a learning step that it passes through the block.

    Attributes
    ----------
    samples : int
        Of all ranks together.
    world : Ranks
    own : range
        The samples that this rank holds.
    """

    def __init__(self, samples: int, world: Ranks | None = None) -> None:
        self.samples, self.world = samples, world or Ranks()
        self.own = partition.samples_of_rank(samples, self.world.rank, self.world.size)
        self._owners = partition.owner_of_sample(samples, self.world.size)

    def fetch(self, chosen: Tensor, *held: Tensor) -> tuple[Tensor, ...]:
        """This rank's part of the samples of a step, fetched from their owners: at most an even share, rounded up.

        Parameters
        ----------
        chosen : integer Tensor of shape (samples in the step,)
            The same on all ranks.
        held : Tensors of shape (own samples, ...), on the CPU where there are several ranks

        Returns
        -------
        one Tensor of shape (samples here, ...) for each of `held`; with one rank the samples in the order of `chosen`.
        May be a part of `held` itself, so it is not to be written to.
        """
        rank, size = self.world.rank, self.world.size
        samples = chosen.tolist()
        if size == 1:
            (first, *others) = samples
            return tuple(each[chosen] if others else each[first : first + 1] for each in held)  # one is not copied
        owners = [self._owners[sample] for sample in samples]
        workers = partition.assign_samples(owners, size)
        dealt = tuple(torch.empty(workers.count(rank), *each.shape[1:], dtype=each.dtype) for each in held)
        sent: list[tuple[int, int, Tensor]] = []
        taken: list[tuple[int, int, Tensor]] = []
        here = 0
        for position, (sample, owner, worker) in enumerate(zip(samples, owners, workers, strict=True)):
            for number, (source, target) in enumerate(zip(held, dealt, strict=True)):
                tag = position * len(held) + number
                if owner == worker == rank:
                    target[here] = source[sample - self.own.start]
                elif owner == rank:
                    sent.append((tag, worker, source[sample - self.own.start]))
                elif worker == rank:
                    taken.append((tag, owner, target[here]))
            here += worker == rank
        self.world.exchange(sent, taken)
        return dealt
