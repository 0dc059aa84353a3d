"""A command that makes a stage: its run is held, its samples are there, and it is forecast or done."""

from typing import TYPE_CHECKING

from besa_cli.calibration.request import CalibrationRequest
from besa_cli.commands.shared import calibration_source, forecast_view
from besa_cli.console import Console

if TYPE_CHECKING:
    from besa_cli.checkpoint.manifests import StageManifest
    from besa_cli.checkpoint.runs import Run
    from besa_cli.jobs.request import StageRequest
    from besa_cli.models import Model
    from besa_cli.system.ranks import Ranks


def stage(
    request: "StageRequest",
    source: "Model",
    run: "Run",
    calibration: CalibrationRequest,
    console: Console,
    *,
    restart: bool,
    dry_run: bool,
    world: "Ranks | None" = None,
) -> "StageManifest | None":
    """The manifest of the finished stage; None of a dry run, which shows its forecast, and on all ranks but the first.

    `calibration` has no effect with a method that uses no samples.
    """
    from besa_cli.calibration import prepare
    from besa_cli.jobs import ranks
    from besa_cli.jobs.stage import StageJob, recover
    from besa_cli.system import lock

    if world is not None and not world.is_main:
        ranks.run_worker(source, request, world)
        return None
    name = request.command
    with lock.hold_existing(run.path) if dry_run else lock.hold(run.path, f"besa {name} --run {run.path}"):
        tokens = (
            calibration_source.calibration(source, run, calibration, console, restart=restart, keep=not dry_run)
            if request.uses_calibration
            else prepare.unobserved(source)
        )
        if dry_run:
            forecast_view.job(StageJob(run, source, tokens, request, restart=restart), console)
            return None
        recover(run, request.stage)
        job = StageJob(run, source, tokens, request, restart=restart, notify=console.note, world=world)
        if job.done:
            console.note(f"{run.stage(request.stage)} is finished already, with the same options")
        else:
            console.note(job.title)
        with console.blocks(name, job.number_of_blocks) as progress:
            for report in job.blocks(progress.step):
                progress.finished(report)
        return job.finish()
