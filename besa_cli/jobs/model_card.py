"""Model cards of exports: what was done, results beside the dense model's, sizes, how to load and to make it again."""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NotRequired

from annotated_types import Ge, Gt, Le
from typing_extensions import TypedDict

from besa_cli.checkpoint import inspection, origins
from besa_cli.checkpoint.exports import ExportRecord
from besa_cli.checkpoint.manifests import StageManifest
from besa_cli.checkpoint.runs import Run
from besa_cli.evaluation.zeroshot.results import TaskResult
from besa_cli.models import demo
from besa_cli.system import disk, records, redaction

FILE = "README.md"

_THIS, _DENSE = "this model, as the stage it was exported from", "dense"
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_FRONT_MATTER = re.compile(r"---\r?\n(.*?\r?\n)---", re.DOTALL)


class CardResult(TypedDict):
    """Perplexity as the card quotes it, with the comparison with the dense model where there is one."""

    model_digest: str
    dataset: str
    split: str | None
    windows: Annotated[int, Ge(1)]
    windows_in_text: NotRequired[Annotated[int, Ge(1)]]
    seqlen: Annotated[int, Ge(1)]
    dtype: str
    perplexity: Annotated[float, Gt(0)]
    kl: NotRequired[Annotated[float, Ge(0)] | None]
    same_token: NotRequired[Annotated[float, Ge(0), Le(1)] | None]


@dataclass(frozen=True, kw_only=True)
class CardResults:
    """Results that a card quotes, each with the name of its model."""

    perplexities: Sequence[tuple[str, CardResult]] = ()
    tasks: Sequence[tuple[str, TaskResult]] = ()


@dataclass(frozen=True, kw_only=True)
class CardOrigin:
    """The dense model for the hub's front matter: its name on the hub and its licence, None where unknown."""

    base_model: str | None
    licence: str | None


def origin(run: Run, stage: StageManifest) -> CardOrigin:
    """Return what is known of the dense model that the history of a run's stage begins with."""
    dense = origins.dense_origin(stage, run.path)
    if dense["kind"] == "demo":
        return CardOrigin(base_model=demo.BASE, licence=demo.LICENCE)
    base_model = dense["name"].partition("@")[0] if dense["kind"] == "hub" else None
    return CardOrigin(base_model=base_model, licence=_licence(Path(dense["directory"])))


def _licence(directory: Path) -> str | None:
    """Return the licence that the front matter of a model's card names; None if there is none."""
    import yaml

    card = directory / FILE
    if not card.is_file():
        return None
    front = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    try:
        values = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return None
    licence = values.get("license") if isinstance(values, dict) else None
    return licence if isinstance(licence, str) and _LICENCE.fullmatch(licence) else None


def results(run: Run, stage: StageManifest) -> CardResults:
    """Return the results of the stage and of its dense model that the run keeps.

    Raises
    ------
    BesaError
        A result cannot be read, or is not one (named).
    """
    names = {origins.dense_origin(stage, run.path)["digest"]: _DENSE, stage["digest"]: _THIS}
    hint = "remove it, and measure again with: besa eval"
    perplexities = [records.read(CardResult, path, hint) for path in _files(run, "ppl", names)]
    tasks = [records.read(TaskResult, path, hint) for path in _files(run, "tasks", names)]
    return CardResults(
        perplexities=[(names[each["model_digest"]], each) for each in perplexities],
        tasks=[(names[each.model_digest], each) for each in tasks],
    )


def _files(run: Run, kind: str, digests: Container[str]) -> list[Path]:
    """List the files with results of one kind of models with these digests."""
    files = sorted(run.evaluations.glob(f"{kind}-*.json"))
    return [path for path in files if str(disk.read_json(path).get("model_digest")) in digests]


def text(manifest: ExportRecord, dense: CardOrigin, measured: CardResults, loading: str) -> str:
    """Return the card in Markdown, with the hub's front matter.

    Parameters
    ----------
    manifest : mapping
        The export's manifest.
    dense : CardOrigin
    measured : CardResults
    loading : str
        How to load it.
    """
    parts = [
        _front(manifest, dense),
        _done(manifest),
        _again(manifest),
        _sizes(manifest),
        _measured(measured.perplexities),
        _tasks(measured.tasks),
        f"## To load it\n\n{loading}",
    ]
    return "\n".join(part.rstrip() + "\n" for part in parts if part)


def _front(manifest: ExportRecord, dense: CardOrigin) -> str:
    methods = [str(step["options"]["method"]) for step in manifest["history"] if step["options"].get("method")]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"license: {dense.licence}"] if dense.licence else []
    lines += [f"base_model: {_plain(dense.base_model)}"] if dense.base_model else []
    lines += ["tags:", *(f"- {tag}" for tag in dict.fromkeys(["besa", "sparse", "pruned", *map(_plain, methods)]))]
    return "\n".join([*lines, "---"])


