"""Several runs side by side: what each is, on which data set it was measured and how, and what it came to."""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge
from typing_extensions import TypedDict

from besa_cli.checkpoint import inspection, manifests
from besa_cli.checkpoint.manifests import Positive
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import STAGES, require_finished
from besa_cli.errors import BesaError
from besa_cli.evaluation.texts import EVALUATION_SETS
from besa_cli.system import disk, records
from besa_cli.system.records import strict

Record = Mapping[str, Any]

_ACCURACIES = ("acc", "acc_norm")
_IN_TITLES = ("method", "sparsity", "nm", "model")
_FACTS = ("seqlen", "windows", "windows_in_text", "stride", "dtype", "device", "text_digest", "tokenizer_digest")
_TASK_FACTS = ("num_fewshot", "limit", "split", "dtype", "device", "data", "tokenizer_digest")
_OTHER_MODELS = ("dense", "parent", "baseline", "difference")  # parts of a result that are not about its own model


@dataclass(frozen=True, kw_only=True)
class Column:
    """A data set as it was measured. Figures stand in one column only where all of this agrees.

    Attributes
    ----------
    name : str
        The data set and its split, or the task.
    metric : {"perplexity", "acc", "acc_norm"}
    shown : tuple of str
        What a reader must know: windows × context length and stride, or shots and limit.
    hidden : tuple of (str, value)
        What else made the figure; shown where columns would look the same without it.
    """

    name: str
    metric: Literal["perplexity", "acc", "acc_norm"]
    shown: tuple[str, ...]
    hidden: tuple[tuple[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """Name, metric and what a reader must know."""
        name = self.name if self.metric == "perplexity" else f"{self.name} {self.metric}"
        return ", ".join([name, *self.shown])


@dataclass(kw_only=True)
class Row:
    """A model: the method that made it and its figures."""

    title: str
    run: Path | None
    figures: dict[Column, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Models by data sets.

    Attributes
    ----------
    columns : dict of str to Column
        By a title that no other column has.
    rows : list of Row
        Dense models first; titles differ.
    notes : list of str
        Results that were left out, and why.
    """

    columns: dict[str, Column]
    rows: list[Row]
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A run directory: the manifests of its finished stages by their digests, and its results by their file names."""

    path: Path
    stages: Mapping[str, Record]
    records: Mapping[str, Record]


@strict
class _Result(TypedDict):
    """What every result says of its model; other fields depend on its kind."""

    kind: NotRequired[str]
    model: NotRequired[str | dict[str, Any] | None]
    model_digest: NotRequired[str | None]


@strict
class _Perplexity(_Result):
    """A perplexity with what distinguishes it from others."""

    dataset: str
    windows: Positive
    seqlen: Positive
    perplexity: Annotated[float, Ge(1)]
    split: NotRequired[str | None]
    windows_in_text: NotRequired[Positive | None]
    stride: NotRequired[Positive | None]
    official: NotRequired[bool | None]
    dtype: NotRequired[str]
    device: NotRequired[str]
    text_digest: NotRequired[str]
    tokenizer_digest: NotRequired[str]


def compare(paths: Sequence[Path]) -> Comparison:
    """Put the results of several run directories side by side.

    Raises
    ------
    BesaError
        One of them is missing or has no results.
    """
    runs = [_read(path) for path in dict.fromkeys(paths)]
    titles = _titles(runs)
    rows: dict[object, Row] = {}
    notes: list[str] = []
    for run in runs:
        for name, record in run.records.items():
            found = _row(run, record, titles)
            if found is None:
                notes.append(f"{run.path / 'eval' / name} is of a model that is not in the run any more: left out")
                continue
            key, row = found
            _enter(rows.setdefault(key, row), record, run, notes)
    ordered = sorted(rows.values(), key=lambda row: row.run is not None)
    _tell_apart(ordered)
    return Comparison(columns=_columns(ordered), rows=ordered, notes=notes)


def _read(path: Path) -> _Run:
    if not path.is_dir():
        raise BesaError(f"no run directory {path}", "give directories that 'besa prune --run DIR' has made")
    run = Run(path)
    found = {file.name: _record(file) for file in inspection.evaluation_files(run)}
    if not found:
        raise BesaError(f"{path} holds no results", f"measure it first: besa eval ppl wikitext2 --run {path}")
    complete = [place for place in inspection.stage_directories(run) if manifests.is_complete(place)]
    own = [require_finished(place) for place in complete]
    return _Run(path=path, stages={str(each["digest"]): each for each in own}, records=found)


def _record(file: Path) -> Record:
    """A result as it lies on the disk.

    Raises
    ------
    BesaError
        It is damaged: a field has another type, or a figure that it cannot have.
    """
    text, remedy = disk.read_text(file), "delete the file and measure again"
    found = records.parse(_Result, text, file, remedy)
    if _is_perplexity(found):
        return records.parse(_Perplexity, text, file, remedy)
    for task, name, value in _numbers("", found) if found.get("kind") == "tasks" else ():
        if not 0 <= value <= 1:
            raise BesaError(f"{file} is not what besa wrote: {task}.{name} is {value}, not an accuracy", remedy)
    return found


def _is_perplexity(record: Record) -> bool:
    """Whether a result is a perplexity; one that does not say its kind is."""
    named = record.get("kind", "perplexity") == "perplexity"
    return named and {"dataset", "windows", "seqlen", "perplexity"} <= record.keys()


def _titles(runs: Sequence[_Run]) -> dict[tuple[Path, str], str]:
    """For each stage its method and sparsity, and every other option that differs between stages of one method."""
    stages = {(run.path, digest): manifest for run in runs for digest, manifest in run.stages.items()}
    parents = {each["model"]["digest"] for run in runs for each in run.stages.values()}
    parents -= {digest for _, digest in stages}
    titles = {}
    for key, manifest in stages.items():
        own: Record = manifest["options"]
        beside = [each["options"] for each in stages.values() if each["options"].get("method") == own.get("method")]
        different = [
            f"{name} {_plain(own[name])}"
            for name in own
            if name not in _IN_TITLES and len({str(other.get(name)) for other in beside}) > 1
        ]
        model = [Path(str(own.get("model"))).name] if len(parents) > 1 else []
        titles[key] = ", ".join([f"{own.get('method')} {_amount(own)}".rstrip(), *model, *different])
    return titles


def _amount(options: Record) -> str:
    pattern = options.get("nm")
    if pattern is not None:
        return pattern if isinstance(pattern, str) else ":".join(map(str, pattern))
    return f"{100 * float(options['sparsity']):g} %" if "sparsity" in options else ""


def _plain(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else "auto" if value is None else str(value)


def _row(run: _Run, record: Record, titles: Mapping[tuple[Path, str], str]) -> tuple[object, Row] | None:
    """The row that a result belongs to, and its key among all rows; None for a model that is gone."""
    model = record.get("model")
    about: Record = model if isinstance(model, Mapping) else {"name": model}
    digest = str(record.get("model_digest") or about.get("digest"))
    if digest in run.stages:
        return (run.path, digest), Row(title=titles[run.path, digest], run=run.path)
    for manifest in run.stages.values():
        if digest == manifest["model"]["digest"]:
            return digest, Row(title="parent" if manifest.get("history") else "dense", run=None)
    place = Path(str(about.get("directory"))).name
    if about.get("name") in _OTHER_MODELS or place.removesuffix(".next") in STAGES:
        return None
    return digest, Row(title=str(about.get("name")), run=run.path)


def _enter(row: Row, record: Record, run: _Run, notes: list[str]) -> None:
    """Put the figures of a result into a row; what is there stays."""
    for column, value in _figures(record):
        there = row.figures.setdefault(column, value)
        if there != value:
            notes.append(f"{row.title}, {column.title}: {value!r} in {run.path}, {there!r} before: the first is shown")


def _figures(record: Record) -> Iterator[tuple[Column, float]]:
    """The figures of a result by their columns."""
    if _is_perplexity(record):
        yield _perplexity_column(record), float(record["perplexity"])
    elif record.get("kind") == "tasks":
        yield from _accuracies(record)


def _perplexity_column(record: Record) -> Column:
    windows, in_text, stride = record["windows"], record.get("windows_in_text"), record.get("stride")
    count = f"{windows}" if in_text in (None, windows) else f"{windows} of {in_text}"
    shown = [f"{count} × {record['seqlen']}"]
    shown += [f"stride {stride}"] if stride not in (None, record["seqlen"]) else []
    shown += ["not the official text"] if record.get("official") is False else []
    hidden = tuple((name, record.get(name)) for name in _FACTS)
    name = " ".join(str(record[each]) for each in ("dataset", "split") if record.get(each))
    return Column(name=name, metric="perplexity", shown=tuple(shown), hidden=hidden)


def _accuracies(record: Record) -> Iterator[tuple[Column, float]]:
    """Every accuracy in a result of a harness, wherever it lies: a number under the metric's name, under its task's."""
    given = [record, *(each for each in record.values() if isinstance(each, Mapping))]
    facts = {name: next((each[name] for each in given if each.get(name) is not None), None) for name in _TASK_FACTS}
    shots, limit = facts["num_fewshot"], facts["limit"]
    shown = [f"{shots} shots"] if shots else []
    shown += [f"limit {limit}"] if limit else []
    hidden = tuple((name, _hashable(value)) for name, value in facts.items())
    seen = set()
    for task, name, value in _numbers("", record):
        metric: Literal["acc", "acc_norm"] = "acc" if name.partition(",")[0] == "acc" else "acc_norm"
        column = Column(name=task, metric=metric, shown=tuple(shown), hidden=hidden)
        if column not in seen:
            seen.add(column)
            yield column, float(value)


def _hashable(value: Record | list[Any] | str | float | None) -> str | float | None:
    """A simple value as it is, and a digest in place of any other."""
    if not isinstance(value, Mapping | list):
        return value
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _numbers(name: str, value: Record) -> Iterator[tuple[str, str, int | float]]:
    """(task, metric, value) of every accuracy below."""
    for key, inner in value.items():
        if key in _OTHER_MODELS:
            continue
        if isinstance(inner, Mapping):
            yield from _numbers(key, inner)
        elif key.partition(",")[0] in _ACCURACIES and isinstance(inner, int | float) and not isinstance(inner, bool):
            yield name, key, inner


def _tell_apart(rows: Sequence[Row]) -> None:
    """Add its run to the title of each row that looks like another."""
    count = Counter(row.title for row in rows)
    for row in rows:
        if count[row.title] > 1 and row.run is not None:
            row.title += f" ({row.run})"


def _columns(rows: Sequence[Row]) -> dict[str, Column]:
    """Named data sets first, then others as they come, then tasks; with what is hidden where titles would be equal."""
    columns = list(dict.fromkeys(column for row in rows for column in row.figures))
    names = list(dict.fromkeys(column.name for column in columns))
    names.sort(key=lambda name: (*EVALUATION_SETS, name.split()[0]).index(name.split()[0]))
    columns.sort(key=lambda column: (column.metric != "perplexity", names.index(column.name)))
    titled = {}
    for column in columns:
        alike = [other for other in columns if other.title == column.title]
        more = [
            f"{name.removesuffix('_digest')} {str(value)[:12]}"
            for name, value in column.hidden
            if any(dict(other.hidden).get(name) != value for other in alike)
        ]
        titled[", ".join([column.title, *more])] = column
    return titled


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def comma_separated(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().rstrip("\n")
