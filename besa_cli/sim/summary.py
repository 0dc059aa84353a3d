"""Summary of several linears: sums within a block, means over blocks, as in the paper's Table 4."""

from collections.abc import Sequence
from dataclasses import dataclass

from besa_cli.sim.cost import Cost
from besa_cli.sim.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Summary of several linears under one dataflow.

    Attributes
    ----------
    linears, blocks : int
        Number of linears, and of blocks that hold them.
    sparsity : float
        Share of zeros over all linears.
    dense_cycles, cycles : float
        Cycles summed within each block, mean over blocks.
    speedup : float
        `dense_cycles` / `cycles`; infinite if `cycles` is 0.
    utilisation : float
        Share of the array's multiplications that use a nonzero weight; 0 if `cycles` is 0.
    denser_columns, denser_kept : float or None
        Share of denser columns, and share of the kept weights in them (ViTCoD).
    memory_bound : int or None
        Number of linears bound by memory (roofline).
    dense_bytes, bytes : float or None
        Bytes summed within each block, mean over blocks (roofline).
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
    """Summarize at least one linear, all under one dataflow.

    Parameters
    ----------
    linears : sequence of (workload, cost)
    blocks : int
        Number of blocks that hold the linears.
    """
    workloads, costs = [workload for workload, _ in linears], [cost for _, cost in linears]
    dense, cycles = sum(cost.dense_cycles for cost in costs), sum(cost.cycles for cost in costs)
    useful, pes = sum(cost.useful for cost in costs), costs[0].pes
    weights, kept = sum(workload.weights for workload in workloads), sum(workload.kept for workload in workloads)
    splits = [cost.split for cost in costs if cost.split]
    roofs = [cost.roof for cost in costs if cost.roof]
    return Summary(
        linears=len(costs),
        blocks=blocks,
        sparsity=1 - kept / weights if weights else 0.0,
        dense_cycles=dense / blocks,
        cycles=cycles / blocks,
        speedup=dense / cycles if cycles else float("inf"),
        utilisation=useful / (cycles * pes) if cycles else 0.0,
        denser_columns=sum(split.columns for split in splits) / sum(workload.cols for workload in workloads)
        if splits
        else None,
        denser_kept=sum(split.kept for split in splits) / kept if splits and kept else None,
        memory_bound=sum(roof.bound == "memory" for roof in roofs) if roofs else None,
        dense_bytes=sum(roof.dense_bytes for roof in roofs) / blocks if roofs else None,
        bytes=sum(roof.bytes for roof in roofs) / blocks if roofs else None,
    )
