"""From measured cells to ABLATIONS.md and the two plots; the same lines give the same bytes."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality.ablation_plan import (
    DENSE,
    Cell,
    Claim,
    Experiment,
    Line,
    Setting,
    Setup,
    base_of,
    claims,
    experiments,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Found = Mapping[Cell, Line]
Paper = Mapping[str, Any]  # paper.json
Curves = dict[str, list[tuple[float, float, float]]]  # series → (point, perplexity, deviation)

FIGURES = {"sparsity": "linear", "samples": "log"}  # experiment → scale of its axis
COLOURS = {"BESA": "tab:blue", "Wanda": "tab:orange", "SparseGPT": "tab:green"}
NONE = "-"
ALIKE = 0.01  # relative differences of perplexity up to this count as none


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Mean, and sample standard deviation (None of a single value), of `n` seeds."""

    mean: float
    deviation: float | None
    n: int

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:,.2f}"
        return f"{self.mean:,.2f}{spread} (n={self.n})"


def summary(values: Sequence[float]) -> Summary | None:
    """What a table shows of the seeds' values; None where there are none."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Summary(mean=statistics.mean(values), deviation=deviation, n=len(values))


def lines_of(setting: Setting | None, found: Found) -> list[Line]:
    """The lines of one setting, by seed."""
    return [found[cell] for cell in sorted(found, key=lambda cell: cell.seed) if cell.setting == setting]


def perplexity(setting: Setting | None, found: Found, dataset: str) -> Summary | None:
    """The perplexity of one setting over the seeds."""
    values = (line["perplexity"] for line in lines_of(setting, found))
    return summary([each[dataset] for each in values if dataset in each])


def measured_sets(found: Found, paper: Paper) -> list[str]:
    """The evaluation sets there are figures on, the paper's before others; the paper's first where there are none."""
    names = {name for line in found.values() for name in line["perplexity"]}
    known = list(paper["dense"])
    return [name for name in known if name in names] + sorted(names - set(known)) or known[:1]


def markdown(setup: Setup, found: Found, paper: Paper) -> str:
    """The whole page."""
    planned = experiments(setup.samples)
    parts = ["# Ablations", _head(setup, found, paper)]
    dataset = measured_sets(found, paper)[0]
    said = [sentence for each in claims(setup.samples) if (sentence := judged(each, found, dataset))]
    if said:
        parts += ["## What holds here of what the paper says", "\n".join(f"- {sentence}" for sentence in said)]
    for name, experiment in planned.items():
        beside = paper["experiments"].get(name, {"perplexity": {}})
        parts.append(f"## {experiment.title}" + (f" (the paper's {beside['source']})" if "source" in beside else ""))
        parts.append(_table(experiment, found, paper, beside["perplexity"]))
        parts += [beside["note"]] if "note" in beside else []
        if name in FIGURES and curves(experiment, found, dataset):
            parts.append(f"![Perplexity by {experiment.axis}](figures/{name}.svg)")
    return "\n\n".join([*parts, "## The cells", _cells(planned.values(), found)]) + "\n"


def judged(claim: Claim, found: Found, dataset: str) -> str | None:
    """A sentence on whether a claim of the paper holds on the seeds that both settings have; None where none has."""
    parts, holds, missing = [], True, []
    chosen = {line["seed"]: line["perplexity"].get(dataset) for line in lines_of(claim.chosen, found)}
    for name, setting in claim.others.items():
        other = {line["seed"]: line["perplexity"].get(dataset) for line in lines_of(setting, found)}
        seeds = sorted(seed for seed in chosen.keys() & other.keys() if chosen[seed] and other[seed])
        if not seeds:
            missing.append(name)
            continue
        ratios = [other[seed] / chosen[seed] for seed in seeds]
        limit = 1 - ALIKE if claim.enough else 1.0
        behind = sum(ratio > limit for ratio in ratios)
        holds = holds and behind == len(seeds)
        ours, theirs = (statistics.mean(each[seed] for seed in seeds) for each in (chosen, other))
        verb = "no better than 1 %" if claim.enough else "worse"
        parts.append(f"{name} {theirs:.2f} against {ours:.2f}, {verb} with {behind} of {len(seeds)} seeds")
    if not parts:
        return None
    parts += [f"not measured: {', '.join(missing)}"] if missing else []
    verdict = "does not hold" if not holds else "not settled" if missing else "holds"
    return f"**{claim.text}: {verdict}** ({'; '.join(parts)})."


def _head(setup: Setup, found: Found, paper: Paper) -> str:
    """What all figures have in common, from the setup and from what the lines say of themselves."""
    about = setup.record()
    windows = "all" if setup.windows is None else f"the first {setup.windows}"
    pruned = [line for cell, line in found.items() if cell != DENSE]
    files = _distinct(source["file"] for line in pruned for source in line["calibration"]["sources"])
    made = {
        "computed": _distinct("{dtype} on {device}".format(**line["compute"]) for line in pruned),
        "machines": _distinct(line["machine"] for line in pruned),
        "versions": _distinct(" ".join(pair) for line in pruned for pair in line["versions"].items()),
        "commits": _distinct(line["commit"] for line in pruned),
    }
    data = ", ".join(about["data"])
    drawn_from = data if files in (data, NONE) else f"{data} ({files})"
    return "\n".join(
        [
            "Written by `benchmarks/quality/ablations.py` from `ablations.jsonl` and `paper.json`:",
            "",
            f"    {_command(setup)}",
            "",
            f"- Model: {about['model']}; dense: {_dense(found)}.",
            f"- Calibration: {setup.samples} × {setup.seqlen} tokens of {drawn_from} where nothing else is said. The "
            "seed draws them and leads the learning.",
            "- Sparsity: half of the weights where nothing else is said.",
            f"- BESA: `--loss {base_of(setup.samples).loss}` where nothing else is said.",
            f"- Perplexity: windows of {setup.context} tokens without overlap, {windows}; mean ± sample standard "
            f"deviation over n seeds; {NONE} where nothing was measured.",
            *(f"- {name.capitalize()}: {values}." for name, values in made.items()),
            f"- Beside: {paper['model']} in the paper (dense: {_named(paper['dense'])}), {paper['calibration']}, "
            f"one run each. {paper['source']}.",
        ]
    )


def _command(setup: Setup) -> str:
    """What writes this page anew."""
    about = setup.record()
    words = ["--report", "--model", about["model"], "--data", *about["data"], "--samples", setup.samples]
    words += ["--seqlen", setup.seqlen, "--context", setup.context]
    words += ["--windows", setup.windows or "all", "--dtype", setup.dtype, "--device", setup.device]
    return " ".join(map(str, ["python -m benchmarks.quality.ablations", *words]))


def _dense(found: Found) -> str:
    return _named(found[DENSE]["perplexity"]) if DENSE in found else NONE


def _named(perplexities: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in perplexities.items())


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values))) or NONE


def _table(experiment: Experiment, found: Found, paper: Paper, beside: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a point; a column a series and evaluation set, first those measured, then the paper's."""
    sets = measured_sets(found, paper)
    own = [(series, dataset) for dataset in sets for series in experiment.series]
    theirs = [(series, dataset) for dataset, columns in beside.items() for series in columns]
    titles = [experiment.axis, *map(", ".join, own), *(f"{paper['model']}: {', '.join(column)}" for column in theirs)]
    rows = []
    for point in experiment.points:
        ours = [perplexity(experiment.settings.get((series, point)), found, dataset) for series, dataset in own]
        printed = [beside[dataset][series].get(point) for series, dataset in theirs]
        figures = [NONE if value is None else f"{value:.2f}" for value in printed]
        rows.append([point, *(NONE if value is None else str(value) for value in ours), *figures])
    return _grid(titles, rows)


