"""Where a run keeps its perplexities: one file a result; while one is measured, the losses of its windows so far."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from besa_cli.checkpoint import manifests
from besa_cli.checkpoint.manifests import Positive
from besa_cli.errors import BesaError
from besa_cli.evaluation import result_files
from besa_cli.evaluation.measurement import Loss, Perplexity, PerplexityMeasurement
from besa_cli.system import disk, lock, records


@records.strict
@dataclass(frozen=True, kw_only=True)
class _Windows:
    """The losses of the first windows of a measurement: sums of −log p, and of how many tokens."""

    batch_size: int
    versions: dict[str, str]
    losses: tuple[tuple[float, Positive], ...]


class Results:
    """The results of one run directory, which is locked for every write, and only then.

    Parameters
    ----------
    directory : Path
        ``eval`` in the run directory.

    Raises
    ------
    BesaError
        Nothing can be written there; found out now, not after measuring.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        lock.require_writable(directory.parent)

    def file(self, job: PerplexityMeasurement) -> Path:
        """Where a result is, or will be."""
        return self._directory / job.file

    def _windows_file(self, job: PerplexityMeasurement) -> Path:
        return self.file(job).with_suffix(".windows")

    def load(self, job: PerplexityMeasurement) -> Perplexity | None:
        """The result of the same measurement, or None where there is none."""
        found = load(self.file(job))
        if found and not job.made(found):
            raise BesaError(
                f"{self.file(job)} holds another measurement than its name says",
                f"delete {self.file(job)}: it is measured again then",
            )
        if found and self._windows_file(job).exists():  # killed between the two steps of `save`
            with lock.hold_results(self._directory.parent):
                self._windows_file(job).unlink(missing_ok=True)
        return found

    def known(self, job: PerplexityMeasurement) -> list[Loss]:
        """The losses of the first windows, as far as an interrupted measurement came; with the same batches only."""
        file = self._windows_file(job)
        if not file.exists():
            return []
        record = records.read(_Windows, file, f"delete {file}: its windows are measured again then")
        same = record.versions == manifests.versions() and record.batch_size == job.settings.batch_size
        return list(record.losses) if same else []

    def keep(self, job: PerplexityMeasurement, losses: Sequence[Loss]) -> None:
        """Put the losses of the first windows on disk."""
        record = {
            "format": manifests.FORMAT,
            "kind": "windows",
            "batch_size": job.settings.batch_size,
            "versions": manifests.versions(),
            "losses": losses,
        }
        with lock.hold_results(self._directory.parent):
            disk.sweep(self._windows_file(job))
            disk.write_json(self._windows_file(job), record)

    def save(self, job: PerplexityMeasurement, result: Perplexity, model: Mapping[str, Any]) -> None:
        """Put a result on disk, with what it belongs to; the losses of its windows are not needed any more."""
        with lock.hold_results(self._directory.parent):
            disk.sweep(self._windows_file(job))
            save(result, self.file(job), model)
            self._windows_file(job).unlink(missing_ok=True)


def save(result: Perplexity, file: Path, model: Mapping[str, Any]) -> None:
    """Write one result with what it belongs to."""
    result_files.save(result, file, "perplexity", model, manifests.versions())


def load(file: Path) -> Perplexity | None:
    """A result that was saved, or None where there is none of the same versions; one that is no number is none."""
    found = result_files.load(Perplexity, file, manifests.versions())
    return found if found and math.isfinite(found.nll) else None
