"""Figure of a simulation: cycles and speed-up by linear and block, and the reordered columns of one linear.

matplotlib is optional (extra `plot`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from besa_cli.errors import BesaError, UsageError
from besa_cli.sim.columns import denser, relabelling
from besa_cli.simulation.run import BlockCost, LinearCost, SimulationRequest, ordered, summaries
from besa_cli.system import disk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")

_FAR = 30  # ratio of the highest to the lowest bar above which the axis is logarithmic
_MOST_LINES = 10  # number of distinguishable colours


def require(file: Path) -> None:
    """Check before any work that the figure can be drawn and written.

    Raises
    ------
    UsageError
        The suffix of the file is not in `SUFFIXES`.
    BesaError
        The directory does not exist, or matplotlib is not installed.
    """
    if file.suffix not in SUFFIXES:
        raise UsageError(f"--plot {file} is not a picture file", f"give a name that ends in {', '.join(SUFFIXES)}")
    if not file.parent.is_dir():
        raise BesaError(
            f"cannot write {file}: the directory {file.parent} does not exist", "create it, or name another file"
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BesaError("--plot needs matplotlib, which is not installed", "pip install 'besa-cli[plot]'") from error


def draw(block_costs: Sequence[BlockCost], request: SimulationRequest, file: Path, *, title: str) -> None:
    """Draw a simulation of at least one linear to a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(
        f"{title}: --func {request.func} on the {request.accelerator.title}, batch {request.settings.batch}"
    )
    axes = figure.subplots(2, 2)
    draw_means(axes[0, 0], block_costs, request)
    draw_blocks(axes[0, 1], block_costs, request, "cycles")
    draw_blocks(axes[1, 0], block_costs, request, "speedup")
    linears = [linear for block in block_costs for linear in block.linears]
    draw_columns(axes[1, 1], linears[len(linears) // 2], request)
    save(figure, file)


def save(figure: "Figure", file: Path) -> None:
    """Write a figure to a file, whole or not at all."""
    disk.publish(file, lambda path: figure.savefig(path, format=file.suffix.removeprefix("."), dpi=150))


def draw_means(axes: "Axes", block_costs: Sequence[BlockCost], request: SimulationRequest) -> None:
    """Draw the mean cycles by label: for each dataflow a bar for the dense linear and one for the pruned linear."""
    width = 0.8 / (2 * len(request.dataflows))
    heights: list[float] = []
    for number, name in enumerate(request.dataflows):
        means = {label: mean for label, mean in summaries(block_costs, name).items() if label != "all"}
        positions = np.arange(len(means)) + 2 * number * width
        dense, sparse = [mean.dense_cycles for mean in means.values()], [mean.cycles for mean in means.values()]
        axes.bar(positions, dense, width, label=f"{name}, dense", alpha=0.5)
        axes.bar(positions + width, sparse, width, label=name)
        heights += [height for height in (*dense, *sparse) if height]
        axes.set_xticks(np.arange(len(means)) + 0.4 - width / 2, list(means))
    axes.set_ylabel("cycles, mean over blocks")
    if heights and max(heights) > _FAR * min(heights):
        axes.set_yscale("log")  # else linear from 0, so that heights are proportional to cycles
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=min(len(request.dataflows), 4))


def draw_blocks(axes: "Axes", block_costs: Sequence[BlockCost], request: SimulationRequest, figure: str) -> None:
    """Draw the `figure` ("cycles" or "speedup") by block under the first dataflow, one line per label."""
    labels = ordered({linear.label for block in block_costs for linear in block.linears})[:_MOST_LINES]
    for label in labels:
        points = []
        for block in block_costs:
            costs = [linear.costs[request.dataflows[0]] for linear in block.linears if linear.label == label]
            dense, cycles = sum(cost.dense_cycles for cost in costs), sum(cost.cycles for cost in costs)
            if costs:
                points.append((block.index, cycles if figure == "cycles" else dense / max(cycles, 1)))
        axes.plot([index for index, _ in points], [value for _, value in points], marker=".", label=label)
    axes.set_xlabel("block")
    axes.set_ylabel(f"{'cycles' if figure == 'cycles' else 'speed-up'}, {request.dataflows[0]}")
    axes.legend(fontsize="small", ncols=2)


def draw_columns(axes: "Axes", linear: LinearCost, request: SimulationRequest) -> None:
    """Draw the share of kept weights in each column of one linear, denser columns first (`columns.relabelling`)."""
    workload, threshold = linear.workload, request.settings.threshold
    order = relabelling(workload.kept_by_column, workload.rows, threshold)
    share = workload.kept_by_column[order] / max(workload.rows, 1)
    front = int(denser(workload.kept_by_column, workload.rows, threshold).sum())
    axes.fill_between(np.arange(front), share[:front], step="mid", label=f"{front} denser")
    axes.fill_between(np.arange(front, len(share)), share[front:], step="mid", label=f"{len(share) - front} sparser")
    axes.axhline(threshold, color="black", linewidth=0.8, label="threshold")
    axes.set_xlabel(f"columns of {linear.name}, block {linear.block}, reordered")
    axes.set_ylabel("share of rows kept")
    axes.set_ylim(0, 1)
    axes.legend(fontsize="small")
