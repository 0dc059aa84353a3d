"""From a sparse export back to the stage that it was made from, byte for byte."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from besa_cli import compression, compute, disk, sparse, weights
from besa_cli.checkpoint import exchange, manifests, stages
from besa_cli.checkpoint.manifests import MANIFEST
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import STAGES
from besa_cli.errors import BesaError
from besa_cli.exporters.sparse import STAGE_FILES, shard_name
from besa_cli.exporters.stage import CODES
from besa_cli.sparse import INDEX


class Job:
    """One import: everything is checked when it is made, `shards` does the work.

    Parameters
    ----------
    export : Path
        The directory of a sparse export.
    run : Run
        Where the stage is to be; its lock is held by the caller.
    restart : bool
        Replace a stage that is there, when this one is whole.

    Raises
    ------
    BesaError
        It is no sparse export, a file is missing or damaged (named), or another stage is in the place.
    """

    def __init__(self, export: Path, run: Run, *, restart: bool = False) -> None:
        self._export = export
        if not (export / INDEX).is_file() or not (export / STAGE_FILES / MANIFEST).is_file():
            raise BesaError(
                f"{export} is no whole sparse export: it lacks {INDEX} or {STAGE_FILES}/{MANIFEST}",
                "name a directory that `besa export --format sparse` made",
            )
        _require_stage_files(export)
        self._manifest = stages.finished(export / STAGE_FILES)
        name = str(self._manifest["stage"])
        if name not in STAGES:
            raise BesaError(f"{export} holds a stage '{name}' that this besa does not know", "install a newer besa")
        self._digests: dict[str, str] = disk.read_json(export / INDEX)["metadata"]["sha256"]
        self.directory = run.stage(name)
        self._partial = run.path / f".{name}.partial"
        self.done = False
        if self.directory.exists() and not restart:
            there = manifests.is_complete(self.directory) and stages.finished(self.directory)["digest"]
            if there != self._manifest["digest"]:
                raise BesaError(
                    f"{self.directory} is another stage than the one in {export}",
                    "name another run directory with --run, or replace it with --restart",
                )
            self.done = True
        self.number_of_shards = len(self._digests)

    def shards(self) -> Iterator[str]:
        """Expand file after file beside the final place; yields the name of each."""
        if self.done:
            return
        shutil.rmtree(self._partial, ignore_errors=True)
        try:
            shutil.copytree(self._export / STAGE_FILES, self._partial)
        except OSError as error:
            raise BesaError(f"cannot make {self._partial}: {error}", "name another --run") from error
        names = {shard_name(path.name): path.name for path in _shards(self._partial)}
        files = {name.removesuffix(compression.SUFFIX): name for name in self._digests}
        if set(names) != set(files):
            odd = min(set(names) ^ set(files))
            raise BesaError(f"{self._export / INDEX} and the stage's own index differ about {odd}", "export it anew")
        compute.map_large_tensors()
        for file, name in names.items():
            self._expand(self._export / files[file], self._partial / name)
            compute.give_back_memory()
            yield name
        found = weights.check(weights.Weights(self._partial))
        if found != self._manifest["digest"]:
            raise BesaError(
                f"{self._export} does not give its stage back: content digest {found[:12]}, "
                f"not {self._manifest['digest'][:12]}",
                "export it anew",
            )
        exchange.replace_stage(self.directory, self._partial)

    def _expand(self, source: Path, target: Path) -> None:
        stored = self._read(source)
        if disk.sha256_file(source) != self._digests[source.name]:
            raise BesaError(f"{source} is damaged: its SHA-256 is not the one in {INDEX}", "fetch the file again")
        codes = sparse.codes(stored, str(source))
        if codes:
            disk.publish(target.parent / CODES / target.name, lambda temporary: disk.save_tensors(temporary, codes))
        tensors = sparse.decoded(stored, str(source))
        disk.publish(target, lambda temporary: disk.save_tensors(temporary, tensors))

    def _read(self, source: Path) -> dict[str, Tensor]:
        if source.suffix != compression.SUFFIX:
            return weights.read_file(source)
        plain = compression.expand(source, self._partial)
        try:
            return weights.read_file(plain)
        finally:
            plain.unlink()

    def finish(self) -> dict[str, Any]:
        """The manifest of the stage."""
        return stages.finished(self.directory)


def _require_stage_files(export: Path) -> None:
    """Refuse a small file of the stage that is not what the export's own manifest says; without one none is known."""
    manifest = export / manifests.EXPORT
    told = disk.read_json(manifest).get("files", {}) if manifest.exists() else {}
    for name, entry in told.items():
        path = export / name
        if name.startswith(f"{STAGE_FILES}/") and not (path.exists() and disk.sha256_file(path) == entry["sha256"]):
            raise BesaError(
                f"{path} is damaged or missing: its SHA-256 is not the one in {manifests.EXPORT}",
                "fetch the file again",
            )


def _shards(stage: Path) -> list[Path]:
    table = disk.read_json(stage / weights.INDEX)["weight_map"]
    return sorted({stage / str(name) for name in table.values()})
