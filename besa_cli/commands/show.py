"""`besa show`: contents of a directory, the commands that made it, and the sparsity of each linear."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from besa_cli.commands import quantize as quantized
from besa_cli.commands.shared import held_out_view, options, panels
from besa_cli.console import Console, human_bytes, human_share, short_names
from besa_cli.errors import BesaError

if TYPE_CHECKING:
    from besa_cli.checkpoint.inspection import BlockCount, LinearCount
    from besa_cli.checkpoint.manifests import StageManifest
    from besa_cli.checkpoint.runs import Run

_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")


def show(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR",
            callback=options.expand_utf8,
            help="Run directory, stage or any other checkpoint.",
            show_default="the run directory",
        ),
    ] = None,
    run: options.RunOption = options.DEFAULT_RUN,
    config: Annotated[
        bool, panels.OUTPUT("--config", "Print the options that made it as YAML, for --config of the same command.")
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Show what a directory holds, the commands that made it, and the sparsity of each linear, counted in the tensors.

    Digests are not compared: besa eval and besa export do that.

    Examples:

        besa show
        besa show besa-run/pruned --json
        besa show besa-run/pruned --config
    """
    from besa_cli.checkpoint import inspection
    from besa_cli.checkpoint.runs import Run

    console = Console(json=as_json)
    shown = directory if directory is not None else run
    kind = inspection.kind_of(shown)
    if config:
        _print_config(_newest_part(shown) if kind == "run" else shown, console)
        return
    facts: dict[str, Any] = {"directory": str(shown), "kind": kind}
    if kind == "run":
        facts |= _show_run(Run(shown), console)
    elif kind == "calibration":
        facts |= _show_calibration(shown, console)
    elif kind == "export":
        facts |= _show_export(shown, console)
    else:
        facts |= _show_model(shown, console)
    console.emit_json(facts)


def _newest_part(run: Path) -> Path:
    """Return the directory of the newest stage of a run, else of its calibration set."""
    from besa_cli.checkpoint import inspection
    from besa_cli.checkpoint.manifests import MANIFEST
    from besa_cli.checkpoint.runs import Run

    parts = [
        path for path in (Run(run).calibration, *inspection.stage_directories(Run(run))) if (path / MANIFEST).exists()
    ]
    if not parts:
        raise BesaError(f"{run} has no stage and no calibration set", "make one: besa prune")
    return parts[-1]


def _print_config(directory: Path, console: Console) -> None:
    import yaml

    from besa_cli.checkpoint import inspection, manifests

    if (directory / manifests.EXPORT).exists():
        raise BesaError(f"{directory} is an export, not a stage", f"its options are in {directory / manifests.EXPORT}")
    if not (directory / manifests.MANIFEST).exists():
        raise BesaError(
            f"{directory} was not made by besa: it has no {manifests.MANIFEST}", "name a stage: besa show --config DIR"
        )
    manifest = manifests.read(directory)
    values = inspection.options_to_repeat(manifest)
    text = yaml.safe_dump({name.replace("_", "-"): value for name, value in values.items()}, sort_keys=False)
    console.text(f"# besa {manifest['command']} --config FILE.yaml\n{text.rstrip()}")
    console.emit_json(values)


def _show_run(run: "Run", console: Console) -> dict[str, Any]:
    from besa_cli.checkpoint import inspection
    from besa_cli.checkpoint.manifests import MANIFEST

    console.line(f"{run.path}: run directory")
    facts: dict[str, Any] = {}
    if (run.calibration / MANIFEST).exists():
        facts["calibration"] = _show_calibration(run.calibration, console)
    facts["stages"] = []
    for directory in inspection.stage_directories(run):
        if (directory / MANIFEST).exists():
            console.line("")
            facts["stages"].append({"directory": str(directory), **_show_model(directory, console)})
    facts["exports"] = []
    for directory in inspection.exports(run):
        facts["exports"].append({"directory": str(directory), **_show_export(directory, console)})
    facts["evaluations"] = inspection.evaluations(run)
    if facts["evaluations"]:
        console.text(f"\n{run.evaluations}: {len(facts['evaluations'])} results: {', '.join(facts['evaluations'])}")
    facts["simulations"] = inspection.simulations(run)
    facts["speeds"] = inspection.speeds(run)
    for directory, found in ((run.simulations, facts["simulations"]), (run.speeds, facts["speeds"])):
        if found:
            console.text(f"\n{directory}: {len(found)} results: {', '.join(found)}")
    return facts


