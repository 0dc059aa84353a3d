"""The page of a report: one HTML file of a template, a style sheet and figures, with all text escaped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files

from besa_cli import __version__
from besa_cli.bench.record import RecordedSpeeds, SpeedRecord
from besa_cli.checkpoint import exports, inspection
from besa_cli.checkpoint.manifests import StageManifest
from besa_cli.console import (
    escaped,
    human_bytes,
    human_divergence,
    human_perplexity,
    human_share,
    short_names,
)
from besa_cli.evaluation.comparison import Column
from besa_cli.report import drawings, pictures
from besa_cli.report.figures import Drawing
from besa_cli.report.models import ReportedModel, done, models, name_of, stage_title
from besa_cli.report.rows import SparsityMap
from besa_cli.report.runs import Collected, ReportedRun, ReportedStage, dense_name
from besa_cli.system import redaction

_MOST_CELLS = 1600  # whose distribution is on the page: about 1.2 kB each
_EVEN = 0.001  # range of sparsities below which all cells have one colour


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Figure on the page: a drawing and its SVG, which is empty without matplotlib."""

    drawing: Drawing
    svg: str


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Section of a run.

    Attributes
    ----------
    run : ReportedRun
    counted : SparsityMap or None
        The sparsities of its first stage.
    short : list of str
        The names of the linears in `counted`, abbreviated.
    distributions : bool
        True if the page has room for the distributions over the rows.
    pictures : list of Picture
    """

    run: ReportedRun
    counted: SparsityMap | None
    short: Sequence[str]
    distributions: bool
    pictures: Sequence[Picture]


def all_drawings(collected: Collected, maps: Mapping[int, SparsityMap]) -> list[Drawing]:
    """Return every figure of a report, with unique names; `maps` are the sparsities of runs by their number."""
    found = drawings.frontiers(collected, models(collected))
    compared = drawings.error_lines(collected)
    found += [compared] if compared else []
    for number, run in enumerate(collected.runs):
        found += [drawings.heat_map(run, maps[number])] if number in maps else []
        found += _of_run(run)
    return [
        replace(drawing, name=f"{drawing.name}-{before + 1}") if before else drawing
        for position, drawing in enumerate(found)
        for before in [sum(other.name == drawing.name for other in found[:position])]
    ]


def _of_run(run: ReportedRun) -> list[Drawing]:
    """Return the figures of one run."""
    stage = run.mapped
    found = [drawings.errors(run, stage), drawings.curves(run, stage)] if stage else []
    found += [drawings.cycles(run, each, number) for number, each in enumerate(run.simulations, start=1)]
    return [drawing for drawing in found if drawing is not None]


def render(collected: Collected, maps: Mapping[int, SparsityMap], again: str) -> str:
    """Return the page.

    Parameters
    ----------
    collected : Collected
    maps : mapping of int to SparsityMap
        The sparsities of runs by their number.
    again : str
        Command that makes the page again.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "bytes": human_bytes,
        "share": human_share,
        "command": _command,
        "options": _options,
        "made": done,
        "origin": lambda manifest: name_of(dense_name(manifest)),
        "clean": lambda text: escaped(str(text), keep="\n\t"),
        "passes": _passes,
        "exported": _export,
        "speed": _speed,
        "measured_stage": _measured_stage,
    }
    folder = files("besa_cli.report")
    template = environment.from_string((folder / "page.html.jinja").read_text(encoding="utf-8"))
    known = models(collected)
    drawer = _Drawer()
    compared = drawings.error_lines(collected)
    return template.render(
        style=(folder / "style.css").read_text(encoding="utf-8"),
        sign=pictures.SIGN,
        version=__version__,
        again=again,
        drawn=pictures.installed(),
        single=_single(collected, known),
        models=known,
        columns=collected.comparison.columns,
        cell=_cell,
        heading=drawings.heading,
        difference=lambda model, column: _difference(model, column, known),
        frontiers=[drawer.picture(each) for each in drawings.frontiers(collected, known)],
        compared=drawer.picture(compared) if compared else None,
        prompts=_prompts(collected, known),
        sections=_sections(collected, maps, drawer),
        stage_title=stage_title,
        tint=_tint,
        notes=[escaped(note) for note in collected.comparison.notes],
    )


class _Drawer:
    """Makes pictures and numbers them."""

    def __init__(self) -> None:
        self._count = 0

    def picture(self, drawing: Drawing) -> Picture:
        """Return the picture of a drawing."""
        from markupsafe import Markup

        self._count += 1
        svg = pictures.svg(drawing, self._count) if pictures.installed() else ""
        return Picture(drawing=drawing, svg=Markup(svg))


