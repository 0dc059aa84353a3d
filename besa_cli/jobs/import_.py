"""Imports: the stage that a sparse export was made from, restored byte for byte."""

from collections.abc import Generator, Mapping
from pathlib import Path

from torch import Tensor

from besa_cli.checkpoint import manifests, ownership, preflight, sparse_format, stages, swap, weights, zstd
from besa_cli.checkpoint.manifests import MANIFEST
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import CODES
from besa_cli.errors import BesaError
from besa_cli.exporters.opened import Opened
from besa_cli.exporters.source import StageSource
from besa_cli.system import compute, disk

_ROOM = 1 << 20  # bytes beside the weights, a block: headers, reports


class ImportJob:
    """One import of a sparse export; making the job only checks, `shards` does the work.

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
        It is no sparse export, a file is missing or damaged (named), or what is in the place is another stage, damaged,
        or not besa's.
    """

    def __init__(self, export: Path, run: Run, *, restart: bool = False) -> None:
        self._opened = Opened(export)
        self._manifest = self._opened.manifest
        name = self._manifest["stage"]
        self.directory = run.stage(name)
        self._partial = run.path / f".{name}.partial"
        swap.recover(self.directory, run.next_stage(name))
        self.done = self.directory.exists() and not restart
        if self.done:
            self._refuse_other()
        else:
            for place in (self.directory, self._partial):
                ownership.refuse_to_replace(place, [export])
            self._small = self._opened.small_files()
            room = _ROOM * (self._opened.blocks + 1)
            preflight.require_space(self._partial, self._opened.total + self._opened.index.total + room)
        self.number_of_shards = len(self._opened.files)

    def _refuse_other(self) -> None:
        """Refuse to reuse a stage that is not the one in the export, or is damaged."""
        if not (self.directory / MANIFEST).exists():
            raise BesaError(
                f"{self.directory} was not made by besa: it has no {MANIFEST}",
                "move it away, or name another run directory with --run",
            )
        there = manifests.is_complete(self.directory) and stages.require_finished(self.directory)["digest"]
        if there != self._manifest["digest"]:
            raise BesaError(
                f"{self.directory} is another stage than the one in {self._opened.directory}",
                "name another run directory with --run, or replace it with --restart",
            )
        preflight.refuse_damaged(self.directory, weights.check(weights.Weights(self.directory)))
        self._check_blocks(self.directory)

    def shards(self) -> Generator[str, None, None]:
        """Expand file by file beside the final place; yield the name of each."""
        if self.done:
            return
        started = {**self._manifest, "status": "beginning", "files": list(self._small)}  # says whose the directory is
        swap.begin_partial(self._partial, MANIFEST, started)
        for name in self._small:
            if name != MANIFEST:
                self._write(name)
        compute.map_large_tensors()
        for shard, file in self._opened.files.items():
            self._expand(file, self._partial / shard)
            compute.give_back_memory()
            yield shard
        self._write(MANIFEST)
        self._require_stage()
        swap.replace_stage(self.directory, self._partial)

    def _write(self, name: str) -> None:
        disk.publish(self._partial / name, lambda place: _write(place, self._small[name]))

    def _expand(self, file: str, target: Path) -> None:
        stored = self._read(file)
        source = self._opened.directory / file
        dense = sparse_format.dense_bytes(stored)
        if dense > self._opened.total:
            raise BesaError(
                f"{source} is damaged: its weights are {dense} bytes, those of the stage {self._opened.total} in all",
                "export it again",
            )
        codes = sparse_format.codes(stored, str(source))
        if codes and "quantization" not in self._manifest:
            raise BesaError(f"{source} holds codes, but its stage is not quantized", "export it again")
        if codes:
            disk.publish(target.parent / CODES / target.name, lambda temporary: disk.save_tensors(temporary, codes))
        tensors = sparse_format.decoded(stored, str(source))
        self._require_names(tensors, target.name)
        disk.publish(target, lambda temporary: disk.save_tensors(temporary, tensors))

    def _require_names(self, tensors: Mapping[str, Tensor], shard: str) -> None:
        odd = set(tensors) ^ self._opened.names[shard]
        if odd:
            raise BesaError(
                f"{self._opened.directory / self._opened.files[shard]} does not hold what the stage's own index says: "
                f"they differ about {min(odd)}",
                "export it again",
            )

    def _read(self, file: str) -> dict[str, Tensor]:
        """Return the parts in one file of the export, checked as far as possible without expanding any."""
        source = self._opened.index.check(file)
        if source.suffix != zstd.SUFFIX:
            self._opened.index.require_names(source, file)
            return weights.read_file(source)
        plain = self._opened.index.expand(source, self._partial)
        try:
            self._opened.index.require_names(plain, file)
            return weights.read_file(plain)
        finally:
            plain.unlink()

    def _require_stage(self) -> None:
        """Check that the expanded files are the stage, as a whole and block by block."""
        found = weights.check(weights.Weights(self._partial))
        if found != self._manifest["digest"]:
            raise BesaError(
                f"{self._opened.directory} does not give its stage back: content digest {found[:12]}, "
                f"not {self._manifest['digest'][:12]}",
                "export it again",
            )
        self._check_blocks(self._partial)

    def _check_blocks(self, directory: Path) -> None:
        stage = self._opened.stage(directory)
        for index in range(stage.blocks):
            stage.read(index)
            compute.give_back_memory()
        StageSource(directory)  # its linears are where the reports say, and as many as the manifest counts

    def finish(self) -> manifests.StageManifest:
        """Return the manifest of the stage."""
        return stages.require_finished(self.directory)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
