"""Contents of run directories for a report: stages, sizes, results, simulations, speeds, continuations and exports."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from typing_extensions import TypedDict

from besa_cli.bench.record import SpeedRecord
from besa_cli.checkpoint import exports, inspection, manifests
from besa_cli.checkpoint.manifests import CalibrationManifest, Digest, StageManifest
from besa_cli.checkpoint.reports import BlockReport
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import STAGES, Stage
from besa_cli.checkpoint.weights import Weights
from besa_cli.console import escaped
from besa_cli.errors import BesaError
from besa_cli.evaluation import comparison, continuations
from besa_cli.evaluation.comparison import Comparison
from besa_cli.evaluation.continuations import Continuation
from besa_cli.system import records
from besa_cli.system.records import strict

_KINDS = {
    "stage": "a stage",
    "calibration": "a calibration set",
    "export": "an export",
    "checkpoint": "a checkpoint",
}
_FEW = 0.01  # share of zeros that a dense model may have
_AGAIN = "delete the file, and make it again"


@dataclass(frozen=True, kw_only=True)
class StageSizes:
    """Bytes of a finished stage.

    Attributes
    ----------
    dense, linears : int
        Bytes of all tensors, and of the linears among them, as the stage holds them.
    packed : int
        The same with pruned weights left out: those of a sparse export, or with the codes of a grid packed.
    bits_per_weight : float
        Bits that a weight of the linears takes in `packed`.
    """

    dense: int
    linears: int
    packed: int
    bits_per_weight: float


@dataclass(frozen=True, kw_only=True)
class ReportedStage:
    """Stage of a run.

    Attributes
    ----------
    name : str
        ``pruned``, ``tuned`` or ``quantized``.
    directory : Path
    manifest : StageManifest
    finished : int
        Number of finished blocks.
    stale : bool
        True if it was made from a stage that has changed since.
    blocks : tuple of BlockReport
        Reports of the finished blocks.
    sizes : StageSizes or None
        None if it is unfinished.
    """

    name: str
    directory: Path
    manifest: StageManifest
    finished: int
    stale: bool
    blocks: tuple[BlockReport, ...]
    sizes: StageSizes | None

    @property
    def complete(self) -> bool:
        """True if the stage is finished."""
        return self.manifest["status"] == "complete"


@strict
class SimulatedMean(TypedDict):
    """Mean cost of the linears of one name under one dataflow."""

    sparsity: float
    dense_cycles: Annotated[float, Ge(0)]
    cycles: Annotated[float, Ge(0)]
    speedup: float | None


@strict
class SimulatedModel(TypedDict):
    """The model of a simulation."""

    name: str


@strict
class Simulation(TypedDict):
    """The fields of a simulation's result that a report shows."""

    kind: Literal["simulation"]
    model: SimulatedModel
    model_digest: Digest
    func: str
    settings: dict[str, Any]
    accelerator: dict[str, Any]
    mean: dict[str, dict[str, SimulatedMean]]


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """Contents of one run directory.

    Attributes
    ----------
    path : Path
    title : str
        Name of the directory; the whole path if another run has the same name.
    calibration : CalibrationManifest or None
    stages : tuple of ReportedStage
        In the order in which they are made.
    remade : tuple of ReportedStage
        Unfinished replacements of finished stages (``--restart``).
    continuations : tuple of Continuation
    simulations : tuple of Simulation
    speeds : tuple of SpeedRecord
    exports : tuple of (name, Manifest)
    """

    path: Path
    title: str
    calibration: CalibrationManifest | None
    stages: tuple[ReportedStage, ...]
    remade: tuple[ReportedStage, ...]
    continuations: tuple[Continuation, ...]
    simulations: tuple[Simulation, ...]
    speeds: tuple[SpeedRecord, ...]
    exports: tuple[tuple[str, exports.Manifest], ...]

    @property
    def newest(self) -> ReportedStage | None:
        """The newest finished stage that is not stale, or None."""
        return next((stage for stage in reversed(self.stages) if stage.complete and not stage.stale), None)

    @property
    def prunes(self) -> bool:
        """True if weights were pruned; not so of a dense model that was quantized, where few weights are zero."""
        stage = self.mapped
        if stage is None:
            return False
        linears = [linear for block in stage.blocks for linear in block.linears]
        pruned = sum(linear.pruned for linear in linears)
        weights = sum(linear.rows * linear.cols for linear in linears)
        return pruned > (_FEW * weights if stage.manifest["command"] == "quantize" else 0)

    @property
    def mapped(self) -> ReportedStage | None:
        """The stage whose sparsities are shown: the first, whose masks those after it keep; None if none is begun."""
        return next((stage for stage in self.stages if stage.finished), None)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """All runs of a report, and the comparison of their results."""

    runs: tuple[ReportedRun, ...]
    comparison: Comparison


