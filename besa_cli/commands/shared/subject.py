"""What `besa eval` looks at: the newest stage of a run directory or `--model`, and the dense model it was made from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from besa_cli import models
from besa_cli.commands.shared import help, options
from besa_cli.console import Console, human_share
from besa_cli.errors import BesaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from besa_cli.checkpoint.manifests import StageManifest

RunOption = Annotated[
    Path | None,
    help.RUN(
        "--run",
        "Directory that holds everything a run makes.",
        str(options.DEFAULT_RUN),
        metavar="DIR",
        envvar="BESA_RUN",
        callback=options.directories,
    ),
]
BaselineOption = Annotated[
    bool, help.DATA("--baseline/--no-baseline", "Also measure the dense model, or take its stored result.")
]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A checkpoint to look at, and the dense one it was made from."""

    name: str
    directory: Path
    digest: str | None
    parent: "Subject | None" = None
    results: Path | None = None


def find(model: str | None, run: Path | None, console: Console, *, baseline: bool = True) -> Subject:
    """What `--model` names; else the newest stage of the run directory; else, where none was named, the demo model.

    Raises
    ------
    BesaError
        The run directory that was named has no finished stage.
    """
    from besa_cli.checkpoint import stages
    from besa_cli.checkpoint.runs import Run

    place = Run(run or options.DEFAULT_RUN)
    if model is not None:
        found = models.resolve(model, notify=console.note)
        return Subject(name=model, directory=found.directory, digest=None, results=place.evaluations if run else None)
    newest = place.newest()
    if newest is None and run is not None:
        raise BesaError(f"{run} has no stage", f"make one: besa prune --run {run}")
    if newest is None:
        console.note(f"{place.path} has no finished stage: taking the demo model {models.DEMO}")
        found = models.resolve(models.DEMO, notify=console.note)
        return Subject(name=models.DEMO, directory=found.directory, digest=None)
    manifest = stages.require_finished(newest)
    counts = manifest["counts"]
    bits = f", {manifest['quantization']['bits']} bits" if "quantization" in manifest else ""
    return Subject(
        name=f"{manifest['options'].get('method', manifest['stage'])} {human_share(counts['sparsity'])}{bits}",
        directory=newest,
        digest=manifest["digest"],
        parent=_parent(manifest, place.evaluations, console) if baseline else None,
        results=place.evaluations,
    )


def _parent(manifest: "StageManifest", results: Path, console: Console) -> Subject:
    """The model that a stage was made from; fetched again where it is gone."""
    origin = manifest["model"]
    directory = Path(origin["directory"])
    if not directory.is_dir():
        name = origin["name"].partition("@")[0] if origin["revision"] else origin["name"]
        pinned = f"{name}@{origin['revision']}" if origin["revision"] else name
        directory = models.resolve(pinned, notify=console.note).directory
    label = "parent" if manifest.get("history") else "dense"
    return Subject(name=label, directory=directory, digest=origin["digest"], results=results)


def digest(subject: Subject) -> str:
    """The content digest of what lies in the directory now.

    Raises
    ------
    BesaError
        It is a stage that is not what was written.
    """
    from besa_cli.checkpoint import preflight, weights
    from besa_cli.models import cache

    found = weights.check(weights.Weights(subject.directory))
    cache.confirm(subject.directory, found)
    if subject.digest is not None:
        preflight.refuse_damaged(subject.directory, found)
    return found


def refuse_changed(parent: Subject) -> None:
    """A stage is compared with the model that it was made from, or with none.

    Raises
    ------
    BesaError
        The model has changed since.
    """
    from besa_cli.checkpoint import weights
    from besa_cli.models import cache

    found = weights.check(weights.Weights(parent.directory))
    cache.confirm(parent.directory, found)
    if found != parent.digest:
        raise BesaError(
            f"the model in {parent.directory} has changed since the stage was made from it "
            f"({str(parent.digest)[:12]} then, {found[:12]} now)",
            "measure the stage alone with --no-baseline",
        )


def tokenizer(subject: Subject, notify: Callable[[str], None] = lambda _: None) -> "PreTrainedTokenizerBase":
    """The tokenizer that lies with the checkpoint; see `besa_cli.models.tokenizer.tokenizer_of`."""
    from besa_cli.models.tokenizer import tokenizer_of

    place = models.Model(name=subject.name, kind="local", directory=subject.directory, revision=None)
    return tokenizer_of(place, notify)
