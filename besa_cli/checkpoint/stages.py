"""Stages: complete Hugging Face checkpoints with one shard per block, written and read block by block."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor

from besa_cli.checkpoint import manifests, sealed, weights
from besa_cli.checkpoint.copying import copy_small_files, small_files
from besa_cli.checkpoint.reports import BlockReport, LinearReport
from besa_cli.errors import BesaError
from besa_cli.models import headers
from besa_cli.ops import affine, masks
from besa_cli.ops.affine import Grid
from besa_cli.system import disk, records
from besa_cli.system.disk import Json

TIMING = "timing.jsonl"
SENSITIVITY = "sensitivity.safetensors"  # of the channels; only until the stage is finished
STAGES: tuple[manifests.StageName, ...] = ("pruned", "tuned", "quantized")  # in the order in which they are made
DRAFT = "draft"  # folder of an unfinished stage with its blocks as they were pruned one after the other
RATES = "rates.safetensors"  # file in it: the state of the learning of the whole model
TUNING = "tuning"  # folder of an unfinished stage with the states of the tuning
PROGRESS = "progress.safetensors"  # file of each of them that is written last: a state with it is whole
HELD_OUT = "held-out.streams"  # state of the check on held-out samples, beside blocks that are pruned
CODES = "codes"  # folder of a quantized stage with the codes, scales and zero points of its weights


class Stage:
    """A stage directory that is written and read with one shard per block.

    A block is finished when its shard exists under its final name; the block's report is a file beside it and is
    written first.

    Parameters
    ----------
    directory : Path
    blocks : int
        Number of blocks of the model.
    home : Path, optional
        Directory with the manifest; `directory` by default.
    """

    def __init__(self, directory: Path, blocks: int, *, home: Path | None = None) -> None:
        self.directory = directory
        self._home = home or directory
        self.blocks = blocks
        self._verified: set[int] = set()  # blocks that this process wrote, or read and compared with their digests

    def shard(self, index: int) -> Path:
        """Return the path of the shard of block `index`; −1 is the shard of tensors outside the blocks."""
        return self.directory / f"model-{index + 2:05d}-of-{self.blocks + 1:05d}.safetensors"

    def finished(self) -> int:
        """Return the number of finished blocks, counted from the first up to the first gap."""
        return next((index for index in range(self.blocks) if not self.shard(index).exists()), self.blocks)

    def read(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of a finished block, by checkpoint name, and verify them and the block's codes.

        Raises
        ------
        BesaError
            Tensors or codes differ from those that were written, or are missing.
        """
        tensors = self._checked(self.shard(index), index, "digest")
        self._require_counts(index, tensors)
        self.codes(index)
        self._verified.add(index)
        return tensors

    def names(self, index: int) -> list[str]:
        """List the names of the tensors of a finished block."""
        return list(weights.tensor_sizes(self.shard(index)))

    def read_some(self, index: int, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Read the tensors of a finished block whose names are wanted, without verifying them."""
        return weights.read_file(self.shard(index), wanted)

    def _checked(self, path: Path, index: int, key: Literal["digest", "codes_digest"]) -> dict[str, Tensor]:
        """Read a file and compare its tensors with the digest in the block's report."""
        tensors = weights.read_file(path)
        if getattr(self._record(index), key) != weights.digest(tensors):
            raise _damaged(path, self.shard(index))
        return tensors

    def _record(self, index: int) -> "_Record":
        """Read the report of a block from disk; refuse that of another block, and one that was changed."""
        path = self._report(index)
        text = disk.read_text(path)
        record = records.parse(_Record, text, path, _remedy(self.shard(index)))
        problem = record.problem or (f"block {record.index}" if record.index != index else "")
        if not problem and record.blocks != self.blocks:
            problem = f"{record.blocks} blocks"
        if problem:
            raise BesaError(
                f"{path}, the report of block {index} of {self.blocks}, describes {problem}", _remedy(self.shard(index))
            )
        unsealed = record.seal is None and not self._sealed
        if not unsealed and record.seal != _seal(disk.parse_json(text, path)):
            raise BesaError(f"{path} was changed since it was written", _remedy(self.shard(index)))
        return record

    @cached_property
    def _sealed(self) -> bool:
        """True if the reports have a seal; those of old stages, whose manifest names no processor, have none."""
        return "processor" in manifests.read_stage(self._home)["compute"]

    def _report(self, index: int) -> Path:
        return self.shard(index).with_suffix(".json")

    def codes(self, index: int) -> dict[str, Tensor]:
        """Read codes, scales and zero points of a finished block (`affine.to_tensors`); empty if it is not quantized.

        Raises
        ------
        BesaError
            They are missing, or differ from those that were written.
        """
        return self._checked(self._codes(index), index, "codes_digest") if self._has_codes(index) else {}

    def _require_counts(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Compare the zeros counted in each linear with those in the block's report."""
        for linear in self._record(index).linears:
            place = linear.place(index, tensors)
            if place is None:  # of an older stage whose checkpoint and model use different names
                continue
            matrix = place.of(tensors)
            zeros, shape = masks.count_zeros(matrix), tuple(matrix.shape)
            if (zeros, shape) != (linear.zeros, (linear.rows, linear.cols)):
                raise BesaError(
                    f"{self._report(index)} states {linear.zeros} zeros in {linear.name} ({linear.rows} x "
                    f"{linear.cols}), its shard holds {zeros} in {' x '.join(map(str, shape))}",
                    _remedy(self.shard(index)),
                )

    def code_names(self, index: int) -> list[str]:
        """List the names of the tensors that `codes` reads."""
        return list(weights.tensor_sizes(self._codes(index))) if self._has_codes(index) else []

    def _codes(self, index: int) -> Path:
        return self.directory / CODES / self.shard(index).name

    def _has_codes(self, index: int) -> bool:
        """Return True if the block's report lists codes, whose file must then exist; other codes are ignored."""
        path, has_codes = self._codes(index), self._record(index).codes_digest is not None
        if has_codes and not path.exists():
            raise BesaError(f"{path} is missing", _remedy(self.shard(index)))
        return has_codes

    def report(self, index: int) -> BlockReport:
        """Read the report of a finished block."""
        record = self._record(index)
        values = {field.name: getattr(record, field.name) for field in fields(BlockReport)}
        return BlockReport(**values | {"resumed": True})

    def reports(self) -> Iterator[BlockReport]:
        """Read the reports of all finished blocks."""
        return (self.report(index) for index in range(self.finished()))

    def write(
        self,
        report: BlockReport,
        tensors: Mapping[str, Tensor],
        codes: Mapping[str, Tensor],
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a block's report, codes and tensors, the shard last; then the `state` of the check on held-out samples.

        A state that is stored thus never is ahead of the blocks.
        """
        digests = {"digest": weights.digest(tensors)} | ({"codes_digest": weights.digest(codes)} if codes else {})
        record = {**report.record(), **digests}
        disk.write_json(self._report(report.index), {**record, "seal": _seal(record)})
        if codes:
            self._codes(report.index).parent.mkdir(exist_ok=True)
            self._save(self._codes(report.index), codes)
        self._save(self.shard(report.index), tensors)
        self._verified.add(report.index)
        if state is not None:
            sealed.write(self.directory / HELD_OUT, state)

    def read_state(self) -> dict[str, Tensor]:
        """Read the state of the check on held-out samples that was written last; empty if there is none.

        Raises
        ------
        BesaError
            It differs from what was written.
        """
        path = self.directory / HELD_OUT
        return sealed.read(path, f"delete {path}; the same command then computes all blocks again")

    def write_held_out(self, figures: manifests.HeldOut) -> None:
        """Write the result of the check on held-out samples into the manifest."""
        manifest = manifests.read_stage(self._home)
        disk.write_json(self._home / manifests.MANIFEST, {**manifest, "held_out": figures})

    def write_rest(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors that belong to no block."""
        self._save(self.shard(-1), tensors)

    def check_rest(self, digest: str) -> None:
        """Compare the stored tensors that belong to no block with the digest of the model's.

        Raises
        ------
        BesaError
            The digests differ.
        """
        if weights.digest(weights.read_file(self.shard(-1))) != digest:
            raise _damaged(self.shard(-1), self.shard(-1))

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        disk.publish(path, lambda temporary: disk.save_tensors(temporary, tensors))

    def require_whole(self) -> None:
        """Refuse a finished stage whose shards hold other tensors than its index lists, or whose reports were changed.

        The values of the tensors are compared by the digest in the manifest, see `preflight.refuse_damaged`.

        Raises
        ------
        BesaError
            A shard, a report or a file of codes is missing, or belongs to another block.
        """
        table = weights.listed(self.directory)
        for index in range(-1, self.blocks):
            shard = self.shard(index)
            expected = {name for name, file in table.items() if file == shard.name}
            if weights.tensor_sizes(shard).keys() != expected:
                raise BesaError(f"{shard} holds other tensors than {headers.INDEX} lists", _remedy(shard))
            if index >= 0:
                self.codes(index)

    def begin(self, manifest: Json, source: Path, changed: Mapping[str, Json] | None = None) -> None:
        """Create the directory with its manifest, and copy the configuration and tokenizer files of the source.

        JSON files named in `changed` get these contents instead of the source's.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise BesaError(f"cannot make {self.directory}: {reason}", "name another directory with --run") from error
        manifest = {**manifest, "blocks": self.blocks, "files": small_files(source)}
        disk.write_json(self.directory / manifests.MANIFEST, {**manifest, "status": "beginning"})
        copy_small_files(source, self.directory, changed)
        disk.write_json(self.directory / manifests.MANIFEST, {**manifest, "status": "running"})

    def record_budgets(self, budgets: manifests.BlockBudgets) -> None:
        """Add the budgets of all blocks to the manifest of a stage that has begun."""
        self._record_fields({"block_budgets": budgets})

    def record_experts(self, experts: manifests.KeptExperts) -> None:
        """Add the experts that stay to the manifest of a stage that has begun."""
        self._record_fields({"experts": experts})

    def _record_fields(self, fields: Json) -> None:
        manifest = manifests.read_stage(self.directory)
        disk.write_json(self.directory / manifests.MANIFEST, {**manifest, **fields})

    def finish(self, added: manifests.AddedFields | None = None) -> manifests.StageManifest:
        """Write the index, then the manifest with counts, digest and the fields `added`; returns the manifest.

        Raises
        ------
        BesaError
            A block that another process wrote has changed since.
        """
        for index in set(range(self.blocks)) - self._verified:
            self.read(index)
        (self.directory / SENSITIVITY).unlink(missing_ok=True)
        table, total = {}, 0
        for index in range(-1, self.blocks):
            shard = self.shard(index)
            for name, size in weights.tensor_sizes(shard).items():
                table[name] = shard.name
                total += size
        index_file = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        disk.write_json(self.directory / headers.INDEX, index_file)
        linears = [linear for report in self.reports() for linear in report.linears]
        size, pruned = sum(linear.rows * linear.cols for linear in linears), sum(linear.pruned for linear in linears)
        counts: manifests.Counts = {
            "weights": size,
            "pruned": pruned,
            "zeros": sum(linear.zeros for linear in linears),
            "blocks_kept_uniform": sum(report.kept_uniform for report in self.reports()),
            "sparsity": pruned / max(size, 1),
        }
        manifest = manifests.read_stage(self.directory)
        manifest.pop("restart", None)
        if "quantization" in manifest:
            counts = {**counts, **_grid_counts(linears, Grid(**manifest["quantization"]))}
        unreached = sum(linear.unreached for linear in linears)
        if unreached:
            counts["unreached"] = unreached
        if added and "whole_model" in added:
            manifest["whole_model"] = added["whole_model"]
        if added and "held_out" in added:
            manifest["held_out"] = added["held_out"]
        (self.directory / HELD_OUT).unlink(missing_ok=True)
        manifest |= {"status": "complete", "counts": counts, "digest": weights.check(weights.Weights(self.directory))}
        disk.write_json(self.directory / manifests.MANIFEST, manifest)
        return manifest


@records.strict
@dataclass(frozen=True, kw_only=True)
class _Record(BlockReport):
    """A block's report on disk: with the digests of the block's tensors and codes, and a digest of the report."""

    digest: manifests.Digest
    codes_digest: manifests.Digest | None = None
    seal: manifests.Digest | None = None


def _seal(record: Json) -> str:
    """Return the SHA-256 of a report without its seal; it ties block, counts and digests together."""
    sealed = {name: value for name, value in record.items() if name != "seal"}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, shard: Path) -> BesaError:
    return BesaError(f"{path} is damaged: it does not hold what was written", _remedy(shard))


def _remedy(shard: Path) -> str:
    return f"delete {shard}; in an unfinished stage the same command makes it again, else give --restart"


def _grid_counts(linears: Sequence[LinearReport], grid: Grid) -> manifests.GridCounts:
    """Return the additional counts of a quantized stage."""
    weights = sum(linear.rows * linear.cols for linear in linears)
    needed = sum(
        affine.bits_needed(linear.rows, linear.cols, linear.rows * linear.cols - linear.zeros, grid)
        for linear in linears
    )
    return {
        "rounded_to_zero": sum(linear.zeros - linear.pruned for linear in linears),
        "groups": sum(linear.rows * grid.groups(linear.cols) for linear in linears),
        "bits": needed,
        "bits_per_weight": needed / max(weights, 1),
    }


def require_finished(directory: Path) -> manifests.StageManifest:
    """Read the manifest of a stage, which must be finished.

    Raises
    ------
    BesaError
        The stage is unfinished; the hint names the command that resumes it.
    """
    manifest = manifests.read_stage(directory)
    if manifest["status"] != "complete":
        stage = Stage(directory, manifest["blocks"])
        raise BesaError(
            f"{directory} is unfinished: {stage.finished()} of {stage.blocks} blocks are done",
            f"run the same 'besa {manifest['command']}' again to finish it",
        )
    return manifest


def sweep(directory: Path) -> None:
    """Remove the partial files that a killed process left."""
    for pattern in (".*.partial", f"{CODES}/.*.partial", f"{DRAFT}/.*.partial"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


def drop_draft(directory: Path) -> None:
    """Remove the blocks that the whole model learned from, once the stage is finished."""
    draft = directory / DRAFT
    if draft.is_dir():
        for pattern in (RATES, HELD_OUT, "model-*.safetensors", "model-*.json"):
            for path in draft.glob(pattern):
                path.unlink(missing_ok=True)
        if not any(draft.iterdir()):
            draft.rmdir()