def require(paths: Sequence[Path]) -> None:
    """Require that all paths are run directories.

    Raises
    ------
    BesaError
        A path is none; it is named.
    """
    for path in paths:
        if not path.is_dir():
            raise BesaError(
                f"there is no run directory {path}", "give run directories, as 'besa prune --run DIR' creates them"
            )
        kind = inspection.kind_of(path)
        if kind != "run":
            raise BesaError(
                f"{path} is {_KINDS[kind]}, not a run directory",
                f"name the run directory, as in: besa report {path.parent if kind == 'stage' else 'besa-run'}",
            )


def collect(paths: Sequence[Path]) -> Collected:
    """Read run directories, without their weights.

    Raises
    ------
    BesaError
        A path is not a run directory, or a file in it is damaged (named).
    """
    paths = list(dict.fromkeys(paths))
    require(paths)
    compared = comparison.compare(paths, require_results=False)
    return Collected(runs=tuple(_run(path, paths) for path in paths), comparison=compared)


def _run(path: Path, all_paths: Sequence[Path]) -> ReportedRun:
    run = Run(path)
    calibration = run.calibration / manifests.MANIFEST
    same = [other for other in all_paths if other.resolve().name == path.resolve().name]
    return ReportedRun(
        path=path,
        title=escaped(path.resolve().name if len(same) == 1 else str(path)),
        calibration=manifests.read_calibration(run.calibration) if calibration.exists() else None,
        stages=tuple(
            _stage(name, run.existing_stage(name), stale=run.stale(name))
            for name in STAGES
            if (run.existing_stage(name) / manifests.MANIFEST).exists()
        ),
        remade=tuple(
            _stage(name, run.next_stage(name), stale=False)
            for name in STAGES
            if (run.next_stage(name) / manifests.MANIFEST).exists() and run.existing_stage(name) != run.next_stage(name)
        ),
        continuations=_continuations(run),
        simulations=tuple(records.read(Simulation, file, _AGAIN) for file in sorted(run.simulations.glob("*.json"))),
        speeds=tuple(records.read(SpeedRecord, file, _AGAIN) for file in sorted(run.speeds.glob("*.json"))),
        exports=tuple((directory.name, exports.read(directory)) for directory in inspection.exports(run)),
    )


def _stage(name: str, directory: Path, *, stale: bool) -> ReportedStage:
    manifest = manifests.read_stage(directory)
    stage = Stage(directory, manifest["blocks"])
    blocks = tuple(stage.reports())
    return ReportedStage(
        name=name,
        directory=directory,
        manifest=manifest,
        finished=len(blocks),
        stale=stale,
        blocks=blocks,
        sizes=_sizes(directory, manifest) if manifest["status"] == "complete" else None,
    )


def _sizes(directory: Path, manifest: StageManifest) -> StageSizes:
    counts, source = manifest["counts"], Weights(directory)
    linears, sparse = inspection.sparse_sizes(directory)
    dense, weights = source.nbytes(source.names), max(counts["weights"], 1)
    return StageSizes(
        dense=dense,
        linears=linears + dense - sparse,
        packed=inspection.packed_size(directory, counts) if "bits" in counts else sparse,
        bits_per_weight=counts.get("bits_per_weight", 8 * linears / weights),
    )


def _continuations(run: Run) -> tuple[Continuation, ...]:
    files = sorted(run.evaluations.glob(f"{continuations.PREFIX}-*.json"))
    return tuple(records.read(Continuation, file, _AGAIN) for file in files)


def dense_name(manifest: StageManifest) -> str:
    """Return the name of the dense model at the beginning of a stage's history."""
    if manifest["history"]:
        return str(manifest["history"][0]["options"].get("model", manifest["model"]["name"]))
    return manifest["model"]["name"]
