"""Choice of the calibration set: the one of `--calibration`, the one in the run directory, or a new one."""

from typing import TYPE_CHECKING

from besa_cli.calibration.request import CalibrationRequest
from besa_cli.console import Console
from besa_cli.errors import UsageError
from besa_cli.system.disk import MANIFEST

if TYPE_CHECKING:
    from besa_cli.calibration.calibration_set import CalibrationSet
    from besa_cli.calibration.own_text import Machine
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
    machine: "Machine | None" = None,
) -> "CalibrationSet":
    """Return the calibration set of `--calibration` or of the run directory; without one, draw it.

    Parameters
    ----------
    model : Model
        Its tokenizer and limits are used.
    run : Run
        Directory that a new set is written to.
    request : CalibrationRequest
    console : Console
    restart : bool
        Replace the set in the run directory if options say which samples to draw.
    keep : bool, default=True
        Write a new set.
    machine : Machine, optional
        Where the model computes if it writes samples itself.

    Raises
    ------
    UsageError
        Options to draw samples beside `--calibration`.
    BesaError
        The set does not fit the model or the options, or cannot be drawn.
    """
    from besa_cli.calibration import calibration_set as sets
    from besa_cli.calibration import prepare

    if keep:
        sets.recover(run.calibration)
    names = list(request.given())
    if request.shared is not None:
        if names:
            raise UsageError(
                f"--calibration {request.shared} and --{_option(names[0])} exclude each other",
                "leave one out: the set has its own samples",
            )
        return prepare.reuse(model, request.shared)
    if not names and (run.calibration / MANIFEST).exists():
        return prepare.reuse(model, run.calibration)
    drawn = prepare.calibration_options(model, request, console.note)
    return prepare.calibrate(
        model, drawn, run.calibration, request.data_dir, console.note, restart=restart, keep=keep, machine=machine
    )


def refuse_samples(request: CalibrationRequest, method: str) -> None:
    """Refuse options that choose calibration samples, for a method that uses none.

    Raises
    ------
    UsageError
        Such an option is given.
    """
    shared = {} if request.shared is None else {"calibration": request.shared}
    for name, value in {**shared, **request.given()}.items():
        if isinstance(value, bool):
            option = f"--{name}" if value else f"--no-{name}"
        else:
            option = " ".join([f"--{_option(name)}", *map(str, value if isinstance(value, list) else [value])])
        raise UsageError(f"{option} has no effect with --method {method}, which uses no samples", "leave it out")


def _option(field: str) -> str:
    return field.replace("_", "-")
