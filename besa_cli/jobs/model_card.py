"""Model cards of exports: method, sparsity, perplexities, sizes, and how to load the model."""

import re
from collections.abc import Sequence
from typing import Annotated, NotRequired

from annotated_types import Ge, Gt
from typing_extensions import TypedDict

from besa_cli.checkpoint.exports import ExportRecord
from besa_cli.checkpoint.manifests import StageManifest
from besa_cli.checkpoint.runs import Run
from besa_cli.system import disk, records, redaction

FILE = "README.md"


class CardResult(TypedDict):
    """Perplexity as the card quotes it."""

    model_digest: str
    dataset: str
    split: str | None
    windows: Annotated[int, Ge(1)]
    windows_in_text: NotRequired[Annotated[int, Ge(1)]]
    seqlen: Annotated[int, Ge(1)]
    dtype: str
    perplexity: Annotated[float, Gt(0)]


def perplexities(run: Run, stage: StageManifest) -> list[tuple[str, CardResult]]:
    """Return the perplexities of the stage and of its source model that the run keeps, by a display name.

    Raises
    ------
    BesaError
        A result cannot be read, or is not one (named).
    """
    names = {stage["digest"]: "this model, as the stage it was exported from", stage["model"]["digest"]: "dense"}
    if not run.evaluations.is_dir():
        return []
    hint = "remove it, and measure again with: besa eval ppl"
    files = sorted(run.evaluations.glob("ppl-*.json"))
    wanted = [path for path in files if str(disk.read_json(path).get("model_digest")) in names]
    found = [records.read(CardResult, path, hint) for path in wanted]
    return [(names[each["model_digest"]], each) for each in found]


def text(manifest: ExportRecord, results: Sequence[tuple[str, CardResult]], loading: str) -> str:
    """Return the card in Markdown, with the hub's front matter.

    Parameters
    ----------
    manifest : mapping
        The export's manifest.
    results : sequence of (name, result)
        As from `perplexities`.
    loading : str
        How to load it.
    """
    parts = [_front(manifest), _done(manifest), _sizes(manifest), _measured(results), f"## To load it\n\n{loading}"]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _front(manifest: ExportRecord) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- besa", "- sparse"]
    if manifest["model"]["kind"] == "hub":
        lines.append(f"base_model: {_plain(manifest['model']['name'].partition('@')[0])}")
    return "\n".join([*lines, "---"])


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
    lines = ["## What it cost", "", "| | data | split | windows | context | dtype | perplexity |", "|" + "---|" * 7]
    for name, result in results:
        lines.append(
            f"| {name} | {_cell(result['dataset'])} | {_cell(result['split'] or '-')} | {_windows(result)} | "
            f"{result['seqlen']} | {result['dtype']} | {result['perplexity']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def _windows(result: CardResult) -> str:
    in_text = f" of {result['windows_in_text']}" if "windows_in_text" in result else ""  # older results do not say
    return f"{result['windows']}{in_text}"


def _plain(value: object) -> str:
    """Return a value on one line; a path on this machine is cut down to its last part."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f`<>]+", " ", redaction.text(value)).strip()


def _cell(value: object) -> str:
    text = ", ".join(map(_plain, value)) if isinstance(value, list) else _plain(value)
    return text.replace("|", "\\|")
