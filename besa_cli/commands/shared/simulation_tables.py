"""Tables of `besa simulate`: means as in Table 4 of the paper, a line for each block, and the dead neurons."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from besa_cli.console import Cell, Console, human_bytes, human_share

if TYPE_CHECKING:
    from besa_cli.sim.cost import Cost
    from besa_cli.sim.summary import Summary
    from besa_cli.simulation.run import BlockCost, LinearCost, SimulationRequest

Costs = Sequence["BlockCost"]


def show(costs: Costs, request: "SimulationRequest", console: Console, *, by_block: bool | None) -> None:
    """Print the costs; `by_block` None prints a line for each block if there is only one linear."""
    machine = request.accelerator
    console.line(
        f"{machine.title}: {machine.pes:,} elements; batch {request.settings.batch}, "
        f"weights of {request.settings.weight_bits or machine.weight_bits} bits"
    )
    labels = {linear.label for block in costs for linear in block.linears}
    if request.func == "sparsity":
        _show_sparsity(costs, console)
        return
    if request.func == "dense":
        _show_means(costs, request, console, {"dense cycles": lambda summary: f"{summary.dense_cycles:.2f}"})
        return
    if by_block or (by_block is None and len(labels) == 1):
        _show_blocks(costs, request, console)
    _show_means(costs, request, console, _FIGURES)
    _show_dead(costs, request, console)


_FIGURES: "dict[str, Callable[[Summary], Cell]]" = {
    "dense cycles": lambda summary: f"{summary.dense_cycles:.2f}",
    "cycles": lambda summary: f"{summary.cycles:.2f}",
    "speed-up": lambda summary: f"{summary.speedup:.2f}",
    "utilisation %": lambda summary: _percent(summary.utilisation),
    "denser columns %": lambda summary: _percent(summary.denser_columns),
    "kept in them %": lambda summary: _percent(summary.denser_kept),
    "bound by memory": lambda summary: (
        None if summary.memory_bound is None else f"{summary.memory_bound}/{summary.linears}"
    ),
    "bytes": lambda summary: None if summary.bytes is None else human_bytes(round(summary.bytes)),
}


def _show_means(
    costs: Costs, request: "SimulationRequest", console: Console, figures: "dict[str, Callable[[Summary], Cell]]"
) -> None:
    """Print a column for each linear and, below each other, the figures that each dataflow has."""
    from besa_cli.simulation.run import summaries

    rows: list[list[Cell]] = []
    columns: list[str] = []
    for name in request.dataflows:
        means = summaries(costs, name)
        if not rows:
            columns = list(means)
            rows.append(["-", "sparsity %", *(_percent(summary.sparsity) for summary in means.values())])
        for title, figure in figures.items():
            cells = [figure(summary) for summary in means.values()]
            if any(cell is not None for cell in cells):
                rows.append([name, title, *cells])
    console.table("", ["dataflow", "mean over blocks", *columns], rows)


def _show_sparsity(costs: Costs, console: Console) -> None:
    from besa_cli.simulation.run import ordered

    linears = [linear for block in costs for linear in block.linears]
    labels = ordered({linear.label for linear in linears})
    groups = [[linear.workload for linear in linears if linear.label == label] for label in labels]
    groups.append([linear.workload for linear in linears])
    figures: dict[str, Callable[[list[float]], float]] = {
        "smallest": min,
        "mean": lambda shares: sum(shares) / len(shares),
        "largest": max,
    }
    rows: list[list[Cell]] = [
        [title, *(_percent(figure([workload.sparsity for workload in group])) for group in groups)]
        for title, figure in figures.items()
    ]
    overall = (
        1 - sum(workload.kept for workload in group) / max(sum(workload.weights for workload in group), 1)
        for group in groups
    )
    rows.append(["of all weights", *map(_percent, overall)])
    console.table("sparsity % of single linears", ["over blocks", *labels, "all"], rows)


def _show_blocks(costs: Costs, request: "SimulationRequest", console: Console) -> None:
    """Print a line for every linear of every block and every dataflow."""
    header = (
        "block", "linear", "dataflow", "sparsity %", "dense cycles", "cycles", "speed-up", "denser/sparser columns",
        "denser lanes", "utilisation %", "bound",
    )  # fmt: skip
    rows = [
        [linear.block, linear.label, name, _percent(linear.workload.sparsity), *_cells(linear, cost)]
        for block in costs
        for linear in block.linears
        for name, cost in linear.costs.items()
    ]
    used = [index for index in range(len(header)) if any(row[index] is not None for row in rows)]
    console.table("", [header[index] for index in used], [[row[index] for index in used] for row in rows])
    console.line("")


def _cells(linear: "LinearCost", cost: "Cost") -> list[Cell]:
    split, cols = cost.split, linear.workload.cols
    return [
        cost.dense_cycles,
        cost.cycles,
        f"{cost.speedup:.2f}",
        f"{split.columns}/{cols - split.columns}" if split else None,
        " ".join(map(str, split.lanes)) if split else None,
        _percent(cost.utilisation),
        cost.roof.bound if cost.roof else None,
    ]


def _show_dead(costs: Costs, request: "SimulationRequest", console: Console) -> None:
    """Print the dead neurons of all MLPs and the cycles that removing them would save in each dataflow."""
    from besa_cli.simulation.record import dead_neurons

    totals = dead_neurons(costs, request)
    if totals is None:
        return
    if not totals["dead"]:
        console.line(f"dead neurons: none of {totals['neurons']:,}")
        return
    cycles = ", ".join(f"{count / len(costs):.2f} ({name})" for name, count in totals["cycles"].items())
    console.line(
        f"dead neurons: {totals['dead']:,} of {totals['neurons']:,} "
        f"({human_share(totals['dead'] / totals['neurons'])}), in {len(totals['places'])} of {totals['mlps']} MLPs"
    )
    console.line(
        f"  removing them drops {totals['weights']:,} weights, {totals['kept']:,} of which are not zero; "
        f"cycles saved, mean over blocks: {cycles}"
    )


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.2f}"
