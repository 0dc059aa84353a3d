"""Exports of a finished stage: a directory that is complete under its own name, or absent."""

import os
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import cast

from besa_cli.checkpoint import exports, manifests, ownership, preflight, swap, weights, zstd
from besa_cli.checkpoint.manifests import EXPORT, FORMAT
from besa_cli.checkpoint.runs import Run
from besa_cli.errors import BesaError
from besa_cli.exporters import Exporter
from besa_cli.exporters.source import STAGE_FILES, Piece, StageSource, private
from besa_cli.jobs import model_card
from besa_cli.stream.forecast import Forecast
from besa_cli.system import compute, disk, redaction
from besa_cli.system.disk import JsonObject

_ROOM = 64 << 20  # bytes beside the weights: tokenizer, headers, index


def directory_name(exporter: Exporter) -> str:
    """Return the name of an export's directory: the format, and the options of how weights are stored."""
    chosen = [str(exporter.given[name]) for name in ("dtype", "type", "compress") if name in exporter.given]
    return disk.safe_name("-".join([exporter.name, *chosen]))


class ExportJob:
    """One export of a run directory; making the job only checks, `pieces` does the work.

    Parameters
    ----------
    run : Run
        Its lock is held by the caller.
    exporter : Exporter
    restart : bool
        Replace an export of the same name, when the new one is finished.

    Raises
    ------
    BesaError
        Anything that can be known before the first piece.
    """

    def __init__(self, run: Run, exporter: Exporter, *, restart: bool = False) -> None:
        newest = run.newest()
        if newest is None:
            raise BesaError(f"{run.path} has no stage to export", f"make one: besa prune --run {run.path}")
        self._run, self._exporter = run, exporter
        self.source = StageSource(newest)
        self.directory = run.exports / directory_name(exporter)
        self._partial = run.exports / f".{self.directory.name}.partial"
        self.record = exporter.record()
        self.done = self.directory.exists() and not restart
        if self.done:
            self._refuse_other()
        self.number_of_pieces = exporter.module.pieces(self.source, exporter.options)
        if not self.done:
            for place in (self.directory, self._partial):
                ownership.refuse_to_replace(place, [newest])
            self._measured = model_card.results(run, self.source.manifest)
            self.source.refuse_misfit()
            preflight.refuse_damaged(newest, weights.check(self.source.weights))
            preflight.require_space(self.directory, sum(self.source.dense_bytes) + _ROOM)

    def _refuse_other(self) -> None:
        """Refuse to reuse an export that was made with other options or from another stage, or is damaged."""
        if not (self.directory / EXPORT).exists():
            raise BesaError(f"{self.directory} was not made by besa", "move it away, or name another --run")
        there = exports.read(self.directory)
        exports.refuse_changed(self.directory, there["files"])
        for name, now in {"stage": self.source.manifest["digest"], **self.record}.items():
            before = there["source"]["digest"] if name == "stage" else there["options"].get(name)
            if before != now:
                raise BesaError(
                    f"{self.directory} was made with other options: {name} {before}, now {now}",
                    "replace it with --restart",
                )

    @property
    def title(self) -> str:
        """One line that says what is about to be done."""
        return f"exporting {self.source.directory} as {self._exporter.name} to {self.directory}"

    def forecast(self) -> Forecast:
        """Forecast memory, disk and time by exporting the largest block and what belongs to no block.

        The files of the trial lie in the system's temporary directory, and are removed.

        Raises
        ------
        BesaError
            The export could not be written.
        """
        disk.require_writable(self.directory)
        rest, *blocks = self.source.weights.shards()
        started, largest = compute.age(), max(blocks, key=lambda path: path.stat().st_size)
        (seconds, size), (fixed, beside) = self._trial(rest, largest), self._trial(rest)
        others = len(blocks) - 1
        return Forecast(
            memory=compute.peak_resident(),
            phase="writing",
            disk=size + others * (size - beside),
            free=disk.free(self.directory),
            seconds=started + seconds + others * max(seconds - fixed, 0.0),
            blocks=len(blocks),
            left=len(blocks),
        )

    def _trial(self, *files: Path) -> tuple[float, int]:
        """Return seconds and bytes that an export of these files alone takes, digests included."""
        began = time.perf_counter()
        compute.map_large_tensors()
        with tempfile.TemporaryDirectory(prefix="besa-") as name:
            for _ in self._exporter.module.write(self.source.only(files), Path(name), self._exporter.options):
                compute.give_back_memory()
            made = [path for path in Path(name).rglob("*") if path.is_file()]
            for path in made:
                disk.sha256_file(path)
            return time.perf_counter() - began, sum(path.stat().st_size for path in made)

    def pieces(self) -> Generator[Piece, None, None]:
        """Write the export beside its final place, piece by piece."""
        if self.done:
            return
        self._begin()
        compute.map_large_tensors()
        linear_bytes = rounded = 0
        for piece in self._exporter.module.write(self.source, self._partial, self._exporter.options):
            linear_bytes += piece.linear_bytes
            rounded += piece.rounded_to_zero
            compute.give_back_memory()
            yield piece
        self._finish(linear_bytes, rounded)

    def _begin(self) -> None:
        """Make the partial directory and mark it as besa's, so that the next command may remove it after a kill."""
        small = [path.name for path in self.source.directory.iterdir()]
        files: dict[str, JsonObject] = {name: {} for own in small for name in (own, f"{STAGE_FILES}/{own}")}
        started = {"format": FORMAT, "command": "export", "status": "running", "files": files}
        swap.begin_partial(self._partial, EXPORT, started)

    def _finish(self, linear_bytes: int, rounded: int) -> None:
        stored = _sizes(self._partial, ".safetensors", ".gguf", zstd.SUFFIX)
        dense_linears, dense = self.source.dense_bytes
        sizes: exports.Sizes = {
            "linears": linear_bytes,
            "linears_dense": dense_linears,
            "weights": stored,
            "weights_dense": dense,
            "rounded_to_zero": rounded,
        }
        stage = self.source.manifest
        model = {name: value for name, value in stage["model"].items() if name != "directory"}
        record: exports.ExportRecord = {
            "format": FORMAT,
            "command": "export",
            "options": self.record,
            "source": {"stage": stage["stage"], "digest": stage["digest"]},
            "model": cast("exports.ExportModel", model),
            "versions": manifests.versions(),
            "status": "complete",
            "counts": stage["counts"],
            "sizes": sizes,
            "history": [*stage["history"], _step(stage)],
        }
        record = redaction.value(record)
        self._keep_private()
        text = model_card.text(
            record,
            model_card.origin(self._run, stage),
            self._measured,
            self._exporter.module.loading(self._exporter.options),
        )
        disk.publish(self._partial / model_card.FILE, lambda path: _write(path, text.encode()))
        files = {
            str(path.relative_to(self._partial)): _flushed(path)
            for path in sorted(self._partial.rglob("*"))
            if path.is_file() and path != self._partial / EXPORT
        }
        disk.write_json(self._partial / EXPORT, {**record, "files": files})
        swap.replace_stage(self.directory, self._partial)

    def _keep_private(self) -> None:
        """Remove paths of this machine from the files; the originals are kept beside the export, for its import."""
        place = private(self.directory)
        ownership.refuse_to_replace(place)
        ownership.remove(place)
        for path, before in redaction.rewrite(self._partial):
            if path.parent.name == STAGE_FILES:
                disk.publish(place / path.name, lambda kept, before=before: _write(kept, before))  # type: ignore[misc]

    def finish(self) -> exports.Manifest:
        """Return the manifest of the finished export."""
        return exports.read(self.directory)


def _step(manifest: manifests.StageManifest) -> manifests.StageHistory:
    return {
        "stage": manifest["stage"],
        "command": manifest["command"],
        "options": manifest["options"],
        "versions": manifest["versions"],
        "digest": manifest["digest"],
    }


def _sizes(directory: Path, *endings: str) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.suffix in endings)


def _flushed(path: Path) -> exports.File:
    """Return a file's size and digest after flushing it, so that a power cut leaves no export without its content."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": disk.sha256_file(path)}


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