def _show_calibration(directory: Path, console: Console) -> dict[str, Any]:
    from besa_cli.checkpoint import inspection, manifests

    manifest = manifests.read_calibration(directory)
    sources = ", ".join(f"{source['asked']} ({source['source']}: {source['file']})" for source in manifest["sources"])
    console.line(
        f"{directory}: calibration set, {manifest['samples']} samples of {manifest['seqlen']} tokens "
        f"({manifest['sampling']}, seed {manifest['seed']}) from {sources}"
    )
    if "command" in manifest:
        line = inspection.command_line(manifest["command"], inspection.options_to_repeat(manifest), _run_of(directory))
        console.line(f"  made by: {line}")
    return {"manifest": manifest}


def _show_export(directory: Path, console: Console) -> dict[str, Any]:
    from besa_cli.checkpoint import exports, inspection

    manifest = exports.read(directory)
    sizes, source = manifest["sizes"], manifest["source"]
    console.line(
        f"{directory}: {manifest['options']['format']} export of the {source['stage']} stage {source['digest'][:12]}, "
        f"{human_bytes(sizes['weights'])} ({human_share(sizes['weights'] / sizes['weights_dense'])} of dense bf16)"
    )
    damage = inspection.damage(directory, manifest)
    if damage:
        console.note(f"warning: {damage}")
    return {"manifest": manifest, **({"damage": damage} if damage else {})}


def _show_model(directory: Path, console: Console) -> dict[str, Any]:
    from besa_cli.checkpoint import inspection, manifests

    manifest = manifests.read_stage(directory) if (directory / manifests.MANIFEST).exists() else None
    console.line(f"{directory}: {_title(manifest)}")
    if manifest is not None:
        _show_history(manifest, directory, console)
    if manifest is not None and "experts" in manifest:
        console.line(f"  {manifests.describe_experts(manifest['experts'])}")
        console.line(f"  {manifests.describe_scores(manifest['experts'])}")
    if manifest is not None and "left_out" in manifest:
        console.line(f"  {manifests.describe_left_out(manifest['left_out'])}")
    if manifest is not None and "block_budgets" in manifest:
        console.line(f"  {manifests.describe_budgets(manifest['block_budgets'])}")
    if manifest is not None and "quantization" in manifest:
        console.line(f"  {_grid(manifest)}")
    if manifest is not None and "whole_model" in manifest:
        console.line(f"  {held_out_view.whole_model_in_words(manifest['whole_model'])}")
    if manifest is not None and "held_out" in manifest:
        console.line(f"  {held_out_view.warning(manifest) or held_out_view.in_words(manifest['held_out'])}")
    total = inspection.number_of_blocks(directory)
    counts = []
    with console.blocks("counting zeros", total) as progress:
        for block in inspection.blocks(directory):
            progress.step(block.index + 1, total, "block")
            counts.append(block)
    _show_counts(counts, console)
    size = inspection.size(directory)
    console.line(f"{human_bytes(size)} on disk{_packed(manifest, directory)}")
    return {
        "manifest": manifest,
        "bytes": size,
        "total": _sum([linear for block in counts for linear in block.linears]),
        "blocks": _facts(counts),
    }


def _grid(manifest: "StageManifest") -> str:
    """Describe the grid of a quantized stage and, once it is complete, the bits per weight."""
    grid, counts = quantized.grid_in_words(manifest), manifest.get("counts")
    return f"{grid}: {quantized.bits_in_words(counts)}" if counts else grid


def _packed(manifest: "StageManifest | None", directory: Path) -> str:
    """Describe the size of a quantized stage with its linears packed."""
    from besa_cli.checkpoint import inspection

    if manifest is None or "bits" not in manifest.get("counts", {}):
        return ""
    packed = inspection.packed_size(directory, manifest["counts"])
    return f"; {human_bytes(packed)} with the quantized linears packed"


def _title(manifest: "StageManifest | None") -> str:
    if manifest is None:
        return "checkpoint that besa did not make"
    origin = manifest["model"]
    title = f"{manifest['stage']} stage of {origin['name']}"
    if manifest["status"] == "complete":
        return f"{title}, complete"
    return f"{title}, unfinished"


