"""`besa bench`: speed and memory of a stage, dense, from packed weights and in llama.cpp, measured in turns."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from besa_cli.commands.shared import options, panels
from besa_cli.commands.shared import subject as subjects
from besa_cli.console import Console, human_bytes, human_share
from besa_cli.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from besa_cli.bench.contenders import Contender, Runner, TokenLoad
    from besa_cli.bench.entry import Entries
    from besa_cli.bench.rounds import Rounds, SpeedComparison, Speeds
    from besa_cli.checkpoint.runs import Run
    from besa_cli.commands.shared.subject import Subject

_PROMPT, _NEW, _ROUNDS = 128, 32, 5
_COLUMNS = (
    "",
    "prompt",
    "new",
    "batch",
    "prefill, tokens/s",
    "decode, tokens/s",
    "read per step",
    "of bandwidth",
    "memory",
)


def bench(
    model: options.AnyModelOption = None,
    prompt_tokens: Annotated[
        list[int] | None,
        panels.MEASUREMENT("--prompt-tokens", "Tokens of the prompt. Repeatable.", str(_PROMPT), metavar="N"),
    ] = None,
    new_tokens: Annotated[
        int, panels.MEASUREMENT("--new-tokens", "Tokens generated after the prompt.", metavar="N")
    ] = _NEW,
    batch: Annotated[
        list[int] | None, panels.MEASUREMENT("--batch", "Sequences at a time. Repeatable.", "1", metavar="N")
    ] = None,
    rounds: Annotated[
        int, panels.MEASUREMENT("--rounds", "Rounds, whose medians count; at least 5.", metavar="N")
    ] = _ROUNDS,
    dtype: options.DtypeOption = "auto",
    run: subjects.RunOption = None,
    config: options.ConfigOption = None,
    plot: Annotated[
        Path | None,
        panels.OUTPUT("--plot", "Draw the speeds to this file.", metavar="FILE", callback=options.expand_home),
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Measure speed and memory on this CPU: dense in transformers, sparse from packed weights, and in llama.cpp.

    Takes the newest stage of the run with its sparse and GGUF exports, or a sparse export (--model), packed and
    expanded.

    Examples:

        besa bench
        besa bench --prompt-tokens 128 --prompt-tokens 1024 --batch 1 --batch 8
        besa bench --model besa-run/export/sparse --plot speed.png
    """
    console = Console(json=as_json)
    from besa_cli.bench import entry, plots
    from besa_cli.bench.contenders import TokenLoad
    from besa_cli.bench.rounds import LEAST_ROUNDS
    from besa_cli.simulation.plots import require
    from besa_cli.system import compute, lock

    if rounds < LEAST_ROUNDS:
        raise UsageError(f"--rounds {rounds} is less than {LEAST_ROUNDS}", f"give {LEAST_ROUNDS} or more")
    workloads = [
        TokenLoad(prompt=length, new=new_tokens, batch=sequences)
        for length in dict.fromkeys(prompt_tokens or [_PROMPT])
        for sequences in dict.fromkeys(batch or [1])
    ]
    _require_counts(workloads)
    if plot:
        require(plot)
    computed = compute.dtype(dtype, compute.device("cpu"))
    subject = subjects.find(model, run, console, baseline=False, exports=True)
    measured_run = _run_of(subject, model)
    entries = _entries(subject, measured_run)
    _require_room(entries, workloads)
    entry.require_memory(entries, computed)
    if measured_run:
        lock.require_writable(measured_run.path)
    longest = max(workload.prompt for workload in workloads) + new_tokens
    chosen = entry.contenders(entries, compute.name_of(computed), longest)
    _note_missing(entries, console)
    try:
        measured = _measure(chosen, workloads, rounds, subject.name, console)
    except KeyboardInterrupt as interrupt:
        raise Interrupted("nothing was kept") from interrupt
    _show(subject, measured, console, measured_run)
    if plot:
        plots.draw(measured.results(), measured.bandwidth, plot, title=subject.name)
        console.note(f"drawn to {plot}")


def _require_counts(workloads: "Sequence[TokenLoad]") -> None:
    """Check the options that make the workloads.

    Raises
    ------
    UsageError
        A value is too small or too large.
    """
    for workload in workloads:
        for name, value, least in (
            ("--prompt-tokens", workload.prompt, 1),
            ("--new-tokens", workload.new, 2),
            ("--batch", workload.batch, 1),
        ):
            if not least <= value <= options.MOST:
                raise UsageError(f"{name} {value} is not in {least} … {options.MOST}", f"give {least} or more")


def _run_of(subject: "Subject", model: str | None) -> "Run | None":
    """Return the run whose stage is measured; None for a model that was named."""
    from besa_cli.checkpoint.runs import Run

    return None if model is not None or subject.results is None else Run(subject.results.parent)


