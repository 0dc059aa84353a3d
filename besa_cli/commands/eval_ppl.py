"""`besa eval ppl`: perplexity of a stage and of the dense model it was made from, and the divergence between them."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from besa_cli.commands.shared import forecast_view, options, panels
from besa_cli.commands.shared import subject as subjects
from besa_cli.commands.shared.subject import Subject
from besa_cli.console import Console, human_divergence, human_perplexity, human_share
from besa_cli.errors import Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from besa_cli.evaluation.measurement import (
        Loss,
        Perplexity,
        PerplexityMeasurement,
        PerplexitySettings,
        WindowComparison,
    )
    from besa_cli.evaluation.packed_perplexity import PackedPerplexityRun
    from besa_cli.evaluation.perplexity import PerplexityRun
    from besa_cli.evaluation.plan import Load, PerplexityPlan
    from besa_cli.evaluation.results import Results
    from besa_cli.evaluation.texts import EvaluationText
    from besa_cli.stream.forecast import Forecast


def ppl(
    datasets: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATASET", help="wikitext2, ptb, c4 or a text file.", show_default="wikitext2"),
    ] = None,
    model: options.AnyModelOption = None,
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

    Both pass the same windows side by side. That also gives the KL divergence of the stage's predictions from the dense
    model's (nats per token), and the share of tokens for which both predict the same token as the most likely one.

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

    where = subjects.device(device, model)
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
    subject = subjects.find(model, run, console, baseline=baseline, exports=True)
    if dry_run:
        started = compute.age()
        total = forecast.combine(_forecasts(subject, selected, settings))
        forecast_view.show(replace(total, seconds=started + total.seconds), console)
        return
    _show(subject, _measure(subject, selected, settings, console), console)


def _measure(
    subject: Subject, texts: "Sequence[EvaluationText]", settings: "PerplexitySettings", console: Console
) -> "list[tuple[Perplexity, Perplexity | None]]":
    """Return the results of subject and baseline on each text: those stored, and one pass through each for others.

    Without a baseline a stored comparison with it is left out, so that what is shown does not depend on what is stored.
    """
    from besa_cli.evaluation.results import Results

    results = Results(subject.results) if subject.results else None
    plan = _plan(subject, texts, settings, results.load if results else lambda _: None, console.note)
    if results:
        _note_stored(subject, plan, results, console)
    measured, dense = dict(plan.stored), dict(plan.stored_baseline)
    if plan.alone:
        found, _ = _walk(subject, plan.of(plan.alone), [], results, console)
        measured.update(zip(plan.alone, found, strict=True))
    if plan.together:
        found, others = _walk(subject, plan.of(plan.together), plan.baseline_of(plan.together), results, console)
        measured.update(zip(plan.together, found, strict=True))
        dense = {**dict(zip(plan.together, others, strict=True)), **dense}
    if plan.baseline_alone and subject.baseline:
        found, _ = _walk(subject.baseline, plan.baseline_of(plan.baseline_alone), [], results, console)
        dense.update(zip(plan.baseline_alone, found, strict=True))
    if subject.baseline is None:
        measured = {
            number: replace(result, kl=None, same_token=None, baseline_digest=None)
            for number, result in measured.items()
        }
    return [(measured[number], dense.get(number)) for number in range(len(plan.jobs))]


def _plan(
    subject: Subject,
    texts: "Sequence[EvaluationText]",
    settings: "PerplexitySettings",
    load: "Load",
    notify: "Callable[[str], None]" = lambda _: None,
) -> "PerplexityPlan":
    """Plan the measurement of subject and baseline; `load` returns a stored result.

    The digest of a stage is checked before its stored results are used; that of its baseline if that is measured.
    """
    from besa_cli.evaluation import plan

    jobs = _jobs(subject, subjects.digest(subject), texts, settings, notify)
    baseline = subject.baseline
    made = plan.plan(jobs, _jobs(baseline, str(baseline.digest), texts, settings, notify) if baseline else [], load)
    if baseline and made.passes_baseline:
        subjects.refuse_changed(baseline)
    return made


def _note_stored(subject: Subject, plan: "PerplexityPlan", results: "Results", console: Console) -> None:
    """Note which results are taken from files, and which stored ones are measured again."""
    for number, job in enumerate(plan.jobs):
        if number in plan.stored:
            console.note(f"{subject.name}: result taken from {results.file(job)}")
        if number in plan.replaced and subject.baseline:
            lacks = f"lacks the KL divergence from {subject.baseline.name}"
            console.note(f"{subject.name}: measured again, {results.file(job)} {lacks}")
    for number, job in enumerate(plan.baseline):
        if subject.baseline and number in plan.stored_baseline:
            console.note(f"{subject.baseline.name}: result taken from {results.file(job)}")
            if number in plan.together:
                console.note(
                    f"{subject.baseline.name}: passes again to be compared with; --no-baseline leaves that out"
                )


def _forecasts(subject: Subject, texts: "Sequence[EvaluationText]", settings: "PerplexitySettings") -> "list[Forecast]":
    """Forecast the measurement of subject and baseline, run by run; the first includes the time of the checks."""
    from besa_cli.evaluation import results
    from besa_cli.system import disk

    began = time.perf_counter()
    directory = subject.results
    if directory:
        disk.require_writable(directory)
    plan = _plan(subject, texts, settings, lambda job: results.load(directory / job.file) if directory else None)
    checks = time.perf_counter() - began
    found = []
    for jobs, baseline in plan.runs() or [(list(plan.jobs), [])]:
        start = time.perf_counter()
        walk = _perplexity_run(subject, jobs, baseline=baseline)
        seconds = time.perf_counter() - start
        forecast = walk.forecast(directory or subject.directory)
        found.append(replace(forecast, seconds=forecast.seconds + seconds))
    if not plan.runs():
        return [replace(found[0], seconds=checks, left=0)]
    return [replace(found[0], seconds=found[0].seconds + checks), *found[1:]]


def _walk(
    subject: Subject,
    jobs: "Sequence[PerplexityMeasurement]",
    baseline: "Sequence[PerplexityMeasurement]",
    results: "Results | None",
    console: Console,
) -> "tuple[list[Perplexity], list[Perplexity]]":
    """Measure texts with the subject, beside its baseline if `baseline` is given; return the results of both.

    Results are stored, those of the baseline unless it has one already.
    """
    known = [results.load_losses(job) for job in jobs] if results else None
    compared = None
    if results and baseline:
        compared = [results.load_comparisons(job, other.digest) for job, other in zip(jobs, baseline, strict=True)]
    walk = _perplexity_run(subject, jobs, known, baseline, compared)
    for job, losses in zip(jobs, walk.losses, strict=True):
        if losses:
            console.note(
                f"{job.dataset}, {subject.name}: {len(losses)} of {len(job.windows)} windows are measured already"
            )
    for note in walk.notes:
        console.note(note)
    names = f"{subject.name} and {subject.baseline.name}" if baseline and subject.baseline else subject.name
    try:
        with console.blocks(f"{', '.join(job.dataset for job in jobs)}, {names}", walk.steps, walk.work) as progress:
            for step in walk:
                progress.advance(step.index, step.seconds, step.phase)
                if results:
                    _store_windows(results, walk, jobs, step.measured)
    except KeyboardInterrupt as interrupt:
        raise Interrupted(_hint(results, jobs)) from interrupt
    measured, others = walk.results(), walk.baseline_results()
    if results and subject.baseline:
        new = [(job, other) for job, other in zip(baseline, others, strict=True) if results.load(job) is None]
        _store(results, subject.baseline, new)
    if results:
        _store(results, subject, zip(jobs, measured, strict=True))
    return measured, others


def _perplexity_run(
    subject: Subject,
    jobs: "Sequence[PerplexityMeasurement]",
    known: "Sequence[Sequence[Loss]] | None" = None,
    baseline: "Sequence[PerplexityMeasurement]" = (),
    compared: "Sequence[Sequence[WindowComparison]] | None" = None,
) -> "PerplexityRun | PackedPerplexityRun":
    """Return the measurement by the block stream; that of a sparse export, by the whole packed model."""
    from besa_cli.evaluation.packed_perplexity import PackedPerplexityRun
    from besa_cli.evaluation.perplexity import PerplexityRun

    return PackedPerplexityRun(jobs, known) if subject.packed else PerplexityRun(jobs, known, baseline, compared)


def _store_windows(
    results: "Results",
    walk: "PerplexityRun | PackedPerplexityRun",
    jobs: "Sequence[PerplexityMeasurement]",
    texts: "Sequence[int]",
) -> None:
    for number in texts:
        results.save_losses(jobs[number], walk.losses[number], walk.comparisons[number], walk.baseline_digest)


def _store(
    results: "Results", subject: Subject, measured: "Iterable[tuple[PerplexityMeasurement, Perplexity]]"
) -> None:
    for job, result in measured:
        results.save(job, result, {"name": subject.name, "directory": str(subject.directory)})


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
    baseline = subject.baseline.name if subject.baseline else "dense"
    compared = any(measured.kl is not None for measured, _ in rows)
    header = ("data", "split", "model", "windows", "context", "perplexity", "difference")
    cells: list[tuple[str | int, ...]] = []
    for measured, dense in rows:
        for name, result in ((subject.name, measured), (baseline, dense)):
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
                    *(_comparison(result) if compared else ()),
                )
            )
    console.table("", (*header, f"KL to {baseline}", "same token") if compared else header, cells)
    results = [
        {
            **asdict(measured),
            "dense": asdict(dense) if dense else None,
            "difference": measured.perplexity - dense.perplexity if dense else None,
        }
        for measured, dense in rows
    ]  # fmt: skip
    console.emit_json({"model": subject.name, "directory": str(subject.directory), "results": results})


def _comparison(result: "Perplexity") -> tuple[str, str]:
    """Return the cells of the comparison with the baseline; empty where there is none."""
    if result.kl is None or result.same_token is None:
        return "", ""
    return human_divergence(result.kl), human_share(result.same_token)
