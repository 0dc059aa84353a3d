"""Subjects of `besa eval` and `besa simulate`: `--model` or the newest stage of a run, and its dense model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from besa_cli import models
from besa_cli.commands.shared import options, panels
from besa_cli.console import Console, human_share
from besa_cli.errors import BesaError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from besa_cli.checkpoint.manifests import StageManifest

RunOption = Annotated[
    Path | None,
    panels.RUN(
        "--run",
        "Directory that holds everything a run makes.",
        str(options.DEFAULT_RUN),
        metavar="DIR",
        envvar="BESA_RUN",
        callback=options.expand_utf8,
    ),
]
BaselineOption = Annotated[
    bool, panels.DATA("--baseline/--no-baseline", "Also measure the dense model, or take its stored result.")
]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Checkpoint to measure.

    Attributes
    ----------
    name : str
        Title in tables.
    directory : Path
    digest : str, optional
        Content digest that the manifest states; None for a model that is not part of a run.
    baseline : Subject, optional
        Model that the stage is compared with: the dense one.
    results : Path, optional
        Directory of stored results.
    packed : bool
        A sparse export, which runs from its packed weights.
    """

    name: str
    directory: Path
    digest: str | None
    baseline: "Subject | None" = None
    results: Path | None = None
    packed: bool = False


def find(
    model: str | None, run: Path | None, console: Console, *, baseline: bool = True, exports: bool = False
) -> Subject:
    """Find the checkpoint to measure.

    It is `model` if given, else the newest stage of the run directory, else, if no run directory is given, the demo
    model. `baseline` adds the dense model that the stage's history begins with; with `exports` the model may be the
    directory of an export.

    Raises
    ------
    BesaError
        The given run directory has no finished stage.
    """
    from besa_cli.checkpoint import stages
    from besa_cli.checkpoint.runs import Run

    source = Run(run or options.DEFAULT_RUN)
    if model is not None and exports:
        from besa_cli.inference import sources

        found = sources.resolve(model, console.note)
        return Subject(
            name=model,
            directory=found.directory,
            digest=found.packed_digest,
            results=source.evaluations if run else None,
            packed=found.packed_digest is not None,
        )
    if model is not None:
        resolved = models.resolve(model, notify=console.note)
        return Subject(
            name=model, directory=resolved.directory, digest=None, results=source.evaluations if run else None
        )
    newest = source.newest()
    if newest is None and run is not None:
        raise BesaError(f"{run} has no stage", f"make one: besa prune --run {run}")
    if newest is None:
        console.note(f"{source.path} has no finished stage: using the demo model {models.DEMO}")
        resolved = models.resolve(models.DEMO, notify=console.note)
        return Subject(name=models.DEMO, directory=resolved.directory, digest=None)
    manifest = stages.require_finished(newest)
    counts = manifest["counts"]
    bits = f", {manifest['quantization']['bits']} bits" if "quantization" in manifest else ""
    return Subject(
        name=f"{manifest['options'].get('method', manifest['stage'])} {human_share(counts['sparsity'])}{bits}",
        directory=newest,
        digest=manifest["digest"],
        baseline=_baseline(newest, manifest, source.evaluations, console) if baseline else None,
        results=source.evaluations,
    )


def _baseline(stage: Path, manifest: "StageManifest", results: Path, console: Console) -> Subject:
    """Return the dense model that a stage's history begins with; fetch it again if it is gone.

    Where a stage in between is gone, it is the model that the stage was made from.
    """
    from besa_cli.checkpoint import origins

    name = "dense"
    try:
        directory, content = origins.dense(stage, console.note)
    except BesaError as error:
        if not manifest["history"]:  # there is no stage in between
            raise
        console.note(f"compared with the model that it was made from, not with the dense one: {error}")
        origin = manifest["model"]
        name, directory, content = "parent", origins.locate(origin, console.note), origin["digest"]
    return Subject(name=name, directory=directory, digest=content, results=results)


def device(name: str, model: str | None) -> "torch.device":
    """Return the device for ``--device``: a sparse export runs on the CPU.

    Raises
    ------
    UsageError
        CUDA is requested for a sparse export, or not available.
    """
    from besa_cli.inference import sources
    from besa_cli.system import compute

    if model is None or not sources.names_sparse_export(model):
        return compute.device(name)
    if name == "cuda":
        raise UsageError(f"--device cuda: {model} runs from its packed weights, on the CPU", "omit the option")
    return compute.device("cpu")


def digest(subject: Subject) -> str:
    """Compute the content digest of the files in the subject's directory; that of a sparse export is read.

    Raises
    ------
    BesaError
        The digest of a stage differs from that of its manifest.
    """
    from besa_cli.checkpoint import preflight, weights

    if subject.packed:
        return str(subject.digest)  # the files are compared with it when they are loaded
    computed = weights.check_source(weights.Weights(subject.directory))
    if subject.digest is not None:
        preflight.refuse_damaged(subject.directory, computed)
    return computed


def refuse_changed(baseline: Subject) -> None:
    """Refuse a model to compare with that has changed since the stage was made from it.

    Raises
    ------
    BesaError
        Its digest differs from that of the stage's manifest.
    """
    from besa_cli.checkpoint import weights

    computed = weights.check_source(weights.Weights(baseline.directory))
    if computed != baseline.digest:
        raise BesaError(
            f"the model in {baseline.directory} has changed since the stage was made from it "
            f"({str(baseline.digest)[:12]} then, {computed[:12]} now)",
            "measure the stage alone with --no-baseline",
        )


def tokenizer(subject: Subject, notify: Callable[[str], None] = lambda _: None) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of the checkpoint: see `besa_cli.models.tokenizer.tokenizer_of`."""
    from besa_cli.models.tokenizer import tokenizer_of

    model = models.Model(name=subject.name, kind="local", directory=subject.directory, revision=None)
    return tokenizer_of(model, notify)
