"""The calibration set that a command works with: shared, the run's own, or made now."""

from typing import TYPE_CHECKING

from besa_cli.calibration.request import CalibrationRequest
from besa_cli.console import Console
from besa_cli.errors import UsageError
from besa_cli.system.disk import MANIFEST

if TYPE_CHECKING:
    from besa_cli.calibration.calibration_set import CalibrationSet
    from besa_cli.checkpoint.runs import Run
    from besa_cli.models import Model


def calibration(
    model: "Model",
    run: "Run",
    request: CalibrationRequest,
    console: Console,
    *,
    restart: bool,
    keep: bool = True,
) -> "CalibrationSet":
    """The set of `--calibration`, or of the run directory; made now where there is none, and kept there."""
    from besa_cli.calibration import calibration_set as sets
    from besa_cli.calibration import prepare

    if keep:
        sets.recover(run.calibration)
    given = list(request.given())
    if request.shared is not None:
        if given:
            raise UsageError(
                f"--calibration {request.shared} and --{given[0]} exclude each other",
                "the set was drawn with options of its own",
            )
        return prepare.reuse(model, request.shared)
    if not given and (run.calibration / MANIFEST).exists():
        return prepare.reuse(model, run.calibration)
    drawn = prepare.calibration_options(model, request, console.note)
    return prepare.calibrate(model, drawn, run.calibration, request.data_dir, console.note, restart=restart, keep=keep)


def refuse_samples(request: CalibrationRequest, method: str) -> None:
    """Refuse options that say where samples come from, for a method that observes none.

    Raises
    ------
    UsageError
        There is such an option.
    """
    shared = {} if request.shared is None else {"calibration": request.shared}
    for name, value in {**shared, **request.given()}.items():
        said = " ".join([f"--{name}", *map(str, value if isinstance(value, list) else [value])])
        raise UsageError(f"{said} has no effect with --method {method}, which uses no samples", "leave it out")
