"""`besa` without a command: what the run directories here hold, and the next command to type."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from besa_cli.commands.shared import options
from besa_cli.console import Console, human_perplexity, human_share

if TYPE_CHECKING:
    from besa_cli.checkpoint.manifests import StageManifest
    from besa_cli.checkpoint.runs import Run

_FIRST = "besa prune --data bundled --samples 32 --seqlen 512"
_MOST = 8  # run directories that are described


def overview(context: typer.Context) -> None:
    """Describe the run directories here; without one, show the help and the first command to type."""
    console, runs = Console(), _runs()
    for number, path in enumerate(runs[:_MOST]):
        if number:
            console.line("")
        _describe(path, console)
    if len(runs) > _MOST:
        console.line(f"\nand {len(runs) - _MOST} more run directories: besa show DIR")
    if runs:
        console.line("all commands: besa --help")
        return
    console.text(context.get_help())
    console.text(f"\nThere is no run directory here. Begin with:\n  {_FIRST}")


def _runs() -> list[Path]:
    """Return the run directory that commands use by default; without it, those among the directories here."""
    if _is_run(_default_run()):
        return [_default_run()]
    try:
        return sorted(path for path in Path().iterdir() if _is_run(path))
    except OSError:
        return []


def _is_run(directory: Path) -> bool:
    """Return whether a directory holds a calibration set or a stage, without loading torch."""
    try:
        return any((directory / name / "besa.json").is_file() for name in _PARTS)
    except OSError:
        return False


_PARTS = ("calibration", "pruned", "pruned.next", "tuned", "tuned.next", "quantized", "quantized.next")


def _describe(path: Path, console: Console) -> None:
    """Show the parts of a run directory, a line each, and the next command."""
    from besa_cli.checkpoint import inspection, manifests
    from besa_cli.checkpoint.runs import Run

    run = Run(path)
    directories = [each for each in inspection.stage_directories(run) if (each / manifests.MANIFEST).exists()]
    stages = [(each, manifests.read_stage(each)) for each in directories]
    lines = []
    if (run.calibration / manifests.MANIFEST).exists():
        calibration = manifests.read_calibration(run.calibration)
        sources = ", ".join(dict.fromkeys(source["asked"] for source in calibration["sources"]))
        text = f"{calibration['samples']} samples of {calibration['seqlen']} tokens from {sources}"
        lines.append(("calibration", text))
    lines += [(directory.name, _stage_in_words(manifest, directory, run)) for directory, manifest in stages]
    results = _results(run)
    if results:
        lines.append(("newest result", _result_in_words(results[-1])))
    lines += [("export", each.name) for each in inspection.exports(run)]
    console.line(f"{path}: {stages[-1][1]['model']['name'] if stages else 'run directory without a stage'}")
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        console.line(f"  {name.ljust(width)}  {text}")
    console.line(f"next: {next_command(run, stages, results)}")


def _stage_in_words(manifest: "StageManifest", directory: Path, run: "Run") -> str:
    from besa_cli.checkpoint.stages import Stage

    if manifest["status"] != "complete":
        return f"unfinished, {Stage(directory, manifest['blocks']).finished()} of {manifest['blocks']} blocks"
    counts = manifest["counts"]
    bits = f", {counts['bits_per_weight']:.2f} bits per weight" if "bits_per_weight" in counts else ""
    name = run.stage_at(directory)
    stale = " (stale: an earlier stage has changed)" if name is not None and run.stale(name) else ""
    return f"{human_share(counts['sparsity'])} of the weights pruned{bits}{stale}"


def _results(run: "Run") -> list[dict[str, Any]]:
    """Return the figures of evaluations that are not those of the dense model, the newest last; no other files."""
    from besa_cli.checkpoint import inspection
    from besa_cli.evaluation import continuations
    from besa_cli.system import disk

    files = sorted(inspection.evaluation_files(run), key=lambda file: (file.stat().st_mtime_ns, file.name))
    results = [dict(disk.read_json(file)) for file in files]
    measured = [result for result in results if isinstance(result.get("model"), dict) and "model_digest" in result]
    figures = [result for result in measured if result.get("kind") != continuations.KIND]
    return [result for result in figures if result["model"].get("name") != "dense"]


def _result_in_words(result: dict[str, Any]) -> str:
    model, perplexity = result["model"].get("name", "model"), result.get("perplexity")
    if isinstance(perplexity, float):
        return f"{model}: perplexity {human_perplexity(perplexity)} on {result.get('dataset')}"
    accuracy = result.get("harness", {}).get("results", {}).get(result.get("task"), {}).get("acc,none")
    shown = f": accuracy {human_share(accuracy)}" if isinstance(accuracy, float) else ""
    return f"{model}: task {result.get('task')}{shown}"


def next_command(run: "Run", stages: Sequence[tuple[Path, "StageManifest"]], results: Sequence[dict[str, Any]]) -> str:
    """Return the command that most likely comes next: resume, prune, measure, export, or look.

    Parameters
    ----------
    run : Run
    stages : sequence of pairs
        Directory and manifest of every stage, the newest last.
    results : sequence of dict
        Results of evaluations.
    """
    from besa_cli.checkpoint import exports, inspection, manifests

    elsewhere = None if run.path == _default_run() else run.path
    for _, manifest in stages:
        if manifest["status"] != "complete":
            return inspection.command_line(manifest["command"], inspection.options_to_repeat(manifest), elsewhere)
    if not stages:
        return inspection.command_line("prune", _calibrated_model(run), elsewhere)
    newest = run.newest()
    digest = None if newest is None else manifests.read_stage(newest)["digest"]
    if not any(result.get("model_digest") == digest for result in results):
        words = "besa eval ppl wikitext2"
    elif not any(exports.read(each)["source"]["digest"] == digest for each in inspection.exports(run)):
        words = "besa export"
    else:
        words = "besa show"
    return words if elsewhere is None else f"{words} --run {shlex.quote(str(elsewhere))}"


def _default_run() -> Path:
    return Path(os.environ.get("BESA_RUN") or options.DEFAULT_RUN)


def _calibrated_model(run: "Run") -> dict[str, str]:
    """Return the model option of a calibration set that was not drawn for the default model; else nothing."""
    from besa_cli.checkpoint import manifests

    name = manifests.read_calibration(run.calibration).get("model", {}).get("name", options.DEFAULT_MODEL)
    return {} if name == options.DEFAULT_MODEL else {"model": str(name)}
