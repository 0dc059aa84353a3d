"""`besa run`: run the commands of experiment files one after another, then show all results in one table."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from besa_cli.commands.shared import config_file, options, subcommand
from besa_cli.console import Console
from besa_cli.errors import UsageError


@dataclass(frozen=True)
class Experiment:
    """Experiment file, the commands that it has sections for, and the run directory of all of them."""

    file: Path
    commands: tuple[str, ...]
    run: Path


def run(
    context: typer.Context,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE.yaml...", callback=options.expand_home, help="Experiment files, run one after another."
        ),
    ],
    data_dir: options.DataDirOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Run experiment files, in which each section is a command. Re-run the same command to resume.

    Examples:

        besa run experiment.yaml
        besa run wanda.yaml sparsegpt.yaml besa.yaml
        besa run examples/paper/llama-7b-row.yaml --data-dir ~/datasets
    """
    console = Console(json=as_json)
    experiments = [_read(context, file) for file in files]
    _require_own_runs(experiments)
    environment = {} if data_dir is None else {"BESA_DATA": str(data_dir)}
    for experiment in experiments:
        for command in experiment.commands:
            words = [*command.split(), "--config", str(experiment.file)]
            console.note(f"besa {shlex.join(words)}")
            subcommand.call(words, environment=environment, output="discarded" if as_json else "shown")
    measured = [str(experiment.run) for experiment in experiments if any((experiment.run / "eval").glob("*.json"))]
    if measured:
        words = ["eval", "compare", *measured, "--format", "json" if as_json else "table"]
        subcommand.call(words, environment=environment)
    else:
        console.emit_json({"columns": [], "rows": [], "notes": []})


def _read(context: typer.Context, file: Path) -> Experiment:
    """Parse every section as its command would, before any of them runs."""
    _, sections = config_file.read(file)
    if not sections:
        raise UsageError(f"{file} has no sections", "write 'prune:' with options below it, then 'eval ppl:' and so on")
    runs: dict[str, Path] = {}
    for name, section in sections.items():
        place = f"in {file}, line {section.line}"
        command = config_file.command(context, name, place)
        if not {"config", "run"} <= {parameter.name for parameter in command.params}:
            raise UsageError(
                f"'{name}' {place} cannot be part of an experiment",
                "use commands with --run, such as prune and eval ppl",
            )
        root = type(context)(context.find_root().command, info_name="besa")
        parsed = command.make_context(name, ["--config", str(file)], parent=root)
        runs[name] = parsed.params["run"] or options.DEFAULT_RUN
    if len(set(runs.values())) > 1:
        listed = ", ".join(f"{name}: {directory}" for name, directory in runs.items())
        raise UsageError(f"{file} names several run directories ({listed})", "write 'run:' once, above the sections")
    return Experiment(file, tuple(sections), next(iter(runs.values())))


def _require_own_runs(experiments: Sequence[Experiment]) -> None:
    owners: dict[Path, Path] = {}
    for experiment in experiments:
        other = owners.setdefault(experiment.run.resolve(), experiment.file)
        if other is not experiment.file:
            raise UsageError(
                f"{other} and {experiment.file} both work on {experiment.run}",
                "write 'run: DIR' with a different directory in each file, and unset BESA_RUN",
            )
