"""How calibration samples are shared out over ranks: whose they are, and who passes which of a learning step."""

from collections.abc import Sequence


def samples_of_rank(samples: int, rank: int, size: int) -> range:
    """The samples of one rank: contiguous, every rank's as many as any other's or one fewer."""
    return range(samples * rank // size, samples * (rank + 1) // size)


def owner_of_sample(samples: int, size: int) -> list[int]:
    """The rank that each sample belongs to."""
    return [rank for rank in range(size) for _ in samples_of_rank(samples, rank, size)]


def assign_samples(owners: Sequence[int], size: int) -> list[int]:
    """The rank that passes each sample of a step through the block.

    No rank passes more than its even share, rounded up; of its own samples it keeps as many as that allows, and the
    rest go to the ranks that have the fewest.

    Parameters
    ----------
    owners : sequence of int
        The rank that each sample of the step belongs to.
    size : int
        Number of ranks.
    """
    most = -(-len(owners) // size)
    load = [0] * size
    chosen: list[int | None] = []
    for owner in owners:
        kept = load[owner] < most
        load[owner] += kept
        chosen.append(owner if kept else None)
    for position, worker in enumerate(chosen):
        if worker is None:
            chosen[position] = least = load.index(min(load))
            load[least] += 1
    return [worker for worker in chosen if worker is not None]
