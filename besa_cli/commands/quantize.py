"""`besa quantize`: a stage or a dense checkpoint → the same with its linears on a grid."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from besa_cli import choices, models
from besa_cli.commands.shared import calibration_source, option_groups, options, stage_command
from besa_cli.console import Console, human_share
from besa_cli.errors import BesaError
from besa_cli.quantizers import QUANTIZERS

if TYPE_CHECKING:
    from besa_cli.checkpoint.runs import Run
    from besa_cli.models import Model

_METHODS = "; ".join(f"{name}: {summary}" for name, summary in QUANTIZERS.items())

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        callback=options.named,
        help="A model to quantize as it is: a name or directory as of besa prune, or any stage.",
        show_default="the run's pruned stage",
    ),
]
MethodOption = Annotated[str, typer.Option("--method", metavar="NAME", help=f"{_METHODS}.")]
BitsOption = Annotated[int, typer.Option("--bits", help="Bits of a weight: 2, 3, 4 or 8.")]
SearchOption = Annotated[
    bool | None,
    typer.Option(
        "--search/--no-search",
        help="GPTQ: search how far each group's grid reaches, or lay it from extreme to extreme.",
        show_default="--search",
    ),
]


def _clip(name: str, text: str, default: str, **settings: Any) -> Any:
    return typer.Option(name, help=text, show_default=default, rich_help_panel="Learned clipping", **settings)


@dataclass(frozen=True, kw_only=True)
class ClipGroup:
    """Options of learned clipping; None where the method's default holds."""

    target: Annotated[
        choices.Target | None,
        _clip(
            "--target", "What a block should keep: its own output, or the uncompressed model's hidden states.", "block"
        ),
    ] = None
    loss: Annotated[
        choices.Loss | None,
        _clip("--loss", "Squared error relative to each token's norm, each channel's, or the whole.", "token"),
    ] = None
    epochs: Annotated[int | None, _clip("--epochs", "Passes over the samples.", "1", min=1, max=options.MOST)] = None
    batch_size: Annotated[int | None, _clip("--batch-size", "Samples in a learning step.", "1", min=1)] = None
    lr: Annotated[float | None, _clip("--lr", "Learning rate of the clipping strengths.", "0.03", min=0.0)] = None


@option_groups.expand
def quantize(
    *,
    model: ModelOption = None,
    calibration: option_groups.CalibrationGroup,
    bits: BitsOption = 4,
    grid: option_groups.GridGroup,
    method: MethodOption = "rtn",
    damping: options.DampingOption = None,
    search: SearchOption = None,
    clip: ClipGroup,
    compute: option_groups.ComputeGroup,
    into: option_groups.RunGroup,
) -> None:
    """Give weights few bits, zeros staying zero; run the same command again to go on after an interruption."""
    console = Console(json=into.as_json)
    from besa_cli.checkpoint.runs import Run
    from besa_cli.jobs import quantize as requests
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
    made = stage_command.stage(
        request, source, directory, calibration, console, restart=into.restart, dry_run=into.dry_run
    )
    if made is not None:
        show(made, directory, console)


def _source(model: str | None, run: "Run", console: Console) -> "Model":
    """What is quantized: `--model`, else the run's pruned stage.

    Raises
    ------
    BesaError
        The run has no finished pruned stage.
    """
    from besa_cli.checkpoint import manifests, stages

    if model is not None:
        return models.resolve(model, notify=console.note)
    stage = run.whole("pruned")
    if not (stage / manifests.MANIFEST).exists():
        raise BesaError(
            f"{run.path} has no pruned stage",
            f"make one (besa prune --run {run.path}), or quantize a dense model: besa quantize --model MODEL",
        )
    stages.finished(stage)
    return models.Model(name=str(stage), kind="local", directory=stage, revision=None)


def show(manifest: dict[str, Any], run: "Run", console: Console) -> None:
    """What a quantized stage came to."""
    counts, chosen = manifest["counts"], manifest["options"]
    directory = run.stage("quantized")
    console.line(f"{directory}: {chosen['model']} quantized with {chosen['method']} to {grid_in_words(manifest)}")
    console.line(in_words(counts))
    if kept := counts["blocks_kept_uniform"]:
        console.line(f"{kept} blocks kept the nearest codes: learning did not beat them there")
    console.emit_json({"directory": str(directory), **manifest})


def grid_in_words(manifest: dict[str, Any]) -> str:
    """The grid of a quantized stage."""
    from besa_cli.ops.affine import Grid

    return str(Grid(**manifest["quantization"]))


def bits_in_words(counts: dict[str, Any]) -> str:
    """What a weight of a quantized stage takes."""
    return f"{counts['bits_per_weight']:.3f} bits a weight, scales and, where it saves, a mask included"


def in_words(counts: dict[str, Any]) -> str:
    """Counts of a quantized stage in one line."""
    return (
        f"{bits_in_words(counts)}; "
        f"{counts['pruned']:,} of {counts['weights']:,} weights pruned ({human_share(counts['sparsity'])}), "
        f"{counts['rounded_to_zero']:,} others rounded to zero"
    )
