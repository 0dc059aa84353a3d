"""Several linears in one figure: sums within a block, means over blocks, as the paper's Table 4 averages."""

from collections.abc import Sequence
from dataclasses import dataclass

from besa_cli.sim.cost import Cost
from besa_cli.sim.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What several linears come to under one dataflow.

    Attributes
    ----------
    linears, blocks : int
        How many there are, and in how many blocks.
    sparsity : float
        Zeros by weights, over all of them.
    dense_cycles, cycles : float
        Means over the blocks of the sums within each.
    speedup : float
        One by the other; infinite where nothing is left to do.
    utilisation : float
        Multiplications with weights that are not zero, by all that the array could do in that time.
    denser_columns, denser_kept : float or None
        Share of the columns that are denser, and of the kept weights that lie in them (ViTCoD).
    memory_bound : int or None
        Linears whose time the memory sets (roofline).
    dense_bytes, bytes : float or None
        As the cycles (roofline).
    """

    linears: int
    blocks: int
    sparsity: float
    dense_cycles: float
    cycles: float
    speedup: float
    utilisation: float
    denser_columns: float | None = None
    denser_kept: float | None = None
    memory_bound: int | None = None
    dense_bytes: float | None = None
    bytes: float | None = None


def summarize(linears: Sequence[tuple[Workload, Cost]], blocks: int) -> Summary:
    """The summary of at least one linear, all under one dataflow.

    Parameters
    ----------
    linears : sequence of (workload, cost)
    blocks : int
        Number of blocks they come from.
    """
    workloads, costs = [each for each, _ in linears], [cost for _, cost in linears]
    dense, taken = sum(cost.dense_cycles for cost in costs), sum(cost.cycles for cost in costs)
    useful, pes = sum(cost.useful for cost in costs), costs[0].pes
    weights, kept = sum(each.weights for each in workloads), sum(each.kept for each in workloads)
    splits = [cost.split for cost in costs if cost.split]
    roofs = [cost.roof for cost in costs if cost.roof]
    return Summary(
        linears=len(costs),
        blocks=blocks,
        sparsity=1 - kept / weights if weights else 0.0,
        dense_cycles=dense / blocks,
        cycles=taken / blocks,
        speedup=dense / taken if taken else float("inf"),
        utilisation=useful / (taken * pes) if taken else 0.0,
        denser_columns=sum(split.columns for split in splits) / sum(each.cols for each in workloads)
        if splits
        else None,
        denser_kept=sum(split.kept for split in splits) / kept if splits and kept else None,
        memory_bound=sum(roof.bound == "memory" for roof in roofs) if roofs else None,
        dense_bytes=sum(roof.dense_bytes for roof in roofs) / blocks if roofs else None,
        bytes=sum(roof.bytes for roof in roofs) / blocks if roofs else None,
    )
