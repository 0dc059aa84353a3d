"""`besa quantize`: quantize the linears of a stage or a dense model."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from besa_cli import choices, models
from besa_cli.commands.shared import calibration_source, option_groups, options, panels, stage_command
from besa_cli.console import Console, human_share
from besa_cli.errors import BesaError
from besa_cli.quantizers import QUANTIZERS

if TYPE_CHECKING:
    from besa_cli.checkpoint.manifests import Counts, StageManifest
    from besa_cli.checkpoint.runs import Run
    from besa_cli.models import Model

_METHODS = "; ".join(f"{name}: {summary}" for name, summary in QUANTIZERS.items())

ModelOption = Annotated[
    str | None,
    panels.DATA(
        "--model",
        "Model to quantize as it is: any stage, or a model as for besa prune.",
        "the run's tuned stage, else its pruned one",
        metavar="MODEL",
        callback=options.require_utf8,
    ),
]
BitsOption = Annotated[int, panels.QUANTIZATION("--bits", "Bits of a weight: 2, 3, 4 or 8.", metavar="N")]
MethodOption = Annotated[str, panels.QUANTIZATION("--method", f"{_METHODS}.", metavar="NAME")]
DampingOption = Annotated[
    float | None,
    panels.ADVANCED(
        "--damping",
        "GPTQ: share of the Hessian's mean diagonal that is added to its diagonal.",
        "0.01",
        min=0.0,
        metavar="SHARE",
    ),
]
SearchOption = Annotated[
    bool | None,
    panels.QUANTIZATION(
        "--search/--no-search", "GPTQ: search the range of each group's grid, or span its extremes.", "--search"
    ),
]


@dataclass(frozen=True, kw_only=True)
class ClipGroup:
    """Options of learned clipping; None stands for the method's default."""

    target: Annotated[
        choices.Target | None,
        panels.CLIPPING(
            "--target",
            "Output to keep. block: that of the block itself on the quantized inputs; stream: the source model's.",
            "block",
        ),
    ] = None
    loss: Annotated[
        choices.Loss | None,
        panels.CLIPPING(
            "--loss",
            "Squared error relative to the norm of each token, each channel, or the whole; sensitivity: of each token, "
            "channels weighted by their effect on the model's predictions.",
            "token",
        ),
    ] = None
    epochs: Annotated[
        int | None, panels.CLIPPING("--epochs", "Passes over the samples.", "1", min=1, max=options.MOST, metavar="N")
    ] = None
    batch_size: Annotated[
        int | None, panels.CLIPPING("--batch-size", "Samples per learning step.", "1", min=1, metavar="N")
    ] = None
    lr: Annotated[
        float | None,
        panels.CLIPPING("--lr", "Learning rate of the clipping strengths.", "0.03", min=0.0, metavar="RATE"),
    ] = None


@option_groups.expand
def quantize(
    *,
    model: ModelOption = None,
    calibration: option_groups.CalibrationGroup,
    method: MethodOption = "rtn",
    bits: BitsOption = 4,
    grid: option_groups.GridGroup,
    damping: DampingOption = None,
    search: SearchOption = None,
    clip: ClipGroup,
    compute: option_groups.ComputeGroup,
    into: option_groups.RunGroup,
) -> None:
    """Quantize weights to a few bits; pruned weights stay exactly zero. Re-run the same command to resume.

    Examples:

        besa quantize
        besa quantize --method gptq --bits 3 --group-size 64
        besa quantize --model Qwen/Qwen3-0.6B --bits 8 --run qwen-8bit
    """
    console = Console(json=into.as_json)
    from besa_cli.checkpoint.runs import Run
    from besa_cli.jobs import quantize as requests
    from besa_cli.jobs.stage import StageJob
    from besa_cli.ops import affine

    request = requests.request(
        method=method,
        bits=bits,
        group_size=affine.GROUP if grid.group_size is None else grid.group_size,
        symmetric=grid.symmetric is not False,
        options=option_groups.given(damping=damping, search=search, **asdict(clip)),
        **compute.placement(calibration),
    )
    if not request.uses_calibration:
        calibration_source.refuse_samples(calibration, method)
    directory = Run(into.run)
    source = _source(model, directory, console)
    manifest = stage_command.stage(
        StageJob, request, source, directory, calibration, console, restart=into.restart, dry_run=into.dry_run
    )
    if manifest is not None:
        _show(manifest, directory, console)


def _source(model: str | None, run: "Run", console: Console) -> "Model":
    """Return the model to quantize: `--model`, else the run's tuned stage, else its pruned one.

    Raises
    ------
    BesaError
        The run has neither, or the newer of them is unfinished.
    """
    from besa_cli.decoder import supported

    if model is not None:
        return models.resolve(model, notify=console.note, check_config=supported.require)
    stage = run.newest(("pruned", "tuned"))
    if stage is None:
        raise BesaError(
            f"{run.path} has no pruned stage",
            f"make one (besa prune --run {run.path}), or quantize a dense model: besa quantize --model MODEL",
        )
    return models.Model(name=str(stage), kind="local", directory=stage, revision=None)


def _show(manifest: "StageManifest", run: "Run", console: Console) -> None:
    counts, chosen = manifest["counts"], manifest["options"]
    directory = run.stage("quantized")
    console.line(f"{directory}: {chosen['model']} quantized with {chosen['method']} to {grid_in_words(manifest)}")
    console.line(in_words(counts))
    if kept := counts["blocks_kept_uniform"]:
        console.line(f"{kept} blocks kept the nearest codes: learning did not improve on them")
    console.emit_json({"directory": str(directory), **manifest})


def grid_in_words(manifest: "StageManifest") -> str:
    """Describe the grid of a quantized stage."""
    from besa_cli.ops.affine import Grid

    return str(Grid(**manifest["quantization"]))


def bits_in_words(counts: "Counts") -> str:
    """Describe the size of a weight of a quantized stage."""
    return f"{counts['bits_per_weight']:.3f} bits per weight, including scales and, where it saves space, a mask"


def in_words(counts: "Counts") -> str:
    """Describe the counts of a quantized stage in one line."""
    return (
        f"{bits_in_words(counts)}; "
        f"{counts['pruned']:,} of {counts['weights']:,} weights pruned ({human_share(counts['sparsity'])}), "
        f"{counts['rounded_to_zero']:,} others rounded to zero"
    )
