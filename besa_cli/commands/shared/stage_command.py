"""Shared driver of `prune`, `tune` and `quantize`: lock the run, get the calibration set, run or forecast the job."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from besa_cli.calibration.request import CalibrationRequest
from besa_cli.commands.shared import calibration_source, forecast_view
from besa_cli.commands.shared.forecast_view import ForecastJob
from besa_cli.console import Console

if TYPE_CHECKING:
    from besa_cli.checkpoint.manifests import StageManifest
    from besa_cli.checkpoint.reports import BlockReport, PassReport
    from besa_cli.checkpoint.runs import Run
    from besa_cli.jobs.request import Request
    from besa_cli.models import Model
    from besa_cli.stream.block import OnStep


class StageCommandJob(ForecastJob, Protocol):
    """Job that makes a stage: `besa_cli.jobs.stage.StageJob` or `besa_cli.jobs.tune_job.TuneJob`."""

    @property
    def number_of_blocks(self) -> int:
        """Number of blocks of the model."""

    def work(self, on_step: "OnStep") -> "Iterator[BlockReport | PassReport]":
        """Do the work; yield a report of each part."""

    def finish(self) -> "StageManifest":
        """Put the stage in its place; return its manifest."""


def stage(
    job_of: Callable[..., StageCommandJob],
    request: "Request",
    source: "Model",
    run: "Run",
    calibration: CalibrationRequest,
    console: Console,
    *,
    restart: bool,
    dry_run: bool,
) -> "StageManifest | None":
    """Make a stage, or show its forecast if `dry_run`.

    Parameters
    ----------
    job_of : function of run, source, calibration set and request
        Makes the job.
    request : Request
    source : Model
        Checkpoint that the stage is made from.
    run : Run
        Directory that the stage is written to.
    calibration : CalibrationRequest
        Samples to use; no effect with a method that uses none.
    console : Console
    restart : bool
        Start over.
    dry_run : bool
        Write nothing.

    Returns
    -------
    dict or None
        Manifest of the finished stage; None after a dry run.
    """
    from besa_cli.calibration import prepare
    from besa_cli.calibration.own_text import Machine
    from besa_cli.checkpoint.reports import PassReport
    from besa_cli.jobs.stage import finish_exchange
    from besa_cli.system import lock

    name = request.command
    machine = Machine(device=request.device, dtype=request.dtype, max_memory=request.max_memory)
    with lock.hold_existing(run.path) if dry_run else lock.hold(run.path, f"besa {name} --run {run.path}"):
        tokens = (
            calibration_source.calibration(
                source, run, calibration, console, restart=restart, keep=not dry_run, machine=machine
            )
            if request.uses_calibration
            else prepare.unobserved(source)
        )
        if dry_run:
            forecast_view.show_job(job_of(run, source, tokens, request, restart=restart), console)
            return None
        finish_exchange(run, request.stage)
        job = job_of(run, source, tokens, request, restart=restart, notify=console.note)
        if job.done:
            console.note(f"{run.stage(request.stage)} is finished already, with the same options")
        else:
            console.note(job.title)
        with console.blocks(name, job.number_of_blocks) as progress:
            for report in job.work(progress.step):
                if isinstance(report, PassReport):
                    progress.passed(report)
                else:
                    progress.finished(report)
        return job.finish()
