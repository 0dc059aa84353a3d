"""`besa eval tasks`: accuracy of a stage and of the dense model it was made from on zero-shot tasks."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from besa_cli.commands.shared import forecast_view, options, panels, subject
from besa_cli.console import Console, human_bytes, human_seconds
from besa_cli.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from besa_cli.commands.shared.subject import Subject
    from besa_cli.evaluation.zeroshot.harness import Tasks
    from besa_cli.evaluation.zeroshot.results import Score, TaskResult, TaskSettings
    from besa_cli.evaluation.zeroshot.run import TaskMeasurement
    from besa_cli.evaluation.zeroshot.watching import Advance, Progress

TasksArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TASKS",
        help="Tasks of lm-eval, separated by commas or spaces.",
        show_default="piqa,boolq,hellaswag,winogrande,arc_easy,arc_challenge",
    ),
]
ShotsOption = Annotated[
    int | None,
    panels.MEASUREMENT(
        "--num-fewshot",
        "Solved examples in each prompt.",
        "the task's own: 0 for the six",
        max=options.MOST,
        metavar="N",
    ),
]
LimitOption = Annotated[int | None, panels.MEASUREMENT("--limit", "Questions per task.", "all", metavar="N")]
RestartOption = Annotated[bool, panels.MEASUREMENT("--restart", "Measure again, ignoring stored results.")]
BatchOption = Annotated[
    str,
    panels.COMPUTE("--batch-size", "Requests per pass; auto: the largest number that fits.", metavar="N|auto"),
]
StreamedOption = Annotated[
    bool | None,
    panels.COMPUTE(
        "--streamed/--in-memory",
        "Measure block by block, or with the whole model in memory.",
        "streamed if the model would not fit",
    ),
]
DryRunOption = Annotated[
    bool, panels.RUN("--dry-run", "Run all checks and forecast memory and time, but write nothing.")
]
DefinitionsOption = Annotated[
    Path | None,
    panels.OUTPUT(
        "--definitions",
        "Keep the generated task definitions in this directory, for lm_eval --include_path.",
        "deleted at the end",
        metavar="DIR",
        callback=options.expand_home,
    ),
]


def tasks(
    names: TasksArgument = None,
    model: options.AnyModelOption = None,
    baseline: subject.BaselineOption = True,
    data_dir: options.DataDirOption = None,
    num_fewshot: ShotsOption = None,
    limit: LimitOption = None,
    restart: RestartOption = False,
    batch_size: BatchOption = "1",
    streamed: StreamedOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    run: subject.RunOption = None,
    dry_run: DryRunOption = False,
    config: options.ConfigOption = None,
    definitions: DefinitionsOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Measure the accuracy of the newest stage (or of --model) and of its dense model on zero-shot tasks.

    Examples:

        besa eval tasks
        besa eval tasks piqa,boolq --limit 100 --batch-size 8
        besa eval tasks hellaswag --num-fewshot 5 --no-baseline
    """
    console = Console(json=as_json)
    from besa_cli.evaluation.zeroshot import harness
    from besa_cli.evaluation.zeroshot.results import TaskSettings
    from besa_cli.system import compute

    selected = harness.split_names(names or [])
    where = subject.device(device, model)
    resolved = compute.name_of(compute.dtype(dtype, where))  # once: both models are measured in it
    settings = TaskSettings(
        num_fewshot=num_fewshot, limit=limit, batch_size=batch_size, device=where.type, dtype=resolved,
        streamed=bool(streamed),
    )  # fmt: skip
    with harness.prepare(
        selected, data_dir, shots=num_fewshot, keep=None if dry_run else definitions, notify=console.note
    ) as ready:
        measured = subject.find(model, run, console, baseline=baseline, exports=True)
        if measured.packed and streamed:
            raise UsageError(f"--streamed: {model} runs from its packed weights, in memory", "omit the option")
        if streamed is None and not measured.packed:
            settings = _with_memory_mode(measured, settings, console)
        other = measured.baseline
        if dry_run:
            _forecast([model for model in (measured, other) if model], ready, settings, console, restart=restart)
            return
        results = _measure(measured, ready, settings, console, restart=restart)
        dense = _measure(other, ready, settings, console, restart=restart, is_baseline=True) if other else None
    _show(measured, results, dense, console)


