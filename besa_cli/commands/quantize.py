"""`besa quantize`: a stage or a dense checkpoint → the same with its linears on a grid."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from besa_cli import choices, models
from besa_cli.commands.shared import calibration_source, options, stage_command
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


TargetOption = Annotated[
    choices.Target | None,
    _clip("--target", "What a block should keep: its own output, or the uncompressed model's hidden states.", "block"),
]
LossOption = Annotated[
    choices.Loss | None,
    _clip("--loss", "Squared error relative to each token's norm, each channel's, or the whole.", "token"),
]
EpochsOption = Annotated[int | None, _clip("--epochs", "Passes over the samples.", "1", min=1, max=options.MOST)]
BatchSizeOption = Annotated[int | None, _clip("--batch-size", "Samples in a learning step.", "1", min=1)]
RateOption = Annotated[float | None, _clip("--lr", "Learning rate of the clipping strengths.", "0.03", min=0.0)]


def quantize(
    model: ModelOption = None,
    bits: BitsOption = 4,
    group_size: options.GroupOption = None,
    symmetric: options.SymmetricOption = None,
    method: MethodOption = "rtn",
    damping: options.DampingOption = None,
    search: SearchOption = None,
    target: TargetOption = None,
    loss: LossOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = None,
    lr: RateOption = None,
    calibration: options.CalibrationOption = None,
    data: options.DataOption = None,
    samples: options.SamplesOption = None,
    seqlen: options.SeqlenOption = None,
    pack: options.PackOption = None,
    data_dir: options.DataDirOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    max_memory: options.MemoryOption = None,
    seed: options.SeedOption = 0,
    run: options.RunOption = options.DEFAULT_RUN,
    restart: options.RestartOption = False,
    dry_run: options.DryRunOption = False,
    config: options.ConfigOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Give weights few bits, zeros staying zero; run the same command again to go on after an interruption."""
    own: dict[str, Any] = {
        "damping": damping, "search": search,
        "target": target, "loss": loss, "epochs": epochs, "batch_size": batch_size, "lr": lr,
    }  # fmt: skip
    console = Console(json=as_json)
    from besa_cli.checkpoint.runs import Run
    from besa_cli.jobs import quantize as job
    from besa_cli.ops import affine

    request = job.request(
        method=method,
        bits=bits,
        group_size=affine.GROUP if group_size is None else group_size,
        symmetric=symmetric is not False,
        options={name: value for name, value in own.items() if value is not None},
        device=device,
        dtype=dtype,
        seed=seed,
        calibration=None if calibration is None else str(calibration.resolve()),
        max_memory=options.size_of(max_memory),
    )
    wanted = {"data": data, "samples": samples, "seqlen": seqlen, "pack": pack}
    if not request.uses_calibration:
        calibration_source.refuse_samples(calibration, wanted, method)
    directory = Run(run)
    source = _source(model, directory, console)
    made = stage_command.stage(
        request, source, directory, calibration, wanted, data_dir, console, restart=restart, dry_run=dry_run
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
    stage = run.existing_stage("pruned")
    if not (stage / manifests.MANIFEST).exists():
        raise BesaError(
            f"{run.path} has no pruned stage",
            f"make one (besa prune --run {run.path}), or quantize a dense model: besa quantize --model MODEL",
        )
    stages.require_finished(stage)
    return models.Model(name=str(stage), kind="local", directory=stage, revision=None)


def show(manifest: "StageManifest", run: "Run", console: Console) -> None:
    """What a quantized stage came to."""
    counts, chosen = manifest["counts"], manifest["options"]
    directory = run.stage("quantized")
    console.line(f"{directory}: {chosen['model']} quantized with {chosen['method']} to {grid_in_words(manifest)}")
    console.line(in_words(counts))
    if kept := counts["blocks_kept_uniform"]:
        console.line(f"{kept} blocks kept the nearest codes: learning did not beat them there")
    console.emit_json({"directory": str(directory), **manifest})


def grid_in_words(manifest: "StageManifest") -> str:
    """The grid of a quantized stage."""
    from besa_cli.ops.affine import Grid

    return str(Grid(**manifest["quantization"]))


def bits_in_words(counts: "Counts") -> str:
    """What a weight of a quantized stage takes."""
    return f"{counts['bits_per_weight']:.3f} bits a weight, scales and, where it saves, a mask included"


def in_words(counts: "Counts") -> str:
    """Counts of a quantized stage in one line."""
    return (
        f"{bits_in_words(counts)}; "
        f"{counts['pruned']:,} of {counts['weights']:,} weights pruned ({human_share(counts['sparsity'])}), "
        f"{counts['rounded_to_zero']:,} others rounded to zero"
    )
