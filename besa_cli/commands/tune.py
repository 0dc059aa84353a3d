"""`besa tune`: tune the kept weights of a pruned stage to the dense model's predictions."""

from typing import TYPE_CHECKING, Annotated

from besa_cli import models
from besa_cli.commands.shared import held_out_view, option_groups, options, panels, stage_command
from besa_cli.console import Console
from besa_cli.errors import BesaError

if TYPE_CHECKING:
    from besa_cli.checkpoint.manifests import StageManifest
    from besa_cli.checkpoint.runs import Run
    from besa_cli.models import Model

ModelOption = Annotated[
    str | None,
    panels.DATA(
        "--model", "Pruned stage to tune.", "the run's pruned stage", metavar="MODEL", callback=options.require_utf8
    ),
]
EpochsOption = Annotated[
    int, panels.WHOLE_MODEL("--epochs", "Passes over the samples.", min=1, max=options.MOST, metavar="N")
]
RateOption = Annotated[
    float | None,
    panels.WHOLE_MODEL(
        "--lr",
        "Learning rate, relative to the size of a linear's kept weights.",
        "0.001",
        min=0.0,
        metavar="RATE",
    ),
]


@option_groups.expand
def tune(
    *,
    model: ModelOption = None,
    calibration: option_groups.CalibrationGroup,
    epochs: EpochsOption = 1,
    lr: RateOption = None,
    compute: option_groups.ComputeGroup,
    into: option_groups.RunGroup,
) -> None:
    """Tune the kept weights of the whole pruned model to the dense model's predictions. Re-run to resume.

    Examples:

        besa tune
        besa tune --epochs 2 --lr 0.0005
        besa tune --model besa-run/pruned --run tuned --dry-run
    """
    console = Console(json=into.as_json)
    from besa_cli.checkpoint.runs import Run
    from besa_cli.jobs import tune as requests
    from besa_cli.jobs.tune_job import TuneJob

    request = requests.request(epochs=epochs, lr=lr, **compute.placement(calibration))
    directory = Run(into.run)
    source = _source(model, directory, console)
    manifest = stage_command.stage(
        TuneJob, request, source, directory, calibration, console, restart=into.restart, dry_run=into.dry_run
    )
    if manifest is not None:
        _show(manifest, directory, console)


def _source(model: str | None, run: "Run", console: Console) -> "Model":
    """Return the stage to tune: `--model`, else the run's pruned stage.

    Raises
    ------
    BesaError
        There is none, it is unfinished, or quantized.
    """
    from besa_cli.checkpoint import manifests
    from besa_cli.jobs.tune_job import refuse_unpruned

    if model is not None:
        source = models.resolve(model, notify=console.note)
    else:
        stage = run.existing_stage("pruned")
        if not (stage / manifests.MANIFEST).exists():
            raise BesaError(f"{run.path} has no pruned stage", f"make one: besa prune --run {run.path}")
        source = models.Model(name=str(stage), kind="local", directory=stage, revision=None)
    refuse_unpruned(source.directory)
    return source


def _show(manifest: "StageManifest", run: "Run", console: Console) -> None:
    counts, directory = manifest["counts"], run.stage("tuned")
    console.line(
        f"{directory}: {manifest['options']['model']} tuned, {counts['pruned']:,} of {counts['weights']:,} weights "
        f"pruned ({100 * counts['sparsity']:.4f} %)"
    )
    console.line(held_out_view.whole_model_in_words(manifest["whole_model"]))
    console.emit_json({"directory": str(directory), **manifest})
