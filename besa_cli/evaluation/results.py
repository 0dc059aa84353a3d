"""Perplexity results of a run: one file per result and, while measuring, one with the losses of its windows so far."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from besa_cli.checkpoint import manifests
from besa_cli.checkpoint.manifests import Positive
from besa_cli.errors import BesaError
from besa_cli.evaluation import result_files
from besa_cli.evaluation.measurement import Loss, Perplexity, PerplexityMeasurement, WindowComparison
from besa_cli.system import disk, lock, records
from besa_cli.system.disk import Json


@records.strict
@dataclass(frozen=True, kw_only=True)
class _Windows:
    """Figures of the first windows of a measurement: the sum of −log p and the number of tokens of each.

    Beside them the comparisons with the baseline of that digest, where one passed, too.
    """

    batch_size: int
    versions: dict[str, str]
    losses: tuple[tuple[float, Positive], ...]
    comparisons: tuple[WindowComparison, ...] = ()
    baseline_digest: str | None = None


class Results:
    """Perplexity results of one run directory, which is locked during each write only.

    Parameters
    ----------
    directory : Path
        ``eval`` in the run directory.

    Raises
    ------
    BesaError
        The directory is not writable.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        lock.require_writable(directory.parent)

    def file(self, job: PerplexityMeasurement) -> Path:
        """Return the path of a result, which need not exist."""
        return self._directory / job.file

    def _windows_file(self, job: PerplexityMeasurement) -> Path:
        return self.file(job).with_suffix(".windows")

    def load(self, job: PerplexityMeasurement) -> Perplexity | None:
        """Load the result of a measurement, or return None if there is none.

        Raises
        ------
        BesaError
            The file is damaged or belongs to a different measurement.
        """
        result = load(self.file(job))
        if result and not job.matches(result):
            raise BesaError(
                f"{self.file(job)} contains a different measurement than its name says",
                f"delete {self.file(job)}; it will be measured again",
            )
        if result and self._are_superseded(job, result):  # killed between the two steps of `save`
            with lock.hold_results(self._directory.parent):
                self._windows_file(job).unlink(missing_ok=True)
        return result

    def _are_superseded(self, job: PerplexityMeasurement, result: Perplexity) -> bool:
        """Return whether there are figures of windows, and all that they are for is in the result."""
        if not self._windows_file(job).exists():
            return False
        try:
            record = self._load_windows(job)
        except BesaError:
            return True
        return record is None or not record.comparisons or result.is_compared_with(record.baseline_digest)

    def load_losses(self, job: PerplexityMeasurement) -> list[Loss]:
        """Load the window losses of an interrupted measurement; empty if its batch size or versions were different."""
        record = self._load_windows(job)
        return list(record.losses) if record else []

    def load_comparisons(self, job: PerplexityMeasurement, baseline_digest: str) -> list[WindowComparison]:
        """Load the window comparisons of an interrupted measurement with this baseline, as `load_losses` the losses."""
        record = self._load_windows(job)
        return list(record.comparisons) if record and record.baseline_digest == baseline_digest else []

    def _load_windows(self, job: PerplexityMeasurement) -> _Windows | None:
        file = self._windows_file(job)
        if not file.exists():
            return None
        record = records.read(_Windows, file, f"delete {file}; its windows will be measured again")
        same = record.versions == manifests.versions() and record.batch_size == job.settings.batch_size
        return record if same else None

    def save_losses(
        self,
        job: PerplexityMeasurement,
        losses: Sequence[Loss],
        comparisons: Sequence[WindowComparison] = (),
        baseline_digest: str | None = None,
    ) -> None:
        """Write the losses of the windows measured so far, and their comparisons with the baseline of that digest."""
        record = {
            "format": manifests.FORMAT,
            "kind": "windows",
            "batch_size": job.settings.batch_size,
            "versions": manifests.versions(),
            "losses": losses,
        }
        if comparisons:
            record |= {"comparisons": comparisons, "baseline_digest": baseline_digest}
        with lock.hold_results(self._directory.parent):
            disk.sweep(self._windows_file(job))
            disk.write_json(self._windows_file(job), record)

    def save(self, job: PerplexityMeasurement, result: Perplexity, model: Json) -> None:
        """Write a result with its model, and delete the losses of its windows."""
        with lock.hold_results(self._directory.parent):
            disk.sweep(self._windows_file(job))
            save(result, self.file(job), model)
            self._windows_file(job).unlink(missing_ok=True)


def save(result: Perplexity, file: Path, model: Json) -> None:
    """Write a result with its model."""
    result_files.save(result, file, "perplexity", model, manifests.versions())


def load(file: Path) -> Perplexity | None:
    """Load a result, or return None if there is none, other versions made it, or its loss is not finite."""
    result = result_files.load(Perplexity, file, manifests.versions())
    return result if result and math.isfinite(result.nll) else None
