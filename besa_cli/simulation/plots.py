"""One picture of a simulation: cycles and speed-up by linear and block, and the columns of one linear, reordered.

matplotlib is optional: the extra `plot`.
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

_FAR = 30  # the highest bar by the lowest, from where on only logarithms show both
_MOST_LINES = 10  # colours that can be told apart


def require(file: Path) -> None:
    """Find out before any work whether a picture can be drawn.

    Raises
    ------
    UsageError
        The file's name says no kind of picture.
    BesaError
        matplotlib is not installed.
    """
    if file.suffix not in SUFFIXES:
        raise UsageError(f"--plot {file} is no picture", f"give a name that ends in {', '.join(SUFFIXES)}")
    if not file.parent.is_dir():
        raise BesaError(f"cannot write {file}: there is no directory {file.parent}", "make it, or name another place")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BesaError("--plot needs matplotlib, which is not installed", "pip install 'besa-cli[plot]'") from error


def draw(found: Sequence[BlockCost], request: SimulationRequest, file: Path, *, title: str) -> None:
    """Draw a simulation of at least one linear into a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(
        f"{title}: --func {request.func} on the {request.accelerator.title}, batch {request.settings.batch}"
    )
    axes = figure.subplots(2, 2)
    draw_means(axes[0, 0], found, request)
    draw_blocks(axes[0, 1], found, request, "cycles")
    draw_blocks(axes[1, 0], found, request, "speedup")
    linears = [linear for block in found for linear in block.linears]
    draw_columns(axes[1, 1], linears[len(linears) // 2], request)
    disk.publish(file, lambda temporary: _save(figure, temporary, file.suffix))


def _save(figure: "Figure", place: Path, suffix: str) -> None:
    figure.savefig(place, format=suffix.removeprefix("."), dpi=150)


def draw_means(axes: "Axes", found: Sequence[BlockCost], request: SimulationRequest) -> None:
    """Mean cycles by linear: a bar for the dense linear and one for the pruned one under each dataflow."""
    width = 0.8 / (2 * len(request.dataflows))
    heights: list[float] = []
    for number, name in enumerate(request.dataflows):
        means = {label: one for label, one in summaries(found, name).items() if label != "all"}
        places = np.arange(len(means)) + 2 * number * width
        dense, sparse = [one.dense_cycles for one in means.values()], [one.cycles for one in means.values()]
        axes.bar(places, dense, width, label=f"{name}, dense", alpha=0.5)
        axes.bar(places + width, sparse, width, label=name)
        heights += [height for height in (*dense, *sparse) if height]
        axes.set_xticks(np.arange(len(means)) + 0.4 - width / 2, list(means))
    axes.set_ylabel("cycles, mean over blocks")
    if heights and max(heights) > _FAR * min(heights):
        axes.set_yscale("log")  # otherwise from 0, so that a bar twice as high is twice as much
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=min(len(request.dataflows), 4))


def draw_blocks(axes: "Axes", found: Sequence[BlockCost], request: SimulationRequest, figure: str) -> None:
    """Cycles or speed-up by block under the first dataflow, a line a linear."""
    labels = ordered({linear.label for block in found for linear in block.linears})[:_MOST_LINES]
    for label in labels:
        points = []
        for block in found:
            costs = [linear.costs[request.dataflows[0]] for linear in block.linears if linear.label == label]
            dense, cycles = sum(cost.dense_cycles for cost in costs), sum(cost.cycles for cost in costs)
            if costs:
                points.append((block.index, cycles if figure == "cycles" else dense / max(cycles, 1)))
        axes.plot([index for index, _ in points], [value for _, value in points], marker=".", label=label)
    axes.set_xlabel("block")
    axes.set_ylabel(f"{'cycles' if figure == 'cycles' else 'speed-up'}, {request.dataflows[0]}")
    axes.legend(fontsize="small", ncols=2)


def draw_columns(axes: "Axes", linear: LinearCost, request: SimulationRequest) -> None:
    """The share of kept weights in each column of one linear, denser columns first as the relabelling has them."""
    counted, threshold = linear.workload, request.settings.threshold
    order = relabelling(counted.kept_by_column, counted.rows, threshold)
    share = counted.kept_by_column[order] / max(counted.rows, 1)
    front = int(denser(counted.kept_by_column, counted.rows, threshold).sum())
    axes.fill_between(np.arange(front), share[:front], step="mid", label=f"{front} denser")
    axes.fill_between(np.arange(front, len(share)), share[front:], step="mid", label=f"{len(share) - front} sparser")
    axes.axhline(threshold, color="black", linewidth=0.8, label="threshold")
    axes.set_xlabel(f"columns of {linear.name}, block {linear.block}, reordered")
    axes.set_ylabel("share of rows kept")
    axes.set_ylim(0, 1)
    axes.legend(fontsize="small")
