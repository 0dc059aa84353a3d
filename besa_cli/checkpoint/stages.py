"""A stage: a complete Hugging Face checkpoint, one shard a block, while it is written or read."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from besa_cli.checkpoint import manifests, weights
from besa_cli.checkpoint.copying import copy_small_files, small_files
from besa_cli.checkpoint.reports import BlockReport, LinearReport
from besa_cli.errors import BesaError
from besa_cli.models import headers
from besa_cli.ops import affine, masks
from besa_cli.ops.affine import Grid
from besa_cli.system import disk, records

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
        self._require_counts(index, tensors)
        self.codes(index)
        self._seen.add(index)
        return tensors

    def read_some(self, index: int, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Those tensors of a finished block whose names are wanted, not compared with what was written."""
        return weights.read_file(self.shard(index), wanted)

    def _checked(self, path: Path, index: int, key: Literal["digest", "codes_digest"]) -> dict[str, Tensor]:
        """What a file holds, compared with the digest in the report of its block."""
        tensors = weights.read_file(path)
        if getattr(self._record(index), key) != weights.digest(tensors):
            raise _damaged(path, self.shard(index))
        return tensors

    def _record(self, index: int) -> "_Record":
        """The report of a block as it lies on the disk, which has to be that of this block and as it was written."""
        path = self._report(index)
        text = disk.read_text(path)
        record = records.parse(_Record, text, path, _made_anew(self.shard(index)))
        problem = record.problem or (f"block {record.index}" if record.index != index else "")
        if not problem and record.blocks != self.blocks:
            problem = f"{record.blocks} blocks"
        if problem:
            where = f"block {index} of {self.blocks}"
            raise BesaError(f"{path}, the report of {where}, tells of {problem}", _made_anew(self.shard(index)))
        unsealed = record.seal is None and not self._sealed
        if not unsealed and record.seal != _seal(disk.parse_json(text, path)):
            raise BesaError(f"{path} was changed since it was written", _made_anew(self.shard(index)))
        return record

    @cached_property
    def _sealed(self) -> bool:
        """Whether reports have a seal: those of stages of before, which do not name their processor, have none."""
        return "processor" in manifests.read(self.directory)["compute"]

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

    def _require_counts(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Compare the zeros of each linear, counted, with those that the block's report tells of."""
        for linear in self._record(index).linears:
            ending = f".{linear.name}.weight"
            found = [tensor for name, tensor in tensors.items() if f".{name}".endswith(ending)]
            if len(found) != 1:  # the checkpoint calls it otherwise than the model
                continue
            counted, shape = masks.count_zeros(found[0]), tuple(found[0].shape)
            if (counted, shape) != (linear.zeros, (linear.rows, linear.cols)):
                raise BesaError(
                    f"{self._report(index)} tells of {linear.zeros} zeros in {linear.name} ({linear.rows} x "
                    f"{linear.cols}), its shard holds {counted} in {' x '.join(map(str, shape))}",
                    _made_anew(self.shard(index)),
                )

    def code_names(self, index: int) -> list[str]:
        """The names of the tensors that `codes` reads."""
        return list(weights.header(self._codes(index))) if self._has_codes(index) else []

    def _codes(self, index: int) -> Path:
        return self.directory / _CODES / self.shard(index).name

    def _has_codes(self, index: int) -> bool:
        """Whether the block has codes, which then have to be there; codes that no report knows are not ours."""
        path, told = self._codes(index), self._record(index).codes_digest is not None
        if told and not path.exists():
            raise BesaError(f"{path} is missing", _made_anew(self.shard(index)))
        return told

    def report(self, index: int) -> BlockReport:
        """The report of a finished block."""
        found = self._record(index)
        told = {each.name: getattr(found, each.name) for each in fields(BlockReport)}
        return BlockReport(**told | {"resumed": True})

    def reports(self) -> Iterator[BlockReport]:
        """The reports of all finished blocks."""
        return (self.report(index) for index in range(self.finished()))

    def write(self, report: BlockReport, tensors: Mapping[str, Tensor], codes: Mapping[str, Tensor]) -> None:
        """Put a block's report, codes and tensors on disk, the shard last."""
        digests = {"digest": weights.digest(tensors)} | ({"codes_digest": weights.digest(codes)} if codes else {})
        record = {**report.record(), **digests}
        disk.write_json(self._report(report.index), {**record, "seal": _seal(record)})
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

    def require_whole(self) -> None:
        """Refuse a finished stage whose shards hold other tensors than its index lists, or whose reports are changed.

        The tensors themselves are compared by the digest in the manifest, see `refusals.refuse_damaged`.

        Raises
        ------
        BesaError
            A shard, a report or a file of codes is missing, or is that of another block.
        """
        table = weights.listed(self.directory)
        for index in range(-1, self.blocks):
            shard = self.shard(index)
            expected = {name for name, file in table.items() if file == shard.name}
            if weights.header(shard).keys() != expected:
                raise BesaError(f"{shard} holds other tensors than {headers.INDEX} lists", _made_anew(shard))
            if index >= 0:
                self.codes(index)

    def begin(self, manifest: Mapping[str, Any], source: Path) -> None:
        """Make the directory: the manifest that says whose it is, configuration and tokenizer files of the source."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise BesaError(f"cannot make {self.directory}: {reason}", "name another directory with --run") from error
        begun = {**manifest, "blocks": self.blocks, "files": small_files(source)}
        disk.write_json(self.directory / manifests.MANIFEST, {**begun, "status": "beginning"})
        copy_small_files(source, self.directory)
        disk.write_json(self.directory / manifests.MANIFEST, {**begun, "status": "running"})

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
        disk.write_json(self.directory / headers.INDEX, index_file)
        linears = [linear for report in self.reports() for linear in report.linears]
        counts: dict[str, float] = {
            "weights": sum(linear.rows * linear.cols for linear in linears),
            "pruned": sum(linear.pruned for linear in linears),
            "zeros": sum(linear.zeros for linear in linears),
            "blocks_kept_uniform": sum(report.kept_uniform for report in self.reports()),
        }
        counts["sparsity"] = counts["pruned"] / max(counts["weights"], 1)
        manifest = manifests.read(self.directory)
        manifest.pop("restart", None)
        if "quantization" in manifest:
            counts |= _grid_counts(linears, Grid(**manifest["quantization"]))
        manifest |= {"status": "complete", "counts": counts, "digest": weights.check(weights.Weights(self.directory))}
        disk.write_json(self.directory / manifests.MANIFEST, manifest)
        return manifest


@records.strict
@dataclass(frozen=True, kw_only=True)
class _Record(BlockReport):
    """A block's report on the disk: digests of the block's tensors and codes, and a digest of all that it says."""

    digest: manifests.Digest
    codes_digest: manifests.Digest | None = None
    seal: manifests.Digest | None = None


def _seal(record: Mapping[str, Any]) -> str:
    """SHA-256 over all that a report says, but for its seal: block, counts and digests belong together."""
    told = {name: value for name, value in record.items() if name != "seal"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


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