def _cells(planned: Iterable[Experiment], found: Found) -> str:
    """What else the lines say: a row a setting that was measured."""
    rows = []
    for setting in dict.fromkeys(each for experiment in planned for each in experiment.settings.values()):
        lines = lines_of(setting, found)
        if not lines:
            continue
        counts = [line["counts"] for line in lines]
        kept, blocks = (sum(each[name] for each in counts) for name in ("blocks_kept_uniform", "blocks"))
        seconds = summary([line["seconds"] for line in lines])
        row = [setting.name, str(len(lines)), _distinct(f"{each['sparsity']:.6f}" for each in counts)]
        row += [f"{kept} of {blocks}" if setting.method == "besa" else NONE, f"{seconds.mean:.0f}" if seconds else NONE]
        rows.append([*row, f"{max(line['peak_memory'] for line in lines) / 1e9:.2f}"])
    titles = ["cell", "n", "sparsity", "blocks with the uniform mask", "seconds of pruning", "peak memory, GB"]
    return _grid(titles, rows) if rows else NONE


def _grid(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def curves(experiment: Experiment, found: Found, dataset: str) -> Curves:
    """The measured points of every series that has any."""
    drawn: Curves = {}
    for (series, point), setting in experiment.settings.items():
        value = perplexity(setting, found, dataset)
        if value is not None:
            drawn.setdefault(series, []).append((float(point), value.mean, value.deviation or 0.0))
    return drawn


def paper_curves(beside: Mapping[str, Mapping[str, float]]) -> Curves:
    """The paper's points, which have no deviation."""
    return {
        series: [(float(point), value, 0.0) for point, value in points.items()] for series, points in beside.items()
    }


def draw(setup: Setup, found: Found, paper: Paper, directory: Path) -> list[Path]:
    """Draw what there are points for, each beside the paper's; returns the files.

    Raises
    ------
    ImportError
        There is no matplotlib.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    dataset, written = measured_sets(found, paper)[0], []
    for name, scale in FIGURES.items():
        experiment = experiments(setup.samples)[name]
        panels = {f"{setup.record()['model']}, {dataset}": curves(experiment, found, dataset)}
        if not any(panels.values()):
            continue
        for theirs, columns in paper["experiments"][name]["perplexity"].items():
            panels[f"{paper['model']}, {theirs} ({paper['experiments'][name]['source']})"] = paper_curves(columns)
        with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):  # the same bytes from the same lines
            figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
            for axes, (title, drawn) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
                _panel(axes, title, drawn, experiment.axis, scale)
            directory.mkdir(parents=True, exist_ok=True)
            written.append(directory / f"{name}.svg")
            figure.savefig(written[-1], metadata={"Date": None, "Creator": None})
    return written


def _panel(axes: "Axes", title: str, drawn: Curves, axis: str, scale: str) -> None:
    """One model's curves, perplexity on a logarithmic scale; a colour a method, dashed where it comes again."""
    from matplotlib.ticker import LogFormatter, NullLocator

    seen: list[str] = []
    for series, points in drawn.items():
        x, mean, deviation = zip(*points, strict=True)
        method = series.split()[0]
        line = axes.errorbar(x, mean, yerr=deviation, label=series, color=COLOURS[method], marker="o", capsize=2)
        line[0].set(linestyle="--" if method in seen else "-", linewidth=1, markersize=3)
        seen.append(method)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.set_xscale(scale)
    ticks = sorted({point for points in drawn.values() for point, *_ in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(title=title, xlabel=axis, ylabel="perplexity")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