def _entries(subject: "Subject", measured_run: "Run | None") -> "Entries":
    """Return the files to measure; a stage of a run has its exports beside it."""
    from besa_cli.bench import entry

    if measured_run is None:
        return entry.of_directory(subject.directory)
    return entry.of_stage(measured_run, subject.directory)


def _require_room(entries: "Entries", workloads: "Sequence[TokenLoad]") -> None:
    """Check that prompts and new tokens fit into the model's context.

    Raises
    ------
    UsageError
        They do not.
    """
    from besa_cli.bench import entry

    longest = entry.maximum_length(entries)
    for workload in workloads:
        if longest is not None and workload.prompt + workload.new > longest:
            raise UsageError(
                f"--prompt-tokens {workload.prompt} and --new-tokens {workload.new} are more than the {longest} "
                f"that {entries.dense} supports",
                "give less of either",
            )


def _note_missing(entries: "Entries", console: Console) -> None:
    """Note which ways to run the model are not measured, and why."""
    from besa_cli.bench import entry

    if entries.sparse is None:
        console.note("no sparse export of this model: make one with besa export --format sparse")
    if entry.llama_cpp() is None:
        console.note("llama.cpp is not installed (no package llama_cpp, no llama-bench): it is not measured")
    elif not entries.gguf:
        console.note("no GGUF export of this model for llama.cpp: make one with besa export --format gguf")


@contextlib.contextmanager
def _started(contenders: "Sequence[Contender]", console: Console) -> "Iterator[list[Runner]]":
    """Load every contender in a process of its own; all end with the context."""
    from besa_cli.bench import entry

    with contextlib.ExitStack() as stack:
        runners = []
        for contender in contenders:
            console.note(f"loading: {contender.name}")
            runner = entry.start(contender)
            stack.callback(runner.close)
            runners.append(runner)
        yield runners


def _measure(
    contenders: "Sequence[Contender]", workloads: "Sequence[TokenLoad]", rounds: int, title: str, console: Console
) -> "Rounds":
    """Load all contenders, run all rounds, and return them."""
    from besa_cli.bench.contenders import Contender
    from besa_cli.bench.rounds import Rounds

    reading = Contender(name="memory", program="reading")
    with _started([*contenders, reading], console) as (*runners, reader):
        measured = Rounds(runners, reader, workloads, rounds)
        with console.blocks(title, rounds + 1) as progress:
            began = time.monotonic()
            for number in measured:
                progress.advance(number, time.monotonic() - began, "warming up" if number == 0 else f"round {number}")
                began = time.monotonic()
    return measured


def _show(subject: "Subject", measured: "Rounds", console: Console, measured_run: "Run | None") -> None:
    """Print the measurement, and keep that of a run's stage."""
    from besa_cli.bench import machine, record
    from besa_cli.bench.entry import SPARSE
    from besa_cli.bench.rounds import compare

    results, facts = measured.results(), machine.describe()
    comparisons = compare(results, SPARSE)
    console.line(
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads; packed kernels: "
        f"{facts['kernels']}; the threads read {measured.bandwidth / 1e9:.1f} GB/s from memory"
    )
    console.table("", _COLUMNS, [_row(each) for each in results])
    for each in comparisons:
        console.line(_sentence(each))
    found = record.record(results, comparisons, facts, measured.bandwidth, measured.count)
    if measured_run and subject.digest:
        record.save(found, measured_run, subject.name, subject.digest)
    console.emit_json({"model": subject.name, "directory": str(subject.directory), **found})


def _row(speeds: "Speeds") -> tuple[str | int | float, ...]:
    read = "-" if speeds.weights_read is None else human_bytes(speeds.weights_read)
    return (
        speeds.name,
        speeds.workload.prompt,
        speeds.workload.new,
        speeds.workload.batch,
        speeds.prefill,
        speeds.decode,
        read,
        "-" if speeds.share is None else human_share(speeds.share),
        human_bytes(speeds.resident),
    )


def _sentence(comparison: "SpeedComparison") -> str:
    """Say in a line how sparse compares, and plainly where it is not faster."""
    workload = comparison.workload
    where = f"{workload.prompt} + {workload.new} tokens, batch {workload.batch}"
    slower = [name for name in ("prefill", "decode") if getattr(comparison, name) <= 1]
    verdict = f"; NOT faster: {' and '.join(slower)}" if slower else ""
    return (
        f"sparse beside {comparison.other} ({where}): prefill {comparison.prefill:.2f} times as fast, decode "
        f"{comparison.decode:.2f}, memory {comparison.resident:.2f} times as much{verdict}"
    )
