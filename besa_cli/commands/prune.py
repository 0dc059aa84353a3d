"""`besa prune`: make a pruned checkpoint from a model and a calibration set."""

import re
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from besa_cli import choices, models
from besa_cli.commands import quantize as quantized
from besa_cli.commands.shared import context as process
from besa_cli.commands.shared import held_out_view, option_groups, options, panels, stage_command
from besa_cli.console import Console
from besa_cli.errors import UsageError
from besa_cli.pruners import PRUNERS

if TYPE_CHECKING:
    from besa_cli.checkpoint.manifests import StageManifest
    from besa_cli.checkpoint.runs import Run

_METHODS = "; ".join(f"{name}: {summary}" for name, summary in PRUNERS.items())


SparsityOption = Annotated[
    float | None,
    panels.SPARSITY("--sparsity", "Share of the linears' weights to prune, from 0 to below 1.", "0.5", metavar="SHARE"),
]
ExpertsOption = Annotated[
    float | None,
    panels.SPARSITY(
        "--experts",
        "Share of each block's experts to remove first, the least important ones; --sparsity is that of the others.",
        metavar="SHARE",
    ),
]
PatternOption = Annotated[
    str | None,
    panels.SPARSITY("--nm", "Prune N of every M columns instead (every method but besa).", metavar="N:M"),
]
BudgetOption = Annotated[
    choices.Budget,
    panels.SPARSITY(
        "--budget",
        "Share of the pruned weights in each block. uniform: that of the whole model; model: measured, less where "
        "pruning a block changes the model's predictions more.",
    ),
]
MethodOption = Annotated[str, panels.SPARSITY("--method", f"{_METHODS}.", metavar="NAME")]
DampingOption = Annotated[
    float | None,
    panels.ADVANCED(
        "--damping",
        "SparseGPT: share of the Hessian's mean diagonal that is added to its diagonal.",
        "0.01",
        min=0.0,
        metavar="SHARE",
    ),
]
GlobalEpochsOption = Annotated[
    int | None,
    panels.WHOLE_MODEL(
        "--global-epochs",
        "Passes over the samples, after the blocks, in which all rows of the model learn their sparsities together "
        "by the KL divergence to the dense model (every method but sparsegpt).",
        min=0,
        max=options.MOST,
        metavar="N",
    ),
]
GlobalRateOption = Annotated[
    float | None,
    panels.ADVANCED("--global-lr", "Learning rate of the passes of --global-epochs.", "0.03", min=0.0, metavar="RATE"),
]
UpdateOption = Annotated[
    choices.Update,
    panels.REPAIR(
        "--update",
        "Change of the kept weights of each block, so that it keeps its output. solve: least squares, linear by "
        "linear; tune: then by gradient on the block's own loss.",
    ),
]
UpdateEpochsOption = Annotated[
    int | None,
    panels.REPAIR(
        "--update-epochs", "Passes over the samples of --update tune.", "1", min=1, max=options.MOST, metavar="N"
    ),
]
UpdateRateOption = Annotated[
    float | None,
    panels.ADVANCED(
        "--update-lr",
        "Learning rate of --update tune, relative to the size of a linear's weights.",
        "0.01",
        min=0.0,
        metavar="RATE",
    ),
]
BitsOption = Annotated[
    int | None,
    panels.QUANTIZATION(
        "--bits",
        "Also quantize to 2, 3, 4 or 8 bits, learned together with the sparsity; writes quantized/.",
        metavar="N",
    ),
]
ClipRateOption = Annotated[
    float | None,
    panels.ADVANCED("--clip-lr", "Learning rate of the clipping strengths of --bits.", "0.03", min=0.0, metavar="RATE"),
]


@dataclass(frozen=True, kw_only=True)
class BesaGroup:
    """Options of BESA's learning; None stands for the method's default."""

    preset: Annotated[
        choices.Preset | None,
        panels.BESA(
            "--preset",
            "best: what is recommended where quality counts more than time, --global-epochs 1; authors: "
            "the settings of the paper's released program. Other options that are given win.",
        ),
    ] = None
    window: Annotated[
        str | None,
        panels.BESA(
            "--window",
            "Unit to reconstruct: block, attn-mlp (attention, then MLP), or a number of blocks together.",
            "block",
            metavar="UNIT",
        ),
    ] = None
    granularity: Annotated[
        str | None,
        panels.BESA(
            "--granularity",
            "Unit that gets its own sparsity: row, layer (a whole linear), or a number of rows.",
            "row",
            metavar="UNIT",
        ),
    ] = None
    importance: Annotated[
        choices.Importance | None, panels.ADVANCED("--importance", "Score that ranks the weights of a row.", "wanda")
    ] = None
    target: Annotated[
        choices.Target | None,
        panels.BESA(
            "--target",
            "Output to keep. block: that of the block itself on the pruned inputs; stream: the dense model's.",
            "block",
        ),
    ] = None
    loss: Annotated[
        choices.Loss | None,
        panels.BESA(
            "--loss",
            "Squared error relative to the norm of each token, each channel, or the whole; sensitivity: of each token, "
            "channels weighted by their effect on the model's predictions.",
            "sensitivity",
        ),
    ] = None
    epochs: Annotated[
        int | None, panels.BESA("--epochs", "Passes over the samples.", "1", min=1, max=options.MOST, metavar="N")
    ] = None
    batch_size: Annotated[
        int | None, panels.BESA("--batch-size", "Samples per learning step.", "1", min=1, metavar="N")
    ] = None
    optimizer: Annotated[
        choices.Optimizer | None, panels.ADVANCED("--optimizer", "Optimizer of the mixture logits.", "adamw")
    ] = None
    lr: Annotated[float | None, panels.BESA("--lr", "Learning rate.", "1", min=0.0, metavar="RATE")] = None
    d_coef: Annotated[
        float | None,
        panels.ADVANCED("--d-coef", "Prodigy: factor on its estimated learning rate.", "1", min=0.0, metavar="FACTOR"),
    ] = None
    penalty: Annotated[
        float | None,
        panels.ADVANCED(
            "--penalty",
            "Use a soft sparsity penalty of this weight instead of meeting the budget at every step "
            "(0: meet it only at the end).",
            min=0.0,
            metavar="WEIGHT",
        ),
    ] = None
    candidates: Annotated[
        int | None,
        panels.ADVANCED(
            "--candidates", "The candidate sparsities are 0, 1/D, 2/D, ... 1.", "100", min=1, max=1000, metavar="D"
        ),
    ] = None


