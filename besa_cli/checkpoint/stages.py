"""A stage: a complete Hugging Face checkpoint, one shard a block, while it is written or read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from besa_cli import disk, weights
from besa_cli.checkpoint import manifests
from besa_cli.checkpoint.copying import copy_small_files
from besa_cli.errors import BesaError
from besa_cli.ops import affine
from besa_cli.ops.affine import Grid
from besa_cli.reports import BlockReport, LinearReport

TIMING = "timing.jsonl"
STAGES = ("pruned", "quantized")  # in the order in which they are made
_CODES = "codes"  # the folder of a quantized stage that holds what its weights were made from


class Stage:
    """One stage directory while it is written or read, a shard a block.

    A block counts as finished when its shard is there under its own name; the block's report lies beside it and is
    written first.

    Parameters
    ----------
    directory : Path
    blocks : int
        Number of blocks of the model.
    """

    def __init__(self, directory: Path, blocks: int) -> None:
        self.directory = directory
        self.blocks = blocks
        self._seen: set[int] = set()  # blocks that were written or read whole in this process

    def shard(self, index: int) -> Path:
        """The shard of block `index`; −1 is what belongs to no block."""
        return self.directory / f"model-{index + 2:05d}-of-{self.blocks + 1:05d}.safetensors"

    def finished(self) -> int:
        """How many blocks are on disk, from the first on without a gap."""
        return next((index for index in range(self.blocks) if not self.shard(index).exists()), self.blocks)

    def read(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block, by checkpoint name; its codes are looked at, too.

        Raises
        ------
        BesaError
            They are not those that were written, or the codes are not or are missing.
        """
        tensors = self._checked(self.shard(index), index, "digest")
        self.codes(index)
        self._seen.add(index)
        return tensors

    def read_some(self, index: int, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Those tensors of a finished block whose names are wanted, not compared with what was written."""
        return weights.read_file(self.shard(index), wanted)

    def _checked(self, path: Path, index: int, key: str) -> dict[str, Tensor]:
        """What a file holds, compared with the digest in the report of its block; older reports have none."""
        tensors = weights.read_file(path)
        written = self._record(index).get(key)
        if written not in (None, weights.digest(tensors)):
            raise _damaged(path, self.shard(index))
        return tensors

    def _record(self, index: int) -> dict[str, Any]:
        return disk.read_json(self._report(index))

    def _report(self, index: int) -> Path:
        return self.shard(index).with_suffix(".json")

    def codes(self, index: int) -> dict[str, Tensor]:
        """Codes, scales and zero points of a finished block, see `affine.tensors`; none where it is not quantized.

        Raises
        ------
        BesaError
            They are missing, or not those that were written.
        """
        return self._checked(self._codes(index), index, "codes_digest") if self._has_codes(index) else {}

    def code_names(self, index: int) -> list[str]:
        """The names of the tensors that `codes` reads."""
        return list(weights.header(self._codes(index))) if self._has_codes(index) else []

    def _codes(self, index: int) -> Path:
        return self.directory / _CODES / self.shard(index).name

    def _has_codes(self, index: int) -> bool:
        """Whether the block has codes; older reports do not say."""
        path = self._codes(index)
        if path.exists():
            return True
        if "codes_digest" in self._record(index):
            raise BesaError(f"{path} is missing", _made_anew(self.shard(index)))
        return False

    def report(self, index: int) -> BlockReport:
        """The report of a finished block."""
        record = self._record(index)
        for key in ("digest", "codes_digest"):
            record.pop(key, None)
        return BlockReport.from_record(record)

    def reports(self) -> Iterator[BlockReport]:
        """The reports of all finished blocks."""
        return (self.report(index) for index in range(self.finished()))

    def write(self, report: BlockReport, tensors: Mapping[str, Tensor], codes: Mapping[str, Tensor]) -> None:
        """Put a block's report, codes and tensors on disk, the shard last."""
        digests = {"digest": weights.digest(tensors)} | ({"codes_digest": weights.digest(codes)} if codes else {})
        disk.write_json(self._report(report.index), {**report.record(), **digests})
        if codes:
            self._codes(report.index).parent.mkdir(exist_ok=True)
            self._save(self._codes(report.index), codes)
        self._save(self.shard(report.index), tensors)
        self._seen.add(report.index)

    def write_rest(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the tensors that belong to no block on disk."""
        self._save(self.shard(-1), tensors)

    def check_rest(self, digest: str) -> None:
        """Compare the tensors that belong to no block, which are on disk, with the digest of the model's.

        Raises
        ------
        BesaError
            They are others.
        """
        if weights.digest(weights.read_file(self.shard(-1))) != digest:
            raise _damaged(self.shard(-1), self.shard(-1))

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        disk.publish(path, lambda temporary: disk.save_tensors(temporary, tensors))

    def begin(self, manifest: Mapping[str, Any], source: Path) -> None:
        """Make the directory: the manifest that says whose it is, configuration and tokenizer files of the source."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise BesaError(f"cannot make {self.directory}: {reason}", "name another directory with --run") from error
        disk.write_json(self.directory / manifests.MANIFEST, {**manifest, "status": "beginning", "blocks": self.blocks})
        copy_small_files(source, self.directory)
        disk.write_json(self.directory / manifests.MANIFEST, {**manifest, "status": "running", "blocks": self.blocks})

    def finish(self) -> dict[str, Any]:
        """Write the index, then the manifest with what was reached; returns the manifest.

        Raises
        ------
        BesaError
            A block that another process wrote is not what it was.
        """
        for index in set(range(self.blocks)) - self._seen:
            self.read(index)
        table, total = {}, 0
        for index in range(-1, self.blocks):
            shard = self.shard(index)
            for name, size in weights.header(shard).items():
                table[name] = shard.name
                total += size
        index_file = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        disk.write_json(self.directory / weights.INDEX, index_file)
        linears = [linear for report in self.reports() for linear in report.linears]
        counts: dict[str, float] = {
            "weights": sum(linear.rows * linear.cols for linear in linears),
            "pruned": sum(linear.pruned for linear in linears),
            "zeros": sum(linear.zeros for linear in linears),
            "blocks_kept_uniform": sum(report.kept_uniform for report in self.reports()),
        }
        counts["sparsity"] = counts["pruned"] / max(counts["weights"], 1)
        manifest = disk.read_json(self.directory / manifests.MANIFEST)
        manifest.pop("restart", None)
        if "quantization" in manifest:
            counts |= _grid_counts(linears, Grid(**manifest["quantization"]))
        manifest |= {"status": "complete", "counts": counts, "digest": weights.check(weights.Weights(self.directory))}
        disk.write_json(self.directory / manifests.MANIFEST, manifest)
        return manifest


def _damaged(path: Path, shard: Path) -> BesaError:
    return BesaError(f"{path} is damaged: it does not hold what was written", _made_anew(shard))


def _made_anew(shard: Path) -> str:
    return f"delete {shard}; in an unfinished stage the same command makes it anew, else give --restart"


def _grid_counts(linears: Sequence[LinearReport], grid: Grid) -> dict[str, float]:
    """What a grid adds to a stage's counts."""
    weights = sum(linear.rows * linear.cols for linear in linears)
    needed = sum(affine.bits_needed(each.rows, each.cols, each.rows * each.cols - each.zeros, grid) for each in linears)
    return {
        "rounded_to_zero": sum(linear.zeros - linear.pruned for linear in linears),
        "groups": sum(linear.rows * grid.groups(linear.cols) for linear in linears),
        "bits": needed,
        "bits_per_weight": needed / max(weights, 1),
    }


def finished(directory: Path) -> dict[str, Any]:
    """The manifest of a finished stage.

    Raises
    ------
    BesaError
        The stage is unfinished; the hint names the command that continues it.
    """
    manifest = manifests.read(directory)
    if manifest.get("status") != "complete":
        stage = Stage(directory, int(manifest.get("blocks", 0)))
        raise BesaError(
            f"{directory} is unfinished: {stage.finished()} of {stage.blocks} blocks are done",
            f"run the same 'besa {manifest.get('command', 'prune')}' again to finish it",
        )
    return manifest


def sweep(directory: Path) -> None:
    """Remove what a killed process left of files that it had not finished."""
    for pattern in (".*.partial", f"{_CODES}/.*.partial"):
        for left in directory.glob(pattern):
            left.unlink(missing_ok=True)