def _show_history(manifest: "StageManifest", directory: Path, console: Console) -> None:
    from besa_cli.checkpoint import inspection
    from besa_cli.checkpoint.stages import Stage

    for entry in manifest.get("history", []):
        console.line(f"  before: {inspection.command_line(entry['command'], entry['options'])}")
    line = inspection.command_line(manifest["command"], inspection.options_to_repeat(manifest), _run_of(directory))
    if manifest["status"] == "complete":
        console.line(f"  made by: {line}")
        return
    stage = Stage(directory, int(manifest["blocks"]))
    console.line(f"  {stage.finished()} of {stage.blocks} blocks are done; to resume: {line}")


def _run_of(directory: Path) -> Path | None:
    """Return the value of `--run` for a part of a run directory; None for the default."""
    return None if directory.parent == options.DEFAULT_RUN else directory.parent


def _show_counts(counts: "Sequence[BlockCount]", console: Console) -> None:
    """Print a row for each block: the share of zeros in each linear and in all, and the errors of its report."""
    from besa_cli.checkpoint import inspection

    labels = list(dict.fromkeys(inspection.label(linear.name) for block in counts for linear in block.linears))
    reported = any(block.report is not None for block in counts)
    rows = []
    for block in counts:
        row = [str(block.index), *_shares(labels, block.linears)]
        if reported:
            errors = (block.report.error_before, block.report.error_after) if block.report else (None, None)
            row += ["-" if error is None else f"{error:.2e}" for error in errors]
        rows.append(row)
    linears = [linear for block in counts for linear in block.linears]
    rows.append(["all", *_shares(labels, linears), *(["-", "-"] if reported else [])])
    columns = ["block", *short_names(labels), "all", *(["error before", "error after"] if reported else [])]
    console.table("", columns, rows)
    total = _sum(linears)
    weights, zeros, pruned = total["weights"], total["zeros"], total["pruned"]
    if not weights:
        return
    console.line(f"{zeros:,} of {weights:,} weights are zero ({human_share(zeros / weights)})")
    if pruned is not None:
        console.line(f"{pruned:,} were pruned ({human_share(pruned / weights)})")
        if pruned > zeros:
            console.note("warning: the reports name more pruned weights than there are zeros: the tensors were changed")
    experts = _sparsity_of_experts(counts)
    if experts:
        low, high = min(experts), max(experts)
        console.line(
            f"sparsity of the {len(experts)} experts: {human_share(low[0])} (block {low[1]}, expert {low[2]}) to "
            f"{human_share(high[0])} (block {high[1]}, expert {high[2]})"
        )
    for block in counts:
        for linear in block.linears:
            if linear.written not in (None, linear.zeros):
                console.note(
                    f"warning: {linear.name} of block {block.index} has {linear.zeros:,} zeros, its report says "
                    f"{linear.written:,}: the tensors were changed"
                )


def _sparsity_of_experts(counts: "Sequence[BlockCount]") -> list[tuple[float, int, int]]:
    """Return the share of zeros, the block and the number of every expert; empty for a model without experts."""
    found = []
    for block in counts:
        by_expert: dict[int, list[LinearCount]] = {}
        for linear in block.linears:
            match = _EXPERT.search(linear.name)
            if match:
                by_expert.setdefault(int(match[1]), []).append(linear)
        sums = {number: _sum(linears) for number, linears in by_expert.items()}
        found += [(total["zeros"] / total["weights"], block.index, number) for number, total in sums.items()]
    return found


def _shares(labels: Sequence[str], linears: "Sequence[LinearCount]") -> list[str]:
    """Return the zeros in percent for each label, and for all."""
    from besa_cli.checkpoint import inspection

    groups = [[linear for linear in linears if inspection.label(linear.name) == label] for label in labels]
    sums = [_sum(group) for group in (*groups, linears)]
    return [f"{100 * total['zeros'] / total['weights']:.2f}" if total["weights"] else "-" for total in sums]


def _sum(linears: "Sequence[LinearCount]") -> dict[str, Any]:
    pruned = [linear.pruned for linear in linears if linear.pruned is not None]
    return {
        "weights": sum(linear.weights for linear in linears),
        "zeros": sum(linear.zeros for linear in linears),
        "pruned": sum(pruned) if pruned else None,
    }


def _facts(counts: "Sequence[BlockCount]") -> list[dict[str, Any]]:
    return [
        {
            "block": block.index,
            "linears": [
                {
                    "name": linear.name,
                    "rows": linear.rows,
                    "cols": linear.cols,
                    "zeros": linear.zeros,
                    "pruned": linear.pruned,
                    "sparsity": linear.zeros / max(linear.weights, 1),
                }
                for linear in block.linears
            ],
            **({"report": block.report.record()} if block.report else {}),
        }
        for block in counts
    ]
