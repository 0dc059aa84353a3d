"""Comparison of several runs in one table: a row per model, a column per data set and way of measuring."""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NotRequired

from annotated_types import Ge, Le
from typing_extensions import TypedDict

from besa_cli.checkpoint import inspection, manifests
from besa_cli.checkpoint.manifests import Positive
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import STAGES, require_finished
from besa_cli.errors import BesaError
from besa_cli.evaluation import continuations
from besa_cli.evaluation.texts import EVALUATION_SETS
from besa_cli.system import disk, records
from besa_cli.system.disk import Json, JsonObject
from besa_cli.system.records import strict

Record = Json

Metric = Literal["perplexity", "kl", "same_token", "acc", "acc_norm"]

_ACCURACIES = ("acc", "acc_norm")
_TEXT_METRICS: dict[Metric, str] = {"perplexity": "", "kl": " KL", "same_token": " same token"}  # additions to titles
_TITLE_OPTIONS = ("method", "sparsity", "nm", "model")
_PERPLEXITY_FACTS = (
    "seqlen",
    "windows",
    "windows_in_text",
    "stride",
    "dtype",
    "device",
    "text_digest",
    "tokenizer_digest",
)
_TASK_FACTS = ("num_fewshot", "limit", "split", "dtype", "device", "data", "tokenizer_digest")
_OTHER_MODELS = ("dense", "parent", "baseline", "difference")  # parts of a result that concern another model


@dataclass(frozen=True, kw_only=True)
class Column:
    """Data set and the way it was measured. Two values share a column only if all fields are equal.

    Attributes
    ----------
    name : str
        Data set and split, or task.
    metric : {"perplexity", "kl", "same_token", "acc", "acc_norm"}
    shown : tuple of str
        Settings shown in every title: windows × context length and stride, or shots and limit.
    hidden : tuple of (str, value)
        Further settings, shown only where titles would otherwise be equal.
    """

    name: str
    metric: Metric
    shown: tuple[str, ...]
    hidden: tuple[tuple[str, str | float | None], ...] = ()

    @property
    def title(self) -> str:
        """Title from name, metric and the settings shown."""
        return ", ".join([self.name + _TEXT_METRICS.get(self.metric, f" {self.metric}"), *self.shown])


