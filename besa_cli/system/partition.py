"""Assignment of calibration samples to ranks: which rank owns each, and which passes it in a learning step."""

from collections.abc import Sequence


def samples_of_rank(samples: int, rank: int, size: int) -> range:
    """Return the contiguous samples of one rank; the counts of the ranks differ by at most one."""
    return range(samples * rank // size, samples * (rank + 1) // size)


def owner_of_sample(samples: int, size: int) -> list[int]:
    """List the rank that owns each sample."""
    return [rank for rank in range(size) for _ in samples_of_rank(samples, rank, size)]


def assign_samples(owners: Sequence[int], size: int) -> list[int]:
    """Choose the rank that passes each sample of a step through the block.

    No rank passes more than its even share, rounded up. Each keeps as many of its own samples as that allows; the
    others go to the ranks with the fewest.

    Parameters
    ----------
    owners : sequence of int
        Rank that owns each sample of the step.
    size : int
        Number of ranks.
    """
    limit = -(-len(owners) // size)
    load = [0] * size
    workers: list[int | None] = []
    for owner in owners:
        kept = load[owner] < limit
        load[owner] += kept
        workers.append(owner if kept else None)
    for position, worker in enumerate(workers):
        if worker is None:
            workers[position] = least = load.index(min(load))
            load[least] += 1
    return [worker for worker in workers if worker is not None]
