"""Place of a requested stage: what it is made from, what lies there already, and how it is begun and put there."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from besa_cli.calibration.calibration_set import CalibrationSet
from besa_cli.checkpoint import ownership, preflight, swap, weights
from besa_cli.checkpoint.manifests import NewStageManifest, StageManifest
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.checkpoint.weights import Weights
from besa_cli.jobs import stage_manifest
from besa_cli.jobs.request import Request
from besa_cli.models import Model
from besa_cli.system.disk import Json


@dataclass(frozen=True, kw_only=True)
class StagePlace:
    """Place of a stage, found by `find`.

    Attributes
    ----------
    final, directory : Path
        Where the stage will be, and where it is made.
    manifest : StageManifest or NewStageManifest
        Of what was begun there with the same options, else of a new stage.
    model, sources : Path, sequence of Path
        Directory of the model; all that is read while the stage is made.
    source : Weights
        Weights of the model.
    digest : str
        Their digest.
    extremes : mapping of name to the least and the greatest number
        Of each tensor of the model.
    reading : float
        Seconds that reading the model took.
    """

    final: Path
    directory: Path
    manifest: StageManifest | NewStageManifest
    model: Path
    sources: Sequence[Path]
    source: Weights
    digest: str
    extremes: Mapping[str, tuple[float, float]]
    reading: float

    @property
    def done(self) -> bool:
        """True if the stage was already finished."""
        return bool(self.manifest["status"] == "complete")

    @property
    def is_new(self) -> bool:
        """True if the stage has not been begun."""
        return bool(self.manifest["status"] == "new")

    def begin(self, stage: Stage, left_out: Mapping[str, int], changed: Mapping[str, Json] | None = None) -> None:
        """Write the manifest and the small files of a new stage; what it replaces is discarded.

        `left_out` names the weights of its blocks that are in no linear, with their number, and `changed` the small
        files that differ from the model's, with their contents.
        """
        swap.discard(self.directory, self.final, self.sources)
        entry = {"left_out": {"tensors": list(left_out), "weights": sum(left_out.values())}} if left_out else {}
        stage.begin({**self.manifest, **entry}, self.model, changed)

    def write_rest(self, stage: Stage, names: Sequence[str]) -> None:
        """Write the tensors that belong to no block, or compare those that are there with the model's."""
        tensors = self.source.read(names)
        if stage.shard(-1).exists():
            stage.check_rest(weights.digest(tensors))
        else:
            stage.write_rest(tensors)

    def take(self) -> None:
        """Put the finished stage where it belongs."""
        if self.directory != self.final:
            swap.replace_stage(self.final, self.directory)


def find(
    run: Run, model: Model, calibration: CalibrationSet, request: Request, *, restart: bool, ranks: int = 1
) -> StagePlace:
    """Find the place of a requested stage; writes nothing.

    Parameters
    ----------
    run : Run
        Its lock is held by the caller, and an interrupted exchange was completed.
    model : Model
        What the stage is made from.
    calibration : CalibrationSet
    request : Request
    restart : bool
        Begin again; a finished stage is replaced when the new one is finished.
    ranks : int
        Processes that make it.

    Raises
    ------
    BesaError
        The place holds files of others or a stage made otherwise, or the model or a finished stage is damaged.
    """
    began = time.perf_counter()
    sources = [model.directory, *([Path(request.calibration)] if request.calibration else [])]
    final, next_stage = run.stage(request.stage), run.next_stage(request.stage)
    for place in (final, next_stage):
        preflight.refuse_foreign(place, model.directory)
        if restart:
            ownership.refuse_to_replace(place, sources)
    source = Weights(model.directory)
    extremes: dict[str, tuple[float, float]] = {}
    digest = weights.check_source(source, extremes)
    reading = time.perf_counter() - began
    preflight.refuse_damaged(model.directory, digest)
    new = stage_manifest.new_manifest(run, model, digest, calibration, request, ranks)
    directory, manifest = stage_manifest.find_or_plan(final, next_stage, new, restart=restart)
    if manifest["status"] == "complete":
        preflight.refuse_damaged(directory, weights.check(Weights(directory)))
        preflight.refuse_incomplete(directory)
    elif manifest["status"] != "new":
        stage_manifest.refuse_other_environment(directory, manifest, new)
    return StagePlace(
        final=final,
        directory=directory,
        manifest=manifest,
        model=model.directory,
        sources=sources,
        source=source,
        digest=digest,
        extremes=extremes,
        reading=reading,
    )