def _again(manifest: ExportRecord) -> str:
    """Return the commands that make the export again; each after the first takes the stage of the one before."""
    commands = []
    for number, step in enumerate(manifest["history"]):
        chosen = {name: value for name, value in step["options"].items() if not (number and name == "model")}
        commands.append(inspection.command_line(step["command"], chosen))
    commands.append(inspection.command_line("export", manifest["options"]))
    return "\n".join(["## To make it again", "", "```sh", *map(_plain, commands), "```"])


def _done(manifest: ExportRecord) -> str:
    model, counts = manifest["model"], manifest["counts"]
    revision = f" (revision {model['revision']})" if model["revision"] else ""
    lines = [
        f"# {_plain(model['name'].rstrip('/').rpartition('/')[2])}, {100 * counts['sparsity']:.4g} % pruned",
        "",
        f"Made from `{_plain(model['name'])}`{revision} with `besa` {manifest['versions']['besa']}: "
        f"{counts['pruned']:,} of the {counts['weights']:,} weights of the linears in its blocks were pruned, "
        f"{counts['zeros']:,} are zero. "
        "Embeddings and head are untouched.",
        "",
        "## What was done",
        "",
    ]
    for step in manifest["history"]:
        chosen = {name: value for name, value in step["options"].items() if value is not None}
        lines += [f"`besa {step['command']}` with", "", "| option | value |", "|---|---|"]
        lines += [f"| {name.replace('_', '-')} | {_cell(value)} |" for name, value in chosen.items()]
        lines += ["", f"Content digest of the {step['stage']} stage: `{step['digest']}`", ""]
    return "\n".join(lines)


def _sizes(manifest: ExportRecord) -> str:
    sizes, options = manifest["sizes"], manifest["options"]
    chosen = ", ".join(f"{name} {value}" for name, value in options.items() if name != "format" and value is not None)
    rows = [
        ("linears", sizes["linears"], sizes["linears_dense"]),
        ("whole model", sizes["weights"], sizes["weights_dense"]),
    ]
    lines = [
        "## Size",
        "",
        f"Format `{options['format']}`" + (f" ({chosen})" if chosen else "") + ", against dense bf16:",
        "",
        "| | MB | dense bf16, MB | ratio |",
        "|---|---|---|---|",
        *(f"| {name} | {here / 1e6:.1f} | {dense / 1e6:.1f} | {here / dense:.3f} |" for name, here, dense in rows),
        "",
    ]
    if sizes["rounded_to_zero"]:
        lines.append(f"{sizes['rounded_to_zero']:,} weights that were not pruned are zero after rounding.")
    return "\n".join(lines)


def _measured(results: Sequence[tuple[str, CardResult]]) -> str:
    if not results:
        return "## What it cost\n\nNo perplexity was measured in the run directory: `besa eval ppl` does.\n"
    lines = [
        "## What it cost",
        "",
        "| | data | split | windows | context | dtype | perplexity | KL to dense, nats a token | same token |",
        "|" + "---|" * 9,
    ]
    for name, result in results:
        kl, same = result.get("kl"), result.get("same_token")
        lines.append(
            f"| {name} | {_cell(result['dataset'])} | {_cell(result['split'] or '-')} | {_windows(result)} | "
            f"{result['seqlen']} | {result['dtype']} | {result['perplexity']:.4f} | "
            f"{'-' if kl is None else f'{kl:.4f}'} | {'-' if same is None else f'{100 * same:.2f} %'} |"
        )
    return "\n".join(lines) + "\n"


def _tasks(results: Sequence[tuple[str, TaskResult]]) -> str:
    """Return the table of zero-shot tasks; empty if none was measured."""
    lines = [
        f"| {name} | {_cell(score.task)} | {_cell(score.metric)} | {score.questions or '-'} | {score.value:.4f} | "
        f"{'-' if score.stderr is None else f'{score.stderr:.4f}'} |"
        for name, result in results
        for score in result.scores()
    ]
    header = ["| | task | metric | questions | value | standard error |", "|" + "---|" * 6]
    return "\n".join([*header, *lines]) if lines else ""


def _windows(result: CardResult) -> str:
    in_text = f" of {result['windows_in_text']}" if "windows_in_text" in result else ""  # older results do not say
    return f"{result['windows']}{in_text}"


def _plain(value: object) -> str:
    """Return a value on one line; a path on this machine is cut down to its last part."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f`<>]+", " ", redaction.text(value)).strip()


def _cell(value: object) -> str:
    text = ", ".join(map(_plain, value)) if isinstance(value, list) else _plain(value)
    return text.replace("|", "\\|")
