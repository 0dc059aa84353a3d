"""The run directory."""

from pathlib import Path

from besa_cli.checkpoint import manifests, swap
from besa_cli.checkpoint.stages import STAGES, finished


class Run:
    """A run directory: the only state between commands."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def calibration(self) -> Path:
        """Where the calibration set is."""
        return self.path / "calibration"

    @property
    def evaluations(self) -> Path:
        """Where evaluation results go, one file a result."""
        return self.path / "eval"

    @property
    def exports(self) -> Path:
        """Where exports go, one directory each."""
        return self.path / "export"

    @property
    def simulations(self) -> Path:
        """Where simulation results go, one file a result."""
        return self.path / "simulate"

    def stage(self, name: str) -> Path:
        """Where a stage is: ``pruned``, ``quantized``."""
        return self.path / name

    def stage_at(self, directory: Path) -> str | None:
        """The name of this run's stage in a directory; None where that is none of its stages."""
        return next((name for name in STAGES if self.stage(name).resolve() == directory.resolve()), None)

    def next_stage(self, name: str) -> Path:
        """Where a stage is written that will take the place of a finished one."""
        return self.path / f"{name}.next"

    def newest(self) -> Path | None:
        """The newest stage, or None where there is none; not one whose parent was made anew since.

        Raises
        ------
        BesaError
            It is unfinished.
        """
        for name in reversed(STAGES):
            directory = self.whole(name)
            if (directory / manifests.MANIFEST).exists() and not self.stale(name):
                finished(directory)
                return directory
        return None

    def whole(self, name: str) -> Path:
        """Where a stage is, also after a crash in the middle of an exchange."""
        directory = self.stage(name)
        if directory.exists():
            return directory
        others = (self.next_stage(name), swap.aside(directory))
        return next((place for place in others if manifests.is_complete(place)), directory)

    def stale(self, name: str) -> bool:
        """Whether a stage was made from another stage of this run that is not the same any more."""
        model = manifests.read(self.whole(name)).get("model", {})
        if "stage" not in model:
            return False
        parent = self.whole(model["stage"])
        return not manifests.is_complete(parent) or manifests.read(parent)["digest"] != model["digest"]