@dataclass(kw_only=True)
class Row:
    """One model: the method that made it, its run, the digest of its content, and its values by column."""

    title: str
    run: Path | None
    digest: str = ""
    figures: dict[Column, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Table of models by data sets.

    Attributes
    ----------
    columns : dict of str to Column
        Columns by their unique titles.
    rows : list of Row
        Rows with unique titles; dense models first.
    notes : list of str
        Results that were skipped, with the reason.
    """

    columns: dict[str, Column]
    rows: list[Row]
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Run directory with the manifests of its finished stages, by digest, and its results, by file name."""

    path: Path
    stages: Mapping[str, Record]
    records: Mapping[str, Record]


@strict
class _Result(TypedDict):
    """Fields that every result has; the others depend on its kind."""

    kind: NotRequired[str]
    model: NotRequired[str | JsonObject | None]
    model_digest: NotRequired[str | None]


@strict
class _Perplexity(_Result):
    """Fields of a perplexity result that a comparison uses."""

    dataset: str
    windows: Positive
    seqlen: Positive
    perplexity: Annotated[float, Ge(1)]
    kl: NotRequired[Annotated[float, Ge(0)] | None]
    same_token: NotRequired[Annotated[float, Ge(0), Le(1)] | None]
    baseline_digest: NotRequired[str | None]
    split: NotRequired[str | None]
    windows_in_text: NotRequired[Positive | None]
    stride: NotRequired[Positive | None]
    official: NotRequired[bool | None]
    dtype: NotRequired[str]
    device: NotRequired[str]
    text_digest: NotRequired[str]
    tokenizer_digest: NotRequired[str]


def compare(paths: Sequence[Path], *, require_results: bool = True) -> Comparison:
    """Collect the results of several run directories in one table.

    Parameters
    ----------
    paths : sequence of Path
        Run directories.
    require_results : bool
        Refuse a run without results.

    Raises
    ------
    BesaError
        A directory does not exist, has no results, or a result is damaged.
    """
    runs = [_read(path, require_results=require_results) for path in dict.fromkeys(paths)]
    titles = _titles(runs)
    rows: dict[object, Row] = {}
    notes: list[str] = []
    for run in runs:
        for name, record in run.records.items():
            keyed = _row(run, record, titles)
            if keyed is None:
                notes.append(f"{run.path / 'eval' / name} belongs to a model that is no longer in the run: skipped")
                continue
            key, row = keyed
            _add_values(rows.setdefault(key, row), record, run, notes)
    ordered = sorted(rows.values(), key=lambda row: row.run is not None)
    _make_titles_unique(ordered)
    return Comparison(columns=_columns(ordered), rows=ordered, notes=notes)


def _read(path: Path, *, require_results: bool) -> _Run:
    if not path.is_dir():
        raise BesaError(f"no run directory {path}", "give run directories, as 'besa prune --run DIR' creates them")
    run = Run(path)
    loaded = {file.name: _load_result(file) for file in inspection.evaluation_files(run)}
    results = {name: record for name, record in loaded.items() if record.get("kind") != continuations.KIND}
    if require_results and not results:
        raise BesaError(f"{path} has no results", f"measure it first: besa eval ppl wikitext2 --run {path}")
    complete = [stage for stage in inspection.stage_directories(run) if manifests.is_complete(stage)]
    stage_manifests = [require_finished(stage) for stage in complete]
    stages = {str(manifest["digest"]): manifest for manifest in stage_manifests}
    return _Run(path=path, stages=stages, records=results)


def _load_result(file: Path) -> Record:
    """Read a result file.

    Raises
    ------
    BesaError
        The file is damaged: a field has the wrong type or an impossible value.
    """
    text, remedy = disk.read_text(file), "delete the file and measure again"
    result = records.parse(_Result, text, file, remedy)
    if _is_perplexity(result):
        return records.parse(_Perplexity, text, file, remedy)
    for task, name, value in _accuracy_values("", result) if result.get("kind") == "tasks" else ():
        if not 0 <= value <= 1:
            raise BesaError(f"{file} is not what besa wrote: {task}.{name} is {value}, not an accuracy", remedy)
    return result


def _is_perplexity(record: Record) -> bool:
    """Return whether a result is a perplexity; the kind defaults to that."""
    is_kind = record.get("kind", "perplexity") == "perplexity"
    return is_kind and {"dataset", "windows", "seqlen", "perplexity"} <= record.keys()


def _titles(runs: Sequence[_Run]) -> dict[tuple[Path, str], str]:
    """Return each stage's title: its method, sparsity, and every option that differs between stages of this method."""
    stages = {(run.path, digest): manifest for run in runs for digest, manifest in run.stages.items()}
    parents = {manifest["model"]["digest"] for manifest in stages.values()}
    parents -= {digest for _, digest in stages}
    titles = {}
    for key, manifest in stages.items():
        options: Record = manifest["options"]
        method = options.get("method", manifest["stage"])
        same_method = [
            other["options"] for other in stages.values() if other["options"].get("method", other["stage"]) == method
        ]
        different = [
            f"{name} {_option_text(options[name])}"
            for name in options
            if name not in _TITLE_OPTIONS and len({str(other.get(name)) for other in same_method}) > 1
        ]
        model = [Path(str(options.get("model"))).name] if len(parents) > 1 else []
        titles[key] = ", ".join([f"{method} {_sparsity_text(options)}".rstrip(), *model, *different])
    return titles


def _sparsity_text(options: Record) -> str:
    pattern = options.get("nm")
    if pattern is not None:
        return pattern if isinstance(pattern, str) else ":".join(map(str, pattern))
    return f"{100 * float(options['sparsity']):g} %" if "sparsity" in options else ""


def _option_text(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else "auto" if value is None else str(value)


def _row(run: _Run, record: Record, titles: Mapping[tuple[Path, str], str]) -> tuple[object, Row] | None:
    """Return the row of a result, with its key among all rows; None if its model is no longer in the run."""
    model = record.get("model")
    info: Record = model if isinstance(model, Mapping) else {"name": model}
    digest = str(record.get("model_digest") or info.get("digest"))
    if digest in run.stages:
        return (run.path, digest), Row(title=titles[run.path, digest], run=run.path, digest=digest)
    for manifest in run.stages.values():
        if digest == manifest["model"]["digest"]:
            title = "parent" if manifest.get("history") else "dense"
            return digest, Row(title=title, run=None, digest=digest)
        if manifest.get("history") and info.get("name") == "dense":
            return digest, Row(title="dense", run=None, digest=digest)
    directory = Path(str(info.get("directory"))).name
    if info.get("name") in _OTHER_MODELS or directory.removesuffix(".next") in STAGES:
        return None
    return digest, Row(title=str(info.get("name")), run=run.path, digest=digest)


def _add_values(row: Row, record: Record, run: _Run, notes: list[str]) -> None:
    """Add the values of a result to a row; an existing value is kept, and a different one noted."""
    for column, value in _values(record):
        first = row.figures.setdefault(column, value)
        if first != value:
            notes.append(f"{row.title}, {column.title}: {value!r} in {run.path}, {first!r} before: the first is shown")


def _values(record: Record) -> Iterator[tuple[Column, float]]:
    """Yield the values of a result with their columns."""
    if _is_perplexity(record):
        column = _perplexity_column(record)
        yield column, float(record["perplexity"])
        hidden = (*column.hidden, ("baseline_digest", record.get("baseline_digest")))
        compared: tuple[Metric, ...] = ("kl", "same_token")
        for metric in compared:
            if record.get(metric) is not None:
                yield replace(column, metric=metric, hidden=hidden), float(record[metric])
    elif record.get("kind") == "tasks":
        yield from _accuracies(record)


def _perplexity_column(record: Record) -> Column:
    windows, in_text, stride = record["windows"], record.get("windows_in_text"), record.get("stride")
    count = f"{windows}" if in_text in (None, windows) else f"{windows} of {in_text}"
    shown = [f"{count} × {record['seqlen']}"]
    shown += [f"stride {stride}"] if stride not in (None, record["seqlen"]) else []
    shown += ["not the official text"] if record.get("official") is False else []
    hidden = tuple((name, record.get(name)) for name in _PERPLEXITY_FACTS)
    name = " ".join(str(record[field]) for field in ("dataset", "split") if record.get(field))
    return Column(name=name, metric="perplexity", shown=tuple(shown), hidden=hidden)


def _accuracies(record: Record) -> Iterator[tuple[Column, float]]:
    """Yield every accuracy in a harness result, at any depth: a number under its metric's name, under its task's."""
    sections = [record, *(section for section in record.values() if isinstance(section, Mapping))]
    facts = {
        name: next((section[name] for section in sections if section.get(name) is not None), None)
        for name in _TASK_FACTS
    }
    shots, limit = facts["num_fewshot"], facts["limit"]
    shown = [f"{shots} shots"] if shots else []
    shown += [f"limit {limit}"] if limit else []
    hidden = tuple((name, _hashable(value)) for name, value in facts.items())
    seen = set()
    for task, name, value in _accuracy_values("", record):
        metric: Metric = "acc" if name.partition(",")[0] == "acc" else "acc_norm"
        column = Column(name=task, metric=metric, shown=tuple(shown), hidden=hidden)
        if column not in seen:
            seen.add(column)
            yield column, float(value)


def _hashable(value: Record | list[object] | str | float | None) -> str | float | None:
    """Return a scalar unchanged, and the digest of a list or mapping."""
    if not isinstance(value, Mapping | list):
        return value
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _accuracy_values(name: str, value: Record) -> Iterator[tuple[str, str, int | float]]:
    """Yield (task, metric, value) of every accuracy within `value`, the entry called `name`."""
    for key, inner in value.items():
        if key in _OTHER_MODELS:
            continue
        if isinstance(inner, Mapping):
            yield from _accuracy_values(key, inner)
        elif key.partition(",")[0] in _ACCURACIES and isinstance(inner, int | float) and not isinstance(inner, bool):
            yield name, key, inner


def _make_titles_unique(rows: Sequence[Row]) -> None:
    """Append the run to each title that several rows have."""
    count = Counter(row.title for row in rows)
    for row in rows:
        if count[row.title] > 1 and row.run is not None:
            row.title += f" ({row.run})"


def _columns(rows: Sequence[Row]) -> dict[str, Column]:
    """Return the columns by unique title: named data sets first, then other texts, then tasks."""
    columns = list(dict.fromkeys(column for row in rows for column in row.figures))
    names = list(dict.fromkeys(column.name for column in columns))
    names.sort(key=lambda name: (*EVALUATION_SETS, name.split()[0]).index(name.split()[0]))
    order = list(_TEXT_METRICS)
    columns.sort(
        key=lambda column: (
            column.metric not in order,
            names.index(column.name),
            order.index(column.metric) if column.metric in order else 0,
        )
    )
    titled = {}
    for column in columns:
        alike = [other for other in columns if other.title == column.title]
        distinguishing = [
            f"{name.removesuffix('_digest')} {str(value)[:12]}"
            for name, value in column.hidden
            if any(dict(other.hidden).get(name) != value for other in alike)
        ]
        titled[", ".join([column.title, *distinguishing])] = column
    return titled


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; all columns but the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def comma_separated(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().rstrip("\n")