@option_groups.expand
def prune(
    context: typer.Context,
    *,
    model: options.ModelOption = options.DEFAULT_MODEL,
    calibration: option_groups.CalibrationGroup,
    method: MethodOption = "besa",
    sparsity: SparsityOption = None,
    nm: PatternOption = None,
    experts: ExpertsOption = None,
    budget: BudgetOption = "uniform",
    damping: DampingOption = None,
    besa: BesaGroup,
    global_epochs: GlobalEpochsOption = None,
    global_lr: GlobalRateOption = None,
    update: UpdateOption = "none",
    update_epochs: UpdateEpochsOption = None,
    update_lr: UpdateRateOption = None,
    bits: BitsOption = None,
    grid: option_groups.GridGroup,
    clip_lr: ClipRateOption = None,
    compute: option_groups.ComputeGroup,
    into: option_groups.RunGroup,
) -> None:
    """Prune a model block by block. Re-run the same command to resume.

    Examples:

        besa prune --data bundled --samples 32 --seqlen 512
        besa prune --model Qwen/Qwen3-0.6B --sparsity 0.6 --run qwen
        besa prune --method wanda --nm 2:4 --dry-run
    """
    pattern = _pattern(nm, sparsity)
    console = Console(json=into.as_json)
    from besa_cli.checkpoint.runs import Run
    from besa_cli.decoder import supported
    from besa_cli.jobs import prune as requests
    from besa_cli.jobs import ranks
    from besa_cli.jobs.stage import StageJob

    rest = {"damping": damping, "bits": bits, **asdict(grid), "clip_lr": clip_lr}
    request = requests.request(
        method=method,
        sparsity=0.5 if sparsity is None else sparsity,
        nm=pattern,
        experts=experts,
        budget=budget,
        global_epochs=global_epochs,
        global_lr=global_lr,
        update=update,
        update_epochs=update_epochs,
        update_lr=update_lr,
        options=option_groups.given(**asdict(besa), **rest),
        **compute.placement(calibration),
    )
    world = process.ranks(context)
    if into.dry_run and world.size > 1:
        raise UsageError(f"--dry-run forecasts one process, not {world.size} ranks", "start it once, without torchrun")
    ranks.require_even_steps(request, world)
    with world.main_process_first():  # the other ranks then find the model in the cache
        source = models.resolve(
            model, notify=console.note, check_config=partial(supported.require, removed_experts=experts)
        )
    if not world.is_main:
        ranks.run_worker(source, request, world)
        return
    directory = Run(into.run)
    manifest = stage_command.stage(
        partial(StageJob, world=world), request, source, directory, calibration, console,
        restart=into.restart, dry_run=into.dry_run,
    )  # fmt: skip
    if manifest is not None:
        _show(manifest, directory, console)


def _pattern(nm: str | None, sparsity: float | None) -> tuple[int, int] | None:
    if nm is None:
        return None
    if sparsity is not None:
        raise UsageError(f"--nm {nm} and --sparsity {sparsity} exclude each other", "give one of the two")
    match = re.fullmatch(r"(\d+):(\d+)", nm)
    if not match:
        raise UsageError(f"--nm '{nm}' is not an N:M pattern", "2:4 prunes 2 of every 4 columns")
    return int(match[1]), int(match[2])


def _show(manifest: "StageManifest", run: "Run", console: Console) -> None:
    from besa_cli.checkpoint import manifests

    counts, chosen = manifest["counts"], manifest["options"]
    directory = run.stage(manifest["stage"])
    console.line(
        f"{directory}: {chosen['model']} pruned with {chosen['method']}, {counts['pruned']:,} of {counts['weights']:,} "
        f"weights ({100 * counts['sparsity']:.4f} %)"
    )
    if "experts" in manifest:
        console.line(manifests.describe_experts(manifest["experts"]))
    if "left_out" in manifest:
        console.line(manifests.describe_left_out(manifest["left_out"]))
    if "unreached" in counts:
        console.line(f"{counts['unreached']} linears of experts were reached by no token: pruned by magnitude")
    if "quantization" in manifest:
        console.line(f"{quantized.grid_in_words(manifest)}: {quantized.in_words(counts)}")
    if "block_budgets" in manifest:
        console.line(manifests.describe_budgets(manifest["block_budgets"]))
    if counts["blocks_kept_uniform"]:
        console.line(
            f"{counts['blocks_kept_uniform']} blocks kept the uniform allocation: learning did not improve on it"
        )
    if "whole_model" in manifest:
        console.line(held_out_view.whole_model_in_words(manifest["whole_model"]))
    warning = held_out_view.warning(manifest)
    if warning:
        console.note(warning)
    elif "held_out" in manifest:
        console.line(held_out_view.in_words(manifest["held_out"]))
    console.emit_json({"directory": str(directory), **manifest, **({"warning": warning} if warning else {})})
