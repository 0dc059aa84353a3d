"""`besa import`: restore the stage that a sparse export was made from."""

import time
from pathlib import Path
from typing import Annotated

import typer

from besa_cli.commands.shared import options
from besa_cli.console import Console


def import_(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", callback=options.expand_utf8, help="Directory that besa export --format sparse wrote."
        ),
    ],
    run: options.RunOption = options.DEFAULT_RUN,
    restart: options.RestartOption = False,
    config: options.ConfigOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Restore the stage of a sparse export in a run directory, byte for byte.

    Examples:

        besa import besa-run/export/sparse --run copy
        besa import downloads/my-model --run copy --restart
        besa import downloads/my-model --json
    """
    console = Console(json=as_json)
    from besa_cli.checkpoint.runs import Run
    from besa_cli.jobs.import_ import ImportJob
    from besa_cli.system import lock

    with lock.hold(run, f"besa import --run {run}"):
        job = ImportJob(directory, Run(run), restart=restart)
        if job.done:
            console.note(f"{job.directory} is that stage already")
        with console.blocks("import", job.number_of_shards) as progress:
            began = time.monotonic()
            for index, _ in enumerate(job.shards()):
                progress.advance(index, time.monotonic() - began)
                began = time.monotonic()
        manifest = job.finish()
        console.line(f"{job.directory}: the {manifest['stage']} stage, as it was exported")
        console.emit_json({"directory": str(job.directory), **manifest})