def _sections(collected: Collected, maps: Mapping[int, SparsityMap], drawer: _Drawer) -> list[RunSection]:
    found, cells = [], 0
    for number, run in enumerate(collected.runs):
        counted = maps.get(number)
        cells += sum(len(row) for row in counted.blocks.values()) if counted else 0
        found.append(
            RunSection(
                run=run,
                counted=counted,
                short=short_names(counted.names) if counted else [],
                distributions=cells <= _MOST_CELLS,
                pictures=[drawer.picture(each) for each in _of_run(run)],
            )
        )
    return found


def _single(collected: Collected, known: Sequence[ReportedModel]) -> ReportedModel | None:
    """Return the newest stage's model if there is one run only."""
    newest = collected.runs[0].newest if len(collected.runs) == 1 else None
    return next((model for model in known if newest and model.digest == newest.manifest["digest"]), None)


def _cell(column: Column, value: float | None) -> str:
    """Return a result as the page shows it."""
    if value is None:
        return "–"
    return {"perplexity": human_perplexity, "kl": human_divergence}.get(column.metric, human_share)(value)


def _difference(model: ReportedModel, column: Column, known: Sequence[ReportedModel]) -> str:
    """Return how much a model's result differs from its dense model's; empty where that is not known."""
    dense = next((other for other in known if other.digest == model.dense and other.dense is None), None)
    if dense is None or column not in dense.figures or column not in model.figures:
        return ""
    change = model.figures[column] - dense.figures[column]
    return f"{change:+.2f}" if column.metric == "perplexity" else f"{100 * change:+.2f} points"


def _tint(counted: SparsityMap, sparsity: float) -> int:
    """Return the place of a sparsity between the lowest and the highest, from 0 to 100."""
    low, high = counted.range
    return round(100 * (sparsity - low) / (high - low)) if high - low > _EVEN else 50


def _command(stage: ReportedStage) -> str:
    """Return the command line that makes a stage again, without paths of this machine."""
    values = {name: redaction.value(value) for name, value in inspection.options_to_repeat(stage.manifest).items()}
    return escaped(inspection.command_line(stage.manifest["command"], values))


def _options(options: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return options as rows of a table, without paths of this machine."""
    return [(name.replace("_", "-"), escaped(_option(redaction.value(value)))) for name, value in options.items()]


def _export(export: tuple[str, exports.Manifest]) -> tuple[str, str, str, str]:
    """Return an export as a row of a table."""
    name, manifest = export
    sizes = manifest["sizes"]
    return (
        escaped(name),
        manifest["options"]["format"],
        human_bytes(sizes["weights"]),
        human_bytes(sizes["weights_dense"]),
    )


def _speed(speeds: RecordedSpeeds) -> tuple[str, ...]:
    """Return what one contender reached as a row of a table."""
    load = speeds["workload"]
    return (
        escaped(speeds["name"]),
        f"{load['prompt']} + {load['new']}" + (f", {load['batch']} at a time" if load["batch"] > 1 else ""),
        f"{speeds['prefill']:,.0f}",
        f"{speeds['decode']:,.1f}",
        human_bytes(speeds["resident"]),
    )


def _measured_stage(measured: SpeedRecord, run: ReportedRun) -> str:
    """Return the name of the stage whose speed was measured."""
    same = [stage.name for stage in run.stages if stage.manifest.get("digest") == measured["model_digest"]]
    return same[0] if same else "a stage that has changed since"


def _option(value: object) -> str:
    if value is None or value == {}:
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_option(inner)}" for name, inner in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _passes(manifest: StageManifest) -> str:
    """Return a sentence on the passes in which the whole model learned; empty if there was none."""
    found = manifest.get("whole_model")
    if found is None:
        return ""
    steps = " → ".join(f"{value:.4f}" for value in found["divergence"])
    kept = f"after pass {found['kept']}" if found["kept"] else "before the first pass"
    return (
        f"The whole model learned in {len(found['divergence']) - 1} passes: KL divergence from the dense model "
        f"{steps} nats a token on {found['held_out']} samples held out; the state {kept} was kept."
    )


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Prompt, with the continuations of several models by their titles."""

    text: str
    tokens: int
    continuations: Sequence[tuple[str, str]]


def _prompts(collected: Collected, known: Sequence[ReportedModel]) -> list[Prompt]:
    """Group the continuations of all runs by prompt and number of tokens, each model once, in the order of models."""
    titles = {model.digest: model.title for model in known}
    grouped: dict[tuple[str, int], dict[str, str]] = {}
    for run in collected.runs:
        for each in run.continuations:
            title = titles.get(each.model_digest, f"a model that is no longer in {run.title}")
            grouped.setdefault((each.prompt, each.tokens), {}).setdefault(title, each.text)
    order = list(titles.values())
    return [
        Prompt(
            text=escaped(text, keep="\n\t"),
            tokens=tokens,
            continuations=sorted(
                ((title, escaped(said, keep="\n\t").strip()) for title, said in found.items()),
                key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order),
            ),
        )
        for (text, tokens), found in grouped.items()
    ]
