"""`besa eval`: what was lost, as perplexity and as a look at what the models say."""

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from besa_cli.commands.eval_compare import compare
from besa_cli.commands.eval_tasks import tasks
from besa_cli.commands.shared import forecast_view, options
from besa_cli.commands.shared import subject as subjects
from besa_cli.commands.shared.subject import Subject
from besa_cli.console import Console, human_perplexity
from besa_cli.errors import Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable

    from besa_cli.evaluation.measurement import Perplexity, PerplexityMeasurement, PerplexitySettings
    from besa_cli.evaluation.results import Results
    from besa_cli.evaluation.texts import EvaluationText
    from besa_cli.stream.forecast import Forecast

app = typer.Typer(no_args_is_help=True, help="Measure what was lost.", rich_markup_mode=None)
app.command()(tasks)
app.command()(compare)

_PROMPT = "The capital of France is"


@app.command()
def ppl(
    datasets: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATASET", help="wikitext2, ptb, c4 or a text file.", show_default="wikitext2"),
    ] = None,
    model: options.OtherModelOption = None,
    data_dir: options.DataDirOption = None,
    seqlen: Annotated[int, typer.Option("--seqlen", metavar="N", help="Tokens of a window.")] = 2048,
    stride: Annotated[
        int | None,
        typer.Option("--stride", metavar="N", help="Tokens between two windows.", show_default="no overlap"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Windows to measure.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Windows in a pass.")] = 1,
    baseline: subjects.BaselineOption = True,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    run: subjects.RunOption = None,
    dry_run: options.DryRunOption = False,
    config: options.ConfigOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Perplexity of the newest stage (or of --model), and of the dense model it was made from."""
    console = Console(json=as_json)
    from besa_cli.evaluation import texts
    from besa_cli.evaluation.measurement import PerplexitySettings
    from besa_cli.stream import forecast
    from besa_cli.system import compute
    from besa_cli.text import documents, hub_files

    where = compute.device(device)
    resolved = compute.name_of(compute.dtype(dtype, where))  # once: both models are measured in it
    settings = PerplexitySettings(
        seqlen=seqlen, stride=stride, limit=limit, batch_size=batch_size, device=where.type, dtype=resolved
    )
    documents.check_directory(data_dir)
    hub = hub_files.from_environment()
    wanted = [
        texts.evaluation_text(name, data_dir=data_dir, hub=hub, notify=console.note)
        for name in dict.fromkeys(datasets or ["wikitext2"])
    ]
    subject = subjects.find(model, run, console, baseline=baseline)
    if dry_run:
        started = compute.age()
        both = [each for each in (subject, subject.parent) if each is not None]
        found = forecast.combine([_forecast(each, wanted, settings) for each in both])
        forecast_view.show(replace(found, seconds=started + found.seconds), console)
        return
    measured = _measure(subject, wanted, settings, console)
    dense: Sequence[Perplexity | None] = [None] * len(measured)
    if subject.parent is not None:
        dense = _measure(subject.parent, wanted, settings, console, parent=True)
    _show(subject, list(zip(measured, dense, strict=True)), console)


def _measure(
    subject: Subject,
    texts: "Sequence[EvaluationText]",
    settings: "PerplexitySettings",
    console: Console,
    *,
    parent: bool = False,
) -> "list[Perplexity]":
    """The perplexity on each text: results of the run where they are there, one walk through the model for all others.

    A stage is looked at before its results are taken; of its parent they are taken as they are.
    """
    from besa_cli.evaluation.results import Results

    results = Results(subject.results) if subject.results else None
    digest = str(subject.digest) if parent else subjects.digest(subject)
    jobs = _jobs(subject, digest, texts, settings, console.note)
    stored = [(number, results.load(job)) for number, job in enumerate(jobs)] if results else []
    found = {number: result for number, result in stored if result}
    for number, job in enumerate(jobs):
        if results and number in found:
            console.note(f"{subject.name}: result taken from {results.file(job)}")
    left = [number for number in range(len(jobs)) if number not in found]
    if left and parent:
        subjects.refuse_changed(subject)
    if left:
        made = _walk(subject, [jobs[number] for number in left], results, console)
        found.update(zip(left, made, strict=True))
    return [found[number] for number in range(len(jobs))]


def _forecast(subject: Subject, texts: "Sequence[EvaluationText]", settings: "PerplexitySettings") -> "Forecast":
    """What measuring one model would take, all checks included."""
    from besa_cli.evaluation import results
    from besa_cli.evaluation.perplexity import PerplexityRun
    from besa_cli.system import disk

    began = time.perf_counter()
    jobs = _jobs(subject, subjects.digest(subject), texts, settings)
    if subject.results:
        disk.require_writable(subject.results)
    left = [job for job in jobs if not (subject.results and results.load(subject.results / job.file))]
    walk = PerplexityRun(left or jobs)
    checks = time.perf_counter() - began
    found = walk.forecast(subject.results or subject.directory)
    return replace(found, seconds=(found.seconds if left else 0.0) + checks, left=found.left if left else 0)


def _walk(
    subject: Subject, jobs: "Sequence[PerplexityMeasurement]", results: "Results | None", console: Console
) -> "list[Perplexity]":
    from besa_cli.evaluation.perplexity import PerplexityRun

    known = [results.load_losses(job) if results else [] for job in jobs]
    for job, losses in zip(jobs, known, strict=True):
        if losses:
            console.note(f"{job.dataset}, {subject.name}: {len(losses)} of {len(job.windows)} windows are measured")
    walk = PerplexityRun(jobs, known)
    for note in walk.notes:
        console.note(note)
    try:
        title = f"{', '.join(job.dataset for job in jobs)}, {subject.name}"
        with console.blocks(title, walk.steps, walk.work) as progress:
            for step in walk:
                progress.advance(step.index, step.seconds, step.phase)
                if results:
                    for number in step.measured:
                        results.save_losses(jobs[number], walk.losses[number])
    except KeyboardInterrupt as interrupt:
        raise Interrupted(_way_on(results, jobs)) from interrupt
    made = [job.result(losses) for job, losses in zip(jobs, walk.losses, strict=True)]
    if results:
        for job, result in zip(jobs, made, strict=True):
            results.save(job, result, {"name": subject.name, "directory": str(subject.directory)})
    return made


def _way_on(results: "Results | None", jobs: "Sequence[PerplexityMeasurement]") -> str:
    """What is true of an interrupted evaluation."""
    if results is None:
        return "nothing was kept; with --run DIR what is measured goes there, and the same command goes on from it"
    count = sum(len(results.load_losses(job)) for job in jobs)
    return f"{count} windows are measured and kept; run the same command again to go on from there"


def _jobs(
    subject: Subject,
    digest: str,
    texts: "Sequence[EvaluationText]",
    settings: "PerplexitySettings",
    notify: "Callable[[str], None]" = lambda _: None,
) -> "list[PerplexityMeasurement]":
    from besa_cli.evaluation.measurement import PerplexityMeasurement
    from besa_cli.models.tokenizer import tokenizer_digest

    tokenizer = subjects.tokenizer(subject, notify)
    made_of = tokenizer_digest(subject.directory)
    return [PerplexityMeasurement(subject.directory, digest, text, tokenizer, made_of, settings) for text in texts]


def _show(subject: Subject, rows: "Sequence[tuple[Perplexity, Perplexity | None]]", console: Console) -> None:
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
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=options.MOST, metavar="N", help="Tokens to add.")] = 40,
    dtype: options.DtypeOption = "auto",
    run: subjects.RunOption = None,
    config: options.ConfigOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """What the dense and the pruned model continue a prompt with (greedy), side by side."""
    console = Console(json=as_json)
    from besa_cli.evaluation import continuations
    from besa_cli.system import compute

    computed = compute.dtype(dtype, compute.device("cpu"))
    subject = subjects.find(model, run, console)
    subjects.digest(subject)  # refuses a stage that is not what was written
    both = [each for each in (subject.parent, subject) if each is not None]
    tokenizers = [subjects.tokenizer(each, console.note) for each in both]
    prompts = [
        continuations.encode_prompt(each.directory, tokenizer, prompt, tokens)
        for each, tokenizer in zip(both, tokenizers, strict=True)
    ]
    subjects.digest(subject)  # refuses what is not as it was written
    said = {}
    for each, tokenizer, inputs in zip(both, tokenizers, prompts, strict=True):
        with console.blocks(each.name, 1) as progress:
            show = functools.partial(progress.step, total=tokens, phase="token")
            said[each.name] = continuations.continuation(each.directory, tokenizer, inputs, tokens, computed, show)
    console.table(
        f"{prompt} …", ("model", "continuation"), [(name, " ".join(text.split())) for name, text in said.items()]
    )
    console.emit_json({"prompt": prompt, "tokens": tokens, "continuations": said})
