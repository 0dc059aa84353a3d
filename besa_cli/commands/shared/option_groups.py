"""Groups of options: dataclasses whose fields become options of the commands that take them."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

from besa_cli.calibration.request import CalibrationRequest
from besa_cli.choices import OptionValue
from besa_cli.commands.shared import options, panels

if TYPE_CHECKING:
    from besa_cli.jobs.request import Placement


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter whose type is a dataclass by the options among the fields of the dataclass.

    Typer reads the options of a command from its signature. A field is an option if its type is `Annotated`; the
    others keep their defaults. The parameters of the command are keyword-only, so that their order is that of the help.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: _options_of(kind) for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        parameters += groups.get(name, [parameter.replace(annotation=hints[name])])

    @functools.wraps(command)
    def with_groups(**values: Any) -> None:
        arguments = {
            name: hints[name](**{option.name: values.pop(option.name) for option in group})
            for name, group in groups.items()
        }
        command(**values, **arguments)

    with_groups.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return with_groups


def _options_of(group: Any) -> list[inspect.Parameter]:
    """Return a parameter for each field of a dataclass that is an option."""
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
        if get_origin(hints[field.name]) is Annotated
    ]


@dataclass(frozen=True, kw_only=True)
class SampleGroup(CalibrationRequest):
    """Options that choose the calibration samples to draw."""

    data: Annotated[
        list[str] | None,
        panels.CALIBRATION(
            "--data",
            "Calibration text: c4, wikitext2, ptb, bundled, self (written by the model), or a .txt, .jsonl, .jsonl.gz "
            "or .parquet file of texts or conversations. Repeatable, for a mixture with weights: c4:0.7.",
            "c4",
            metavar="NAME|FILE[:WEIGHT]",
        ),
    ] = None
    text_column: Annotated[
        str | None,
        panels.CALIBRATION(
            "--text-column",
            "Field or column of the files with the texts or the messages.",
            "text, or messages without it",
            metavar="NAME",
        ),
    ] = None
    samples: Annotated[
        int | None, panels.CALIBRATION("--samples", "Calibration samples.", "128", max=options.MOST, metavar="N")
    ] = None
    seqlen: Annotated[
        int | None,
        panels.CALIBRATION("--seqlen", "Tokens per sample.", "2048, or the model's maximum if less", metavar="N"),
    ] = None
    pack: Annotated[
        bool | None,
        panels.CALIBRATION(
            "--pack/--no-pack",
            "Join short documents into full samples, or draw each sample from one document that is long enough.",
            "pack if the documents of the data are short",
        ),
    ] = None
    data_dir: options.DataDirOption = None
    seed: options.SeedOption = 0


@dataclass(frozen=True, kw_only=True)
class CalibrationGroup(SampleGroup):
    """Options that choose the calibration samples of a stage: a finished set, or the samples to draw."""

    shared: Annotated[
        Path | None,
        panels.CALIBRATION(
            "--calibration",
            "Use the finished calibration set in this directory.",
            metavar="DIR",
            callback=options.expand_utf8,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class GridGroup:
    """Options of the quantization grid, except its bits."""

    group_size: Annotated[
        str | None,
        panels.QUANTIZATION(
            "--group-size", "Columns that share a scale; channel: the whole row.", "128", metavar="N|channel"
        ),
    ] = None
    symmetric: Annotated[
        bool | None,
        panels.QUANTIZATION(
            "--symmetric/--asymmetric", "Grid centred at 0, or with a zero point for each group.", "symmetric"
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ComputeGroup:
    """Options of the computation of a stage: device, data type and memory."""

    device: options.DeviceOption = "auto"
    dtype: options.DtypeOption = "auto"
    max_memory: Annotated[
        str | None,
        panels.COMPUTE(
            "--max-memory",
            "Memory that the process must stay within, e.g. 4GB; hidden states go to files where they would not fit.",
            metavar="SIZE",
        ),
    ] = None

    def placement(self, calibration: CalibrationRequest) -> "Placement":
        """Return the fields of a `StageRequest` that these options and the request for samples give.

        Raises
        ------
        UsageError
            `--max-memory` is not a size.
        """
        return {
            "device": self.device,
            "dtype": self.dtype,
            "seed": calibration.seed,
            "calibration": None if calibration.shared is None else str(calibration.shared.resolve()),
            "max_memory": options.size_of(self.max_memory),
        }


@dataclass(frozen=True, kw_only=True)
class RunGroup:
    """Options of a command that writes a stage or an export into a run directory."""

    run: options.RunOption = options.DEFAULT_RUN
    restart: options.RestartOption = False
    dry_run: options.DryRunOption = False
    config: options.ConfigOption = None
    as_json: options.JsonOption = False


def given(**values: OptionValue) -> dict[str, OptionValue]:
    """Return the options that are not None."""
    return {name: value for name, value in values.items() if value is not None}
