"""`besa eval ppl`: perplexity of a stage and of the dense model it was made from."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from besa_cli.commands.shared import forecast_view, options, panels
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


def ppl(
    datasets: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATASET", help="wikitext2, ptb, c4 or a text file.", show_default="wikitext2"),
    ] = None,
    model: options.OtherModelOption = None,
    baseline: subjects.BaselineOption = True,
    data_dir: options.DataDirOption = None,
    seqlen: Annotated[int, panels.MEASUREMENT("--seqlen", "Tokens per window.", metavar="N")] = 2048,
    stride: Annotated[
        int | None,
        panels.MEASUREMENT("--stride", "Tokens from one window's start to the next.", "no overlap", metavar="N"),
    ] = None,
    limit: Annotated[
        int | None, panels.MEASUREMENT("--limit", "Number of windows to measure.", "all", metavar="N")
    ] = None,
    batch_size: Annotated[int, panels.COMPUTE("--batch-size", "Windows per pass.", metavar="N")] = 1,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    run: subjects.RunOption = None,
    dry_run: options.DryRunOption = False,
    config: options.ConfigOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Measure the perplexity of the newest stage (or of --model) and of its dense model.

    Examples:

        besa eval ppl
        besa eval ppl wikitext2 c4 --limit 16 --run qwen
        besa eval ppl my.txt --model Qwen/Qwen3-0.6B --seqlen 1024
    """
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
    selected = [
        texts.evaluation_text(name, data_dir=data_dir, hub=hub, notify=console.note)
        for name in dict.fromkeys(datasets or ["wikitext2"])
    ]
    subject = subjects.find(model, run, console, baseline=baseline)
    if dry_run:
        started = compute.age()
        models = [model for model in (subject, subject.parent) if model is not None]
        total = forecast.combine([_forecast(model, selected, settings) for model in models])
        forecast_view.show(replace(total, seconds=started + total.seconds), console)
        return
    measured = _measure(subject, selected, settings, console)
    dense: Sequence[Perplexity | None] = [None] * len(measured)
    if subject.parent is not None:
        dense = _measure(subject.parent, selected, settings, console, parent=True)
    _show(subject, list(zip(measured, dense, strict=True)), console)


def _measure(
    subject: Subject,
    texts: "Sequence[EvaluationText]",
    settings: "PerplexitySettings",
    console: Console,
    *,
    parent: bool = False,
) -> "list[Perplexity]":
    """Return the perplexity on each text: stored results, and one pass through the model for all others.

    The digest of a stage is checked before its stored results are used; that of its parent is not.
    """
    from besa_cli.evaluation.results import Results

    results = Results(subject.results) if subject.results else None
    digest = str(subject.digest) if parent else subjects.digest(subject)
    jobs = _jobs(subject, digest, texts, settings, console.note)
    stored = [(number, results.load(job)) for number, job in enumerate(jobs)] if results else []
    by_job = {number: result for number, result in stored if result}
    for number, job in enumerate(jobs):
        if results and number in by_job:
            console.note(f"{subject.name}: result taken from {results.file(job)}")
    left = [number for number in range(len(jobs)) if number not in by_job]
    if left and parent:
        subjects.refuse_changed(subject)
    if left:
        measured = _walk(subject, [jobs[number] for number in left], results, console)
        by_job.update(zip(left, measured, strict=True))
    return [by_job[number] for number in range(len(jobs))]


def _forecast(subject: Subject, texts: "Sequence[EvaluationText]", settings: "PerplexitySettings") -> "Forecast":
    """Forecast the measurement of one model; the time includes that of the checks."""
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
    forecast = walk.forecast(subject.results or subject.directory)
    return replace(forecast, seconds=(forecast.seconds if left else 0.0) + checks, left=forecast.left if left else 0)


def _walk(
    subject: Subject, jobs: "Sequence[PerplexityMeasurement]", results: "Results | None", console: Console
) -> "list[Perplexity]":
    from besa_cli.evaluation.perplexity import PerplexityRun

    known = [results.load_losses(job) if results else [] for job in jobs]
    for job, losses in zip(jobs, known, strict=True):
        if losses:
            console.note(
                f"{job.dataset}, {subject.name}: {len(losses)} of {len(job.windows)} windows are measured already"
            )
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
        raise Interrupted(_hint(results, jobs)) from interrupt
    measured = [job.result(losses) for job, losses in zip(jobs, walk.losses, strict=True)]
    if results:
        for job, result in zip(jobs, measured, strict=True):
            results.save(job, result, {"name": subject.name, "directory": str(subject.directory)})
    return measured


def _hint(results: "Results | None", jobs: "Sequence[PerplexityMeasurement]") -> str:
    """Return the hint after an interruption."""
    if results is None:
        return "nothing was kept; with --run DIR results are stored there, and the same command resumes from them"
    count = sum(len(results.load_losses(job)) for job in jobs)
    return f"{count} windows are measured and kept; run the same command again to resume"


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
    tokenizer_hash = tokenizer_digest(subject.directory)
    return [
        PerplexityMeasurement(subject.directory, digest, text, tokenizer, tokenizer_hash, settings) for text in texts
    ]


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