def _with_memory_mode(measured: "Subject", settings: "TaskSettings", console: Console) -> "TaskSettings":
    """Stream if the model would not fit in memory; its dense model is as large, and is measured in the same way."""
    from besa_cli.evaluation.zeroshot import fit
    from besa_cli.system import compute

    where = compute.device(settings.device)
    if fit.fits(measured.directory, where, compute.dtype(settings.dtype, where)):
        return settings
    console.note(f"{measured.name} would not fit in memory: it is measured block by block")
    return replace(settings, streamed=True)


def _measure(
    measured: "Subject",
    ready: "Tasks",
    settings: "TaskSettings",
    console: Console,
    *,
    restart: bool,
    is_baseline: bool = False,
) -> "list[TaskResult]":
    """Return the result of every task: the stored one, else measure it now.

    The digest of a stage is checked before its stored results are used; that of its baseline is not.
    """
    from besa_cli.system import lock

    job, by_task = _checked(measured, ready, settings, restart=restart, is_baseline=is_baseline)
    kept = measured.results
    if kept and not all(by_task.values()):
        lock.require_writable(kept.parent)
    origin = {"name": measured.name, "directory": str(measured.directory)}
    try:
        for name, result in by_task.items():
            console.note(f"{name}, {measured.name}: {'measured already' if result else 'measuring'}")
            if result is None:
                progress = _progress(name, measured.name, console)
                by_task[name] = job.measure(name, kept, origin, progress=progress, notify=console.note)
    except KeyboardInterrupt as interrupt:
        raise Interrupted(_hint(kept, len([result for result in by_task.values() if result]))) from interrupt
    return [result for result in by_task.values() if result]


def _checked(
    measured: "Subject", ready: "Tasks", settings: "TaskSettings", *, restart: bool, is_baseline: bool
) -> "tuple[TaskMeasurement, dict[str, TaskResult | None]]":
    """Check a model; return its measurement and the stored result of every task, or None."""
    digest = str(measured.digest) if is_baseline else subject.digest(measured)
    job, kept = _job(measured, digest, ready, settings), measured.results
    by_task = {name: job.load(name, kept) if kept and not restart else None for name in ready.names}
    if is_baseline and not all(by_task.values()):
        subject.refuse_changed(measured)
    return job, by_task


def _forecast(
    models: "Sequence[Subject]", ready: "Tasks", settings: "TaskSettings", console: Console, *, restart: bool
) -> None:
    """Show memory and time of the tasks that are not measured yet, each tried on its first questions."""
    from besa_cli.system import compute, disk

    seconds, rows, records = compute.age(), [], []
    for number, measured in enumerate(models):
        began = time.perf_counter()
        job, by_task = _checked(measured, ready, settings, restart=restart, is_baseline=number > 0)
        if measured.results:
            disk.require_writable(measured.results)
        seconds += time.perf_counter() - began
        for trial in (job.forecast(name, notify=console.note) for name, result in by_task.items() if result is None):
            seconds += trial.seconds
            rows.append((trial.task, measured.name, str(trial.questions), human_seconds(trial.seconds)))
            records.append({"model": measured.name, **asdict(trial)})
    if not rows:
        console.note("everything is measured already: nothing to do")
        console.emit_json({"done": True})
        return
    used, available = compute.peak_resident(), forecast_view.available()
    console.table("", ("task", "model", "questions", "time"), [*rows, ("all", "", "", human_seconds(seconds))])
    console.line(f"main memory: {human_bytes(used)} of {human_bytes(available)}, as measured on the first questions")
    console.emit_json({"done": False, "memory": used, "available": available, "seconds": seconds, "tasks": records})


