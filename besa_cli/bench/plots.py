"""Picture of a measurement: prefill, decode, and memory of every contender.

matplotlib is optional (extra `plot`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from besa_cli.bench.rounds import Speeds
from besa_cli.simulation.plots import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(results: Sequence[Speeds], bandwidth: float, file: Path, *, title: str) -> None:
    """Draw a measurement to a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(f"{title}; memory read at {bandwidth / 1e9:.1f} GB/s")
    panels: tuple[tuple[str, Callable[[Speeds], float]], ...] = (
        ("prefill, tokens per second", lambda each: each.prefill),
        ("decode, tokens per second", lambda each: each.decode),
        ("resident memory, GB", lambda each: each.resident / 1e9),
    )
    for axes, (label, value) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _bars(axes, results, label, value)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, file)


def _bars(axes: "Axes", results: Sequence[Speeds], label: str, value: Callable[[Speeds], float]) -> None:
    """Draw a group of bars for each workload, with one bar for each contender."""
    names = list(dict.fromkeys(each.name for each in results))
    workloads = list(dict.fromkeys(each.workload for each in results))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        own = {each.workload: value(each) for each in results if each.name == name}
        places = [index + (number - (len(names) - 1) / 2) * width for index in range(len(workloads))]
        axes.bar(places, [own.get(workload, 0.0) for workload in workloads], width, label=name)
    axes.set_title(label)
    axes.set_xticks(range(len(workloads)), [f"{each.prompt}+{each.new}\nbatch {each.batch}" for each in workloads])
