"""Models of a report: every finished stage and every dense model, with its size, its sparsity and its results."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from besa_cli.checkpoint import origins
from besa_cli.checkpoint.manifests import StageManifest
from besa_cli.console import escaped, human_share
from besa_cli.evaluation.comparison import Column
from besa_cli.report import runs
from besa_cli.report.runs import Collected, ReportedRun, ReportedStage
from besa_cli.system import redaction
from besa_cli.system.disk import Json


@dataclass(frozen=True, kw_only=True)
class ReportedModel:
    """Model with its size and its results.

    Attributes
    ----------
    title : str
        Unique name.
    what : str
        What was done to it, in words.
    digest : str
        Content digest.
    dense : str or None
        Digest of the dense model at its beginning; None for a dense model.
    sparsity, bits_per_weight, packed, share : float or None
        Share of pruned weights, bits of a weight of the linears, bytes with pruned weights left out, and their share of
        the dense model's; None where nothing is known.
    figures : mapping of Column to float
        Results.
    """

    title: str
    what: str
    digest: str
    dense: str | None = None
    sparsity: float | None = None
    bits_per_weight: float | None = None
    packed: int | None = None
    share: float | None = None
    figures: Mapping[Column, float] = field(default_factory=dict)


def models(collected: Collected) -> list[ReportedModel]:
    """Return all models: the dense ones, the stages run by run, and others that were measured."""
    stages = [(run, stage) for run in collected.runs for stage in run.stages if stage.complete]
    figures: dict[str, dict[Column, float]] = {}
    for row in collected.comparison.rows:  # the same content has the same results, whichever run measured it
        figures[row.digest] = {**row.figures, **figures.get(row.digest, {})}
    dense = {origins.dense_origin(stage.manifest, run.path)["digest"]: stage for run, stage in stages}
    found = [_dense(digest, stage, figures.get(digest, {}), len(dense)) for digest, stage in dense.items()]
    found += [_stage(run, stage, figures.get(stage.manifest["digest"], {})) for run, stage in stages]
    known = {model.digest for model in found}
    found += [
        ReportedModel(title=escaped(row.title), what="measured in the run", digest=row.digest, figures=row.figures)
        for row in collected.comparison.rows
        if row.digest not in known
    ]
    return found


def _dense(digest: str, stage: ReportedStage, figures: Mapping[Column, float], models: int) -> ReportedModel:
    name, counts, sizes = name_of(runs.dense_name(stage.manifest)), stage.manifest["counts"], stage.sizes
    if sizes is None:
        raise RuntimeError("a finished stage has sizes")
    return ReportedModel(
        title="dense" if models == 1 else f"dense {name}",
        what=name,
        digest=digest,
        sparsity=0.0,
        bits_per_weight=8 * sizes.linears / max(counts["weights"], 1),
        packed=sizes.dense,
        share=1.0,
        figures=figures,
    )


def _stage(run: ReportedRun, stage: ReportedStage, figures: Mapping[Column, float]) -> ReportedModel:
    if stage.sizes is None:
        raise RuntimeError("a finished stage has sizes")
    return ReportedModel(
        title=stage_title(run, stage),
        what=done(stage.manifest) + (", stale" if stage.stale else ""),
        digest=stage.manifest["digest"],
        dense=origins.dense_origin(stage.manifest, run.path)["digest"],
        sparsity=stage.manifest["counts"]["sparsity"],
        bits_per_weight=stage.sizes.bits_per_weight,
        packed=stage.sizes.packed,
        share=stage.sizes.packed / max(stage.sizes.dense, 1),
        figures=figures,
    )


def stage_title(run: ReportedRun, stage: ReportedStage) -> str:
    """Return the name of a stage: that of its run, with the stage's own if the run has several."""
    return run.title if len(run.stages) == 1 else f"{run.title}, {stage.name}"


def name_of(model: str) -> str:
    """Return the name of a model as it may be published: without the path to it on this machine."""
    return escaped(redaction.text(model))


def done(manifest: StageManifest) -> str:
    """Return what was done to a model, step by step: ``wanda 50 %, tuned, gptq 4 bits``."""
    steps: list[Json] = [*manifest["history"], manifest]
    return ", ".join(escaped(_step(str(step["command"]), step["options"])) for step in steps)


def _step(command: str, options: Json) -> str:
    if command == "tune":
        return "tuned"
    bits = f"{options['bits']} bits" if options.get("bits") else ""
    if command == "quantize":
        return f"{options.get('method', 'quantized')} {bits}".rstrip()
    pattern, share = options.get("nm"), options.get("sparsity")
    if isinstance(pattern, list):
        pattern = ":".join(map(str, pattern))
    amount = pattern or (human_share(share).replace(".00 ", " ") if isinstance(share, float | int) else "")
    return ", ".join(part for part in (f"{options.get('method', 'pruned')} {amount}".rstrip(), bits) if part)
