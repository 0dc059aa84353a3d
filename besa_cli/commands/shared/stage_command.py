"""Shared driver of `prune` and `quantize`: lock the run, get the calibration set, then run or forecast the job."""

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
    """Make a stage, or show its forecast if `dry_run`.

    Parameters
    ----------
    request : StageRequest
    source : Model
        Checkpoint to prune or quantize.
    run : Run
        Directory that the stage is written to.
    calibration : CalibrationRequest
        Samples to use; no effect with a method that uses none.
    console : Console
    restart : bool
        Start over.
    dry_run : bool
        Write nothing.
    world : Ranks, optional
        Ranks that share the samples.

    Returns
    -------
    dict or None
        Manifest of the finished stage; None after a dry run, and on all ranks but the main one.
    """
    from besa_cli.calibration import prepare
    from besa_cli.jobs import ranks
    from besa_cli.jobs.stage import StageJob, finish_exchange
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
            forecast_view.show_job(StageJob(run, source, tokens, request, restart=restart), console)
            return None
        finish_exchange(run, request.stage)
        job = StageJob(run, source, tokens, request, restart=restart, notify=console.note, world=world)
        if job.done:
            console.note(f"{run.stage(request.stage)} is finished already, with the same options")
        else:
            console.note(job.title)
        with console.blocks(name, job.number_of_blocks) as progress:
            for report in job.blocks(progress.step):
                progress.finished(report)
            for each in job.passes(progress.step):
                progress.passed(each)
            for report in job.repaired(progress.step):
                progress.finished(report)
        return job.finish()