def _hint(kept: Path | None, count: int) -> str:
    """Return the hint after an interruption."""
    if kept is None:
        return "nothing was kept; with --run DIR results are stored there, and the same command resumes from them"
    return f"{count} tasks of this model are measured and kept; run the same command again to resume"


def _job(measured: "Subject", digest: str, ready: "Tasks", settings: "TaskSettings") -> "TaskMeasurement":
    from besa_cli.evaluation.zeroshot.run import TaskMeasurement
    from besa_cli.models.tokenizer import tokenizer_digest

    tokenizer = subject.tokenizer(measured)
    tokenizer_hash = tokenizer_digest(measured.directory)
    return TaskMeasurement(measured.directory, digest, tokenizer, tokenizer_hash, ready, settings)


def _progress(task: str, model: str, console: Console) -> "Progress":
    """Return the console's progress display, writing to the present stderr: the harness redirects it while it works."""
    stderr = sys.stderr

    @contextlib.contextmanager
    def blocks(steps: int) -> "Iterator[Advance]":
        with contextlib.redirect_stderr(stderr), console.blocks(f"{task}, {model}", steps) as progress:
            yield progress.advance

    return blocks


def _show(
    measured: "Subject", results: "Sequence[TaskResult]", dense: "Sequence[TaskResult] | None", console: Console
) -> None:
    from besa_cli.evaluation.zeroshot.results import AVERAGED, average, versions

    baseline = measured.baseline.name if measured.baseline else "dense"
    beside: list[TaskResult | None] = [*dense] if dense else [None] * len(results)
    pairs = [pair for both in zip(results, beside, strict=True) for pair in _pairs(*both)]
    means = average(results), average(dense) if dense else None
    cells = [_cells(*pair) for pair in pairs]
    if means[0] is not None:
        cells.append(("average", AVERAGED, "-", "-", *_numbers(means[0], None, means[1], None)))
    columns = ["task", "metric", "split", "questions", measured.name, "±"]
    shown = len(columns) + (3 if dense else 0)
    console.table("", [*columns, baseline, "±", "difference"][:shown], [row[:shown] for row in cells])
    console.emit_json(
        {
            "model": measured.name,
            "directory": str(measured.directory),
            "versions": versions(),
            "results": [_json(*both) for both in zip(results, beside, strict=True)],
            "average": {
                "metric": AVERAGED,
                "tasks": len(results),
                "value": means[0],
                "dense": means[1],
                "difference": _difference(*means),
            },
        }
    )


def _pairs(result: "TaskResult", dense: "TaskResult | None") -> "list[tuple[str, Score, Score | None]]":
    """Return every score with its split and the score of the dense model."""
    others = {(score.task, score.metric): score for score in dense.scores()} if dense else {}
    return [(result.split or "-", score, others.get((score.task, score.metric))) for score in result.scores()]


def _cells(split: str, score: "Score", dense: "Score | None") -> tuple[str, ...]:
    questions = "-" if score.questions is None else f"{score.questions} of {score.questions_in_split}"
    other, spread = (dense.value, dense.stderr) if dense else (None, None)
    return (score.task, score.metric, split, questions, *_numbers(score.value, score.stderr, other, spread))


def _numbers(value: float, stderr: float | None, dense: float | None, spread: float | None) -> tuple[str, ...]:
    """Format value and error of both models, and the difference, with four decimals as lm-eval does."""
    cells = [*(f"{number:.4f}" if number is not None else "-" for number in (value, stderr, dense, spread))]
    difference = _difference(value, dense)
    return (*cells, "-" if difference is None else f"{difference:+.4f}")


def _difference(value: float | None, dense: float | None) -> float | None:
    return value - dense if value is not None and dense is not None else None


def _json(result: "TaskResult", dense: "TaskResult | None") -> dict[str, Any]:
    record = {name: value for name, value in asdict(result).items() if name != "harness"}
    scores = []
    for _, score, other in _pairs(result, dense):
        compared = {"dense": asdict(other) if other else None}
        scores.append(
            {**asdict(score), **compared, "difference": _difference(score.value, other.value if other else None)}
        )
    return {**record, "scores": scores}
