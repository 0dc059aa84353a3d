"""Figures of a report, drawn with matplotlib: each is a drawing on axes, the same for the page and for PNG files.

matplotlib is optional (extra `plot`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FAR = 8  # ratio of the largest to the smallest value above which an axis is logarithmic
_LINE = 1.6
_DEPTHS = 5  # colours of the blocks of a learning curve
_MARKERS = "osD^vP*X"


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a figure: text and axes, grid lines, and the series."""

    ink: str
    line: str
    series: tuple[str, ...]

    def color(self, number: int) -> str:
        """Return the colour of a series; after the last they begin again."""
        return self.series[number % len(self.series)]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Figure with what its readers need who cannot see it.

    Attributes
    ----------
    name : str
        Stem of the file of the PNG.
    title : str
    about : str
        What it shows, in a sentence.
    draw : function of axes and theme
    header, rows
        The same figures as a table.
    size : (float, float)
        Inches.
    """

    name: str
    title: str
    about: str
    draw: "Callable[[Axes, Theme], None]"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    size: tuple[float, float] = (4.6, 3.1)


@dataclass(frozen=True, kw_only=True)
class Point:
    """Model in the plane of size and quality: bytes in MB, and a figure that is better the lower it is.

    `number` chooses colour and marker, the same in all figures.
    """

    name: str
    number: int
    megabytes: float
    loss: float


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other point beats in both size and loss, smallest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.megabytes, each.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def draw_frontier(points: Sequence[Point], label: str, axes: "Axes", theme: Theme) -> None:
    """Draw models by their size and quality, with a line through those that no other beats."""
    ends = frontier(points)
    axes.plot(
        [point.megabytes for point in ends],
        [point.loss for point in ends],
        color=theme.line,
        linewidth=_LINE,
        linestyle="--",
        zorder=1,
    )
    for point in points:
        axes.scatter(
            [point.megabytes],
            [point.loss],
            s=42,
            color=theme.color(point.number),
            marker=_MARKERS[point.number % len(_MARKERS)],
            zorder=2,
            label=point.name,
            gid=f"tip: {point.name}: {point.megabytes:.1f} MB, {label} {point.loss:.4g}",
        )
    axes.set_xlim(left=0, right=1.06 * max(point.megabytes for point in points))
    axes.set_xlabel("size, MB")
    axes.set_ylabel(label)
    _scale(axes, [point.loss for point in points])
    _legend(axes)


def draw_errors(before: Mapping[int, float], after: Mapping[int, float], axes: "Axes", theme: Theme) -> None:
    """Draw the error of each block with uniform masks and as delivered."""
    if before:
        axes.plot(
            list(before), list(before.values()), color=theme.color(1), linewidth=_LINE, linestyle="--", marker="o",
            markersize=2.5, label="uniform",
        )  # fmt: skip
    axes.plot(
        list(after), list(after.values()), color=theme.color(0), linewidth=_LINE, marker="o", markersize=3,
        label="as delivered",
    )  # fmt: skip
    axes.set_xlabel("block")
    axes.set_ylabel("relative error")
    _scale(axes, [*before.values(), *after.values()])
    _legend(axes)


def draw_error_lines(runs: Mapping[str, Mapping[int, float]], axes: "Axes", theme: Theme) -> None:
    """Draw the delivered error of each block, a line for each run."""
    for number, (name, errors) in enumerate(runs.items()):
        axes.plot(
            list(errors), list(errors.values()), color=theme.color(number), linewidth=_LINE,
            marker=_MARKERS[number % len(_MARKERS)], markersize=3, label=name,
        )  # fmt: skip
    axes.set_xlabel("block")
    axes.set_ylabel("relative error")
    _scale(axes, [error for errors in runs.values() for error in errors.values()])
    _legend(axes)


def draw_curves(curves: Mapping[int, Sequence[float]], axes: "Axes", theme: Theme) -> None:
    """Draw the loss over the learning steps, a line for each block, blocks of one depth in one colour."""
    numbers, seen = list(curves), set()
    for position, losses in enumerate(curves.values()):
        depth = position * _DEPTHS // len(numbers)
        group = [number for place, number in enumerate(numbers) if place * _DEPTHS // len(numbers) == depth]
        steps = [100 * (step + 0.5) / len(losses) for step in range(len(losses))]
        label = f"blocks {group[0]}–{group[-1]}" if len(group) > 1 else f"block {group[0]}"
        axes.plot(steps, list(losses), color=theme.color(depth), linewidth=0.9, label=None if depth in seen else label)
        seen.add(depth)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the steps, %")
    axes.set_ylabel("loss")
    _scale(axes, [loss for losses in curves.values() for loss in losses])
    _legend(axes)


def draw_cycles(flows: Mapping[str, Mapping[str, tuple[float, float]]], axes: "Axes", theme: Theme) -> None:
    """Draw dense and pruned cycles of each linear, as bars from the top: those of each dataflow in its colour."""
    labels = list(dict.fromkeys(label for means in flows.values() for label in means))
    height = 0.8 / (2 * len(flows))
    for number, (flow, means) in enumerate(flows.items()):
        for which, name, color in ((0, "dense", theme.line), (1, "pruned", theme.color(number))):
            places = [labels.index(label) + (2 * number + which) * height - 0.4 + height / 2 for label in means]
            values = [cycles[which] for cycles in means.values()]
            axes.barh(places, values, height, color=color, label=f"{flow}, {name}" if len(flows) > 1 else name)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("cycles, mean over blocks")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(visible=False, axis="y")
    _legend(axes)


def draw_map(names: Sequence[str], shares: Mapping[int, Sequence[float | None]], axes: "Axes", theme: Theme) -> None:
    """Draw the sparsity of each linear in each block as a heat map."""
    values = [[float("nan") if share is None else 100 * share for share in row] for row in shares.values()]
    image = axes.imshow(values, aspect="auto", cmap="Blues", interpolation="nearest")
    axes.set_xticks(range(len(names)), names, rotation=45 if len(names) > 8 else 0)
    axes.set_yticks(range(len(shares)), [str(index) for index in shares], fontsize=6 if len(shares) > 12 else 8)
    axes.set_ylabel("block")
    axes.grid(visible=False)
    bar = axes.figure.colorbar(image, ax=axes)
    bar.set_label("sparsity, %", color=theme.ink)
    bar.ax.tick_params(colors=theme.ink)


def _scale(axes: "Axes", values: Sequence[float]) -> None:
    """Give an axis of losses a logarithmic scale if they lie far apart, else one from 0."""
    positive = [value for value in values if value > 0]
    if positive and len(positive) == len(values) and max(positive) > _FAR * min(positive):
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(0, 1.1 * max(values, default=1) or 1)


def _legend(axes: "Axes") -> None:
    """Put a legend below the axes if there are several series."""
    from matplotlib.figure import Figure

    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1 and isinstance(axes.figure, Figure):
        longest = max(len(label) for label in labels)
        columns = next(count for count, width in ((1, 24), (2, 14), (3, 0)) if longest > width)
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=1.4)
