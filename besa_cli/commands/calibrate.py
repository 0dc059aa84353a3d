"""`besa calibrate`: draw a calibration set from text."""

from typing import TYPE_CHECKING

from besa_cli import models
from besa_cli.commands.shared import option_groups, options
from besa_cli.console import Console

if TYPE_CHECKING:
    from besa_cli.calibration.calibration_set import CalibrationSet


@option_groups.expand
def calibrate(
    *,
    model: options.ModelOption = options.DEFAULT_MODEL,
    samples: option_groups.SampleGroup,
    run: options.RunOption = options.DEFAULT_RUN,
    restart: options.RestartOption = False,
    config: options.ConfigOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Draw calibration samples and store them as token ids. The other commands take them from the run directory.

    Examples:

        besa calibrate --data bundled --samples 32 --seqlen 512
        besa calibrate --model Qwen/Qwen3-0.6B --data wikitext2 --run qwen
        besa calibrate --data bundled:0.7 --data chat.jsonl:0.3
    """
    from besa_cli.calibration import calibration_set, prepare
    from besa_cli.system import lock

    console = Console(json=as_json)
    source = models.resolve(model, notify=console.note)
    drawn = prepare.calibration_options(source, samples, console.note)
    directory = run / "calibration"
    with lock.hold(run, "besa calibrate"):
        calibration_set.recover(directory)
        calibration = prepare.calibrate(source, drawn, directory, samples.data_dir, console.note, restart=restart)
    _show(calibration, console, str(directory))


def _show(calibration: "CalibrationSet", console: Console, directory: str) -> None:
    manifest = calibration.manifest
    samples, seqlen = calibration.tokens.shape
    console.line(
        f"{samples} samples of {seqlen} tokens ({manifest['sampling']}, seed {manifest['seed']}) in {directory}"
    )
    mixed = manifest["sampling"] == "mixture"
    columns = ("asked", *(["samples"] if mixed else []), "source", "file", "documents", "sha256")
    rows = [
        (
            source["asked"],
            *([source["samples"]] if mixed else []),
            source["source"],
            source["file"],
            source.get("documents", source.get("rows")),
            source["sha256"][:12],
        )
        for source in manifest["sources"]
    ]
    console.table("", columns, rows)
    console.line(f"tokens {calibration.digest[:12]}")
    console.emit_json({"directory": directory, **manifest})
