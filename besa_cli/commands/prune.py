"""`besa prune`: checkpoint + calibration set → pruned checkpoint."""

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from besa_cli import choices, models
from besa_cli.commands import quantize as quantized
from besa_cli.commands.shared import context as process
from besa_cli.commands.shared import options, stage_command
from besa_cli.console import Console
from besa_cli.errors import UsageError
from besa_cli.pruners import PRUNERS

if TYPE_CHECKING:
    from besa_cli.checkpoint.manifests import StageManifest
    from besa_cli.checkpoint.runs import Run

_METHODS = "; ".join(f"{name}: {summary}" for name, summary in PRUNERS.items())


def _besa(name: str, text: str, default: str, **settings: Any) -> Any:
    return typer.Option(name, help=text, show_default=default, rich_help_panel="BESA", **settings)


SparsityOption = Annotated[
    float | None,
    typer.Option("--sparsity", help="Share of the linears' weights to prune, from 0 to below 1.", show_default="0.5"),
]
MethodOption = Annotated[str, typer.Option("--method", metavar="NAME", help=f"{_METHODS}.")]
PatternOption = Annotated[
    str | None, typer.Option("--nm", metavar="N:M", help="Prune N of every M columns instead (all methods but besa).")
]
PresetOption = Annotated[
    choices.Preset | None,
    _besa("--preset", "authors: the choices of the paper's released program; options given beside it win.", "none"),
]
WindowOption = Annotated[
    str | None,
    _besa(
        "--window", "What is reconstructed together: block, attn-mlp, or a number of blocks.", "block", metavar="WHAT"
    ),
]
GranularityOption = Annotated[
    str | None,
    _besa("--granularity", "What gets a sparsity of its own: row, layer, or a number of rows.", "row", metavar="WHAT"),
]
ImportanceOption = Annotated[choices.Importance | None, _besa("--importance", "What ranks a row's weights.", "wanda")]
TargetOption = Annotated[
    choices.Target | None,
    _besa("--target", "What a block should keep: its own output, or the dense model's hidden states.", "block"),
]
LossOption = Annotated[
    choices.Loss | None,
    _besa("--loss", "Squared error relative to each token's norm, each channel's, or the whole.", "token"),
]
EpochsOption = Annotated[int | None, _besa("--epochs", "Passes over the samples.", "1", min=1, max=options.MOST)]
BatchSizeOption = Annotated[int | None, _besa("--batch-size", "Samples in a learning step.", "1", min=1)]
OptimizerOption = Annotated[choices.Optimizer | None, _besa("--optimizer", "What learns.", "adamw")]
RateOption = Annotated[float | None, _besa("--lr", "Learning rate.", "1", min=0.0)]
FactorOption = Annotated[float | None, _besa("--d-coef", "Prodigy: factor on its estimated rate.", "1", min=0.0)]
PenaltyOption = Annotated[
    float | None,
    _besa(
        "--penalty",
        "Weight of a sparsity penalty in place of the budget in every step (0: the end alone keeps to it).",
        "none",
        min=0.0,
    ),
]
CandidatesOption = Annotated[
    int | None, _besa("--candidates", "Candidate sparsities are 0, 1/D, ... 1.", "100", min=1, max=1000)
]

BitsOption = Annotated[
    int | None, _besa("--bits", "Quantize too, learned together: 2, 3, 4 or 8; into quantized/.", "none", metavar="N")
]
ClipRateOption = Annotated[
    float | None, _besa("--clip-lr", "Learning rate of the clipping strengths.", "0.03", min=0.0)
]


def prune(
    context: typer.Context,
    model: options.ModelOption = options.DEFAULT_MODEL,
    sparsity: SparsityOption = None,
    method: MethodOption = "besa",
    nm: PatternOption = None,
    preset: PresetOption = None,
    window: WindowOption = None,
    granularity: GranularityOption = None,
    importance: ImportanceOption = None,
    target: TargetOption = None,
    loss: LossOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = None,
    optimizer: OptimizerOption = None,
    lr: RateOption = None,
    d_coef: FactorOption = None,
    penalty: PenaltyOption = None,
    candidates: CandidatesOption = None,
    bits: BitsOption = None,
    group_size: options.GroupOption = None,
    symmetric: options.SymmetricOption = None,
    clip_lr: ClipRateOption = None,
    damping: options.DampingOption = None,
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
    """Make a model sparse, block by block; run the same command again to go on after an interruption."""
    own = {
        "preset": preset, "window": window, "granularity": granularity, "importance": importance, "target": target,
        "loss": loss, "epochs": epochs, "batch_size": batch_size, "optimizer": optimizer, "lr": lr,
        "d_coef": d_coef, "penalty": penalty, "candidates": candidates, "damping": damping,
        "bits": bits, "group_size": group_size, "symmetric": symmetric, "clip_lr": clip_lr,
    }  # fmt: skip
    pattern = _pattern(nm, sparsity)
    console = Console(json=as_json)
    from besa_cli.checkpoint.runs import Run
    from besa_cli.jobs import prune as job
    from besa_cli.jobs import ranks

    tokens_from = None if calibration is None else str(calibration.resolve())
    request = job.request(
        method=method,
        sparsity=0.5 if sparsity is None else sparsity,
        nm=pattern,
        options={name: value for name, value in own.items() if value is not None},
        device=device,
        dtype=dtype,
        seed=seed,
        calibration=tokens_from,
        max_memory=options.size_of(max_memory),
    )
    world = process.ranks(context)
    if dry_run and world.size > 1:
        raise UsageError(f"--dry-run forecasts one process, not {world.size} ranks", "start it once, without torchrun")
    ranks.require_even_steps(request, world)
    with world.main_process_first():  # what it fetches, the others find
        source = models.resolve(model, notify=console.note)
    directory = Run(run)
    wanted = {"data": data, "samples": samples, "seqlen": seqlen, "pack": pack}
    made = stage_command.stage(
        request, source, directory, calibration, wanted, data_dir, console,
        restart=restart, dry_run=dry_run, world=world,
    )  # fmt: skip
    if made is not None:
        _show(made, directory, console)


def _pattern(nm: str | None, sparsity: float | None) -> tuple[int, int] | None:
    if nm is None:
        return None
    if sparsity is not None:
        raise UsageError(f"--nm {nm} and --sparsity {sparsity} exclude each other", "give one of the two")
    found = re.fullmatch(r"(\d+):(\d+)", nm)
    if not found:
        raise UsageError(f"--nm '{nm}' is not an N:M pattern", "2:4 prunes 2 of every 4 columns")
    return int(found[1]), int(found[2])


def _show(manifest: "StageManifest", run: "Run", console: Console) -> None:
    counts, chosen = manifest["counts"], manifest["options"]
    directory = run.stage(manifest["stage"])
    console.line(
        f"{directory}: {chosen['model']} pruned with {chosen['method']}, {counts['pruned']:,} of {counts['weights']:,} "
        f"weights ({100 * counts['sparsity']:.4f} %)"
    )
    if "quantization" in manifest:
        console.line(f"{quantized.grid_in_words(manifest)}: {quantized.in_words(counts)}")
    if counts["blocks_kept_uniform"]:
        console.line(
            f"{counts['blocks_kept_uniform']} blocks kept the uniform allocation: learning did not beat it there"
        )
    console.emit_json({"directory": str(directory), **manifest})
