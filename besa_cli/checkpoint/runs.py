"""The run directory and the paths in it."""

from collections.abc import Sequence
from pathlib import Path

from besa_cli.checkpoint import manifests, swap
from besa_cli.checkpoint.stages import STAGES, require_finished


class Run:
    """A run directory: the only state between commands."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def calibration(self) -> Path:
        """Directory of the calibration set."""
        return self.path / "calibration"

    @property
    def evaluations(self) -> Path:
        """Directory of evaluation results, one file per result."""
        return self.path / "eval"

    @property
    def exports(self) -> Path:
        """Directory of exports, one subdirectory each."""
        return self.path / "export"

    @property
    def simulations(self) -> Path:
        """Directory of simulation results, one file per result."""
        return self.path / "simulate"

    @property
    def speeds(self) -> Path:
        """Directory of measured speeds, one file per measurement."""
        return self.path / "speed"

    def stage(self, name: str) -> Path:
        """Return the directory of a stage, ``pruned``, ``tuned`` or ``quantized``."""
        return self.path / name

    def stage_at(self, directory: Path) -> manifests.StageName | None:
        """Return the name of the stage in a directory; None if it is not one of this run's stages."""
        return next((name for name in STAGES if self.stage(name).resolve() == directory.resolve()), None)

    def next_stage(self, name: str) -> Path:
        """Return the directory in which the replacement of a finished stage is written."""
        return self.path / f"{name}.next"

    def newest(self, among: Sequence[manifests.StageName] = STAGES) -> Path | None:
        """Return the newest stage that is not stale, or None if there is none.

        Parameters
        ----------
        among : sequence of str
            Stages to choose from, in the order in which they are made; all by default.

        Raises
        ------
        BesaError
            The stage is unfinished.
        """
        for name in reversed(among):
            directory = self.existing_stage(name)
            if (directory / manifests.MANIFEST).exists() and not self.stale(name):
                require_finished(directory)
                return directory
        return None

    def existing_stage(self, name: str) -> Path:
        """Return the directory of a stage, also if a crash interrupted its replacement."""
        directory = self.stage(name)
        if directory.exists():
            return directory
        candidates = (self.next_stage(name), swap.aside(directory))
        return next((candidate for candidate in candidates if manifests.is_complete(candidate)), directory)

    def stale(self, name: manifests.StageName) -> bool:
        """Return True if a stage was made from another stage of this run that has changed since or is missing.

        So is one that was made without a stage in between that is finished now: a quantized one whose pruned stage has
        been tuned since.
        """
        model = manifests.read_stage(self.existing_stage(name))["model"]
        if "stage" not in model:
            return False
        parent = self.existing_stage(model["stage"])
        if not manifests.is_complete(parent) or manifests.read_stage(parent)["digest"] != model["digest"]:
            return True
        between = STAGES[STAGES.index(model["stage"]) + 1 : STAGES.index(name)]
        return any(manifests.is_complete(self.existing_stage(each)) and not self.stale(each) for each in between)
