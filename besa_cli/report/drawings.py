"""Drawings of a report, made from what was read: each with its title, its sentence and its table."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from besa_cli.console import human_bytes, human_divergence, human_perplexity, human_share, short_names
from besa_cli.report import figures
from besa_cli.report.figures import Drawing, Point
from besa_cli.report.models import ReportedModel
from besa_cli.report.rows import SparsityMap
from besa_cli.report.runs import Collected, ReportedRun, ReportedStage, Simulation
from besa_cli.system import disk

if TYPE_CHECKING:
    from besa_cli.evaluation.comparison import Column

_MOST_FRONTIERS = 6
_QUARTERS = (0, 1, 2, 3, 4)
_UNITS = {"perplexity": "perplexity", "kl": "KL divergence, nats a token"}


def frontiers(collected: Collected, models: Sequence[ReportedModel]) -> list[Drawing]:
    """Return the figures of quality against size, one for each text and measure with two models or more."""
    columns = [(title, column) for title, column in collected.comparison.columns.items() if column.metric in _UNITS]
    drawn = [_frontier(title, column, models) for title, column in columns]
    return [drawing for drawing in drawn if drawing is not None][:_MOST_FRONTIERS]


def _frontier(title: str, column: "Column", models: Sequence[ReportedModel]) -> Drawing | None:
    points = [
        Point(name=_shown(model.title), number=number, megabytes=model.packed / 1e6, loss=model.figures[column])
        for number, model in enumerate(models)
        if model.packed is not None and column in model.figures
    ]
    if len(points) < 2:
        return None
    ends = figures.frontier(points)
    measure, data = heading(title, column)
    human = human_perplexity if column.metric == "perplexity" else human_divergence
    return Drawing(
        name=disk.safe_name(f"frontier-{column.metric}-{column.name}").replace(" ", "-"),
        title=f"{measure} and size",
        about=f"{data}. Lower and further left is better; the dashed line joins models that no other beats in both.",
        draw=partial(figures.draw_frontier, points, _UNITS[column.metric]),
        header=("model", "size", _UNITS[column.metric], "unbeaten"),
        rows=[
            (point.name, human_bytes(round(point.megabytes * 1e6)), human(point.loss), "yes" if point in ends else "no")
            for point in points
        ],
        size=(4.6, 3.0 + 0.11 * len(points)),
    )


def heading(title: str, column: "Column") -> tuple[str, str]:
    """Return the name of a column's measure, and the data and settings that it was measured with."""
    names = {"perplexity": "Perplexity", "kl": "KL divergence", "same_token": "Same token as dense"}
    addition = {"kl": " KL", "same_token": " same token"}.get(column.metric, "")
    name = names.get(column.metric, column.metric)
    return name, title.replace(column.name + addition, column.name, 1) if column.metric in names else title


def errors(run: ReportedRun, stage: ReportedStage) -> Drawing | None:
    """Return the figure of the errors of a stage's blocks, or None if none was measured."""
    before = {block.index: block.error_before for block in stage.blocks if block.error_before is not None}
    after = {block.index: block.error_after for block in stage.blocks if block.error_after is not None}
    if not after:
        return None
    return Drawing(
        name=disk.safe_name(f"errors-{run.title}-{stage.name}"),
        title="Error by block",
        about="Squared error of each block's output relative to its size, mean over the calibration tokens"
        + (", with uniform masks and as delivered." if before else "."),
        draw=partial(figures.draw_errors, before, after),
        header=("block", "uniform", "as delivered"),
        rows=[(str(index), _scientific(before.get(index)), _scientific(after[index])) for index in after],
    )


def error_lines(collected: Collected) -> Drawing | None:
    """Return the figure of the errors of several runs by block, or None if fewer than two have some."""
    lines = {}
    for run in collected.runs:
        stage = run.mapped
        measured = (
            {}
            if stage is None
            else {block.index: block.error_after for block in stage.blocks if block.error_after is not None}
        )
        if measured:
            lines[_shown(run.title)] = measured
    if len(lines) < 2:
        return None
    blocks = sorted({index for measured in lines.values() for index in measured})
    return Drawing(
        name="errors",
        title="Error by block",
        about="Squared error of each block's output relative to its size, as delivered, run by run.",
        draw=partial(figures.draw_error_lines, lines),
        header=("block", *lines),
        rows=[(str(index), *(_scientific(measured.get(index)) for measured in lines.values())) for index in blocks],
        size=(4.6, 3.0 + 0.11 * len(lines)),
    )


def curves(run: ReportedRun, stage: ReportedStage) -> Drawing | None:
    """Return the figure of the learning curves of a stage, or None if none was recorded."""
    recorded = {block.index: block.curve for block in stage.blocks if block.curve}
    if not recorded:
        return None
    return Drawing(
        name=disk.safe_name(f"learning-{run.title}-{stage.name}"),
        title="Learning curves",
        about="Loss of each block over the learning steps; blocks of one depth have one colour.",
        draw=partial(figures.draw_curves, recorded),
        header=("block", "start", "quarter", "half", "three quarters", "end"),
        rows=[
            (str(index), *(_scientific(losses[(len(losses) - 1) * quarter // 4]) for quarter in _QUARTERS))
            for index, losses in recorded.items()
        ],
    )


def cycles(run: ReportedRun, simulation: Simulation, number: int) -> Drawing | None:
    """Return the figure of a simulation, or None if it has no linears."""
    flows = {
        flow: {label: (mean["dense_cycles"], mean["cycles"]) for label, mean in means.items() if label != "all"}
        for flow, means in simulation["mean"].items()
    }
    flows = {flow: means for flow, means in flows.items() if means}
    if not flows:
        return None
    bars = sum(2 * len(means) for means in flows.values())
    return Drawing(
        name=disk.safe_name(f"cycles-{run.title}-{number}"),
        title=f"Simulated cycles, {simulation['func']}",
        about=f"On the {simulation['accelerator'].get('title', 'accelerator')}, batch "
        f"{simulation['settings'].get('batch', 1)}, mean over the blocks.",
        draw=partial(figures.draw_cycles, flows),
        header=("dataflow", "linear", "dense cycles", "cycles", "speed-up"),
        rows=[
            (
                flow,
                label,
                f"{mean['dense_cycles']:,.0f}",
                f"{mean['cycles']:,.0f}",
                "-" if mean["speedup"] is None else f"{mean['speedup']:.2f} ×",
            )
            for flow, means in simulation["mean"].items()
            for label, mean in means.items()
        ],
        size=(4.6, max(2.4, 1.1 + 0.16 * bars)),
    )


def heat_map(run: ReportedRun, counted: SparsityMap) -> Drawing:
    """Return the heat map of a run's sparsities, for a file; the page has a table in its place."""
    shares = {
        index: [cells[name].sparsity if name in cells else None for name in counted.names]
        for index, cells in counted.blocks.items()
    }
    names = short_names(counted.names)
    return Drawing(
        name=disk.safe_name(f"sparsity-{run.title}"),
        title=f"Sparsity, {run.title}",
        about="Share of pruned weights of each linear in each block.",
        draw=partial(figures.draw_map, names, shares),
        header=("block", *names),
        rows=[
            (str(index), *("-" if share is None else human_share(share) for share in row))
            for index, row in shares.items()
        ],
        size=(max(4.6, 0.5 * len(names) + 1.5), max(3.0, 0.14 * len(shares) + 1.2)),
    )


def _shown(name: str) -> str:
    """Return a name as matplotlib puts it into a legend, from which it leaves out those that begin with ``_``."""
    return f" {name}" if name.startswith("_") else name


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"
