"""`besa eval`: what was lost, as perplexity and as a look at what the models say."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from besa_cli import models
from besa_cli.commands import options
from besa_cli.console import Console, human_perplexity, human_share
from besa_cli.errors import BesaError

if TYPE_CHECKING:
    from besa_cli.evaluation import Measurement, Perplexity, Settings

app = typer.Typer(no_args_is_help=True, help="Measure what was lost.", rich_markup_mode=None)

_PROMPT = "The capital of France is"

RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run", metavar="DIR", envvar="BESA_RUN", help="The run directory.", show_default=str(options.DEFAULT_RUN)
    ),
]
NoBaselineOption = Annotated[
    bool, typer.Option("--baseline/--no-baseline", help="Measure the dense parent, too, or take its stored result.")
]


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A checkpoint to look at, and the dense one it was made from."""

    name: str
    directory: Path
    digest: str | None
    parent: "_Subject | None" = None
    results: Path | None = None


@app.command()
def ppl(
    datasets: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATASET", help="wikitext2 or a text file.", show_default="wikitext2"),
    ] = None,
    model: options.OtherModelOption = None,
    seqlen: Annotated[int, typer.Option("--seqlen", metavar="N", help="Tokens of a window.")] = 2048,
    stride: Annotated[
        int | None,
        typer.Option("--stride", metavar="N", help="Tokens between two windows.", show_default="no overlap"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Windows to measure.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Windows in a pass.")] = 1,
    baseline: NoBaselineOption = True,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    run: RunOption = None,
    config: options.ConfigOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Perplexity of the newest stage (or of --model), and of the dense model it was made from."""
    console = Console(json=as_json)
    from besa_cli import compute, corpora
    from besa_cli.evaluation import Settings

    where = compute.device(device)
    resolved = compute.name_of(compute.dtype(dtype, where))  # once: both models are measured in it
    settings = Settings(
        seqlen=seqlen, stride=stride, limit=limit, batch_size=batch_size, device=where.type, dtype=resolved
    )
    texts = [corpora.evaluation_text(name) for name in datasets or ["wikitext2"]]
    subject = _subject(model, run, console, baseline=baseline)
    rows = []
    for text in texts:
        measured = _measure(subject, text, settings, console, cached=False)
        dense = _measure(subject.parent, text, settings, console, cached=True) if baseline and subject.parent else None
        rows.append((measured, dense))
    _show(subject, rows, console)


def _subject(model: str | None, run: Path | None, console: Console, *, baseline: bool = True) -> _Subject:
    """What `--model` names; else the newest stage of the run directory; else, where none was named, the demo model."""
    from besa_cli import checkpoint

    place = checkpoint.Run(run or options.DEFAULT_RUN)
    if model is not None:
        found = models.resolve(model, notify=console.note)
        return _Subject(name=model, directory=found.directory, digest=None, results=place.evaluations if run else None)
    newest = place.newest()
    if newest is None and run is not None:
        raise BesaError(f"{run} has no stage", f"make one: besa prune --run {run}")
    if newest is None:
        console.note(f"{place.path} has no finished stage: taking the demo model {models.DEMO}")
        found = models.resolve(models.DEMO, notify=console.note)
        return _Subject(name=models.DEMO, directory=found.directory, digest=None)
    manifest = checkpoint.finished(newest)
    counts = manifest["counts"]
    return _Subject(
        name=f"{manifest['options']['method']} {human_share(counts['sparsity'])}",
        directory=newest,
        digest=manifest["digest"],
        parent=_parent(manifest, place.evaluations, console) if baseline else None,
        results=place.evaluations,
    )


def _parent(manifest: dict[str, Any], results: Path, console: Console) -> _Subject:
    """The model that a stage was made from; fetched again where it is gone."""
    origin = manifest["model"]
    directory = Path(origin["directory"])
    if not directory.is_dir():
        name = origin["name"].partition("@")[0] if origin["revision"] else origin["name"]
        pinned = f"{name}@{origin['revision']}" if origin["revision"] else name
        directory = models.resolve(pinned, notify=console.note).directory
    label = "parent" if manifest.get("history") else "dense"
    return _Subject(name=label, directory=directory, digest=origin["digest"], results=results)


def _measure(subject: _Subject, text: Any, settings: "Settings", console: Console, *, cached: bool) -> "Perplexity":
    from besa_cli import evaluation

    job = _job(subject, text, settings)
    file = subject.results / job.file if subject.results else None
    found = evaluation.load(file) if cached and file else None
    if found is not None:
        console.note(f"{subject.name}: result taken from {file}")
        return found
    if cached:
        _refuse_changed(subject)
    with console.blocks(f"{text.name}, {subject.name}", job.blocks) as progress:
        result = job.measure(lambda index, blocks, seconds: progress.advance(index, seconds))
    if file is not None:
        evaluation.save(result, file, {"name": subject.name, "directory": str(subject.directory)})
    return result


def _refuse_changed(parent: _Subject) -> None:
    """A stage is compared with the model that it was made from, or with none."""
    from besa_cli import weights

    found = weights.check(weights.Weights(parent.directory))
    if found != parent.digest:
        raise BesaError(
            f"the model in {parent.directory} has changed since the stage was made from it "
            f"({str(parent.digest)[:12]} then, {found[:12]} now)",
            "measure the stage alone with --no-baseline",
        )


def _job(subject: _Subject, text: Any, settings: "Settings") -> "Measurement":
    from besa_cli import preparation, weights
    from besa_cli.evaluation import Measurement
    from besa_cli.models import Model

    tokenizer = preparation.tokenizer_of(
        Model(name=subject.name, kind="local", directory=subject.directory, revision=None)
    )
    digest = subject.digest or weights.check(weights.Weights(subject.directory))
    made_of = preparation.tokenizer_digest(subject.directory)
    return Measurement(subject.directory, digest, text, tokenizer, made_of, settings)


def _show(subject: _Subject, rows: "Sequence[tuple[Perplexity, Perplexity | None]]", console: Console) -> None:
    cells: list[tuple[str | int, ...]] = []
    for measured, dense in rows:
        parent = subject.parent.name if subject.parent else "dense"
        for name, result in ((subject.name, measured), (parent, dense)):
            if result is None:
                continue
            against = f"{measured.perplexity - dense.perplexity:+.4f}" if dense and result is measured else ""
            shown = f"{result.windows} of {result.windows_in_text}"
            cells.append(
                (
                    result.dataset,
                    result.split or "-",
                    name,
                    shown,
                    result.seqlen,
                    human_perplexity(result.perplexity),
                    against,
                )
            )
    console.table("", ("data", "split", "model", "windows", "context", "perplexity", "difference"), cells)
    results = [
        {
            **asdict(measured),
            "dense": asdict(dense) if dense else None,
            "difference": measured.perplexity - dense.perplexity if dense else None,
        }
        for measured, dense in rows
    ]  # fmt: skip
    console.emit_json({"model": subject.name, "directory": str(subject.directory), "results": results})


@app.command()
def sample(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the models go on from.")] = _PROMPT,
    model: options.OtherModelOption = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, metavar="N", help="Tokens to add.")] = 40,
    dtype: options.DtypeOption = "auto",
    run: RunOption = None,
    config: options.ConfigOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """What the dense and the pruned model continue a prompt with (greedy), side by side."""
    console = Console(json=as_json)
    from besa_cli import compute, evaluation, preparation
    from besa_cli.models import Model

    computed = compute.dtype(dtype, compute.device("cpu"))
    subject = _subject(model, run, console)
    said = {}
    for each in (subject.parent, subject):
        if each is not None:
            source = Model(name=each.name, kind="local", directory=each.directory, revision=None)
            tokenizer = preparation.tokenizer_of(source)
            said[each.name] = evaluation.continuation(each.directory, tokenizer, prompt, tokens, computed)
    console.table(
        f"{prompt} …", ("model", "continuation"), [(name, " ".join(text.split())) for name, text in said.items()]
    )
    console.emit_json({"prompt": prompt, "tokens": tokens, "continuations": said})
