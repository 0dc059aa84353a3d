"""The stage that is exported: its tensors, read a few at a time, and which of them are pruned linears."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from besa_cli.checkpoint import stages
from besa_cli.checkpoint.manifests import MANIFEST
from besa_cli.checkpoint.reports import BlockReport
from besa_cli.checkpoint.stages import Stage
from besa_cli.checkpoint.weights import Weights
from besa_cli.decoder import architecture, tensor_names
from besa_cli.errors import BesaError
from besa_cli.models.headers import INDEX, entries
from besa_cli.ops import affine
from besa_cli.ops.affine import Grid, Quantized
from besa_cli.system import disk

CODES = "codes"  # the directory of a quantized stage that holds the codes its weights were made from
STAGE_FILES = "stage"  # the directory of a sparse export in which the stage's own small files lie
DENSE_BITS = 16  # of a weight in the dense model that sizes are compared with


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step of an export has written.

    Attributes
    ----------
    linear_bytes : int
        Bytes that the linears among it take.
    rounded_to_zero : int
        Weights of linears that were not zero in the stage and are in the export.
    """

    linear_bytes: int = 0
    rounded_to_zero: int = 0


class StageSource:
    """A finished stage, opened for export.

    Parameters
    ----------
    directory : Path

    Raises
    ------
    BesaError
        The stage is unfinished or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = stages.require_finished(directory)
        self.weights = Weights(directory)
        self.stage = Stage(directory, int(self.manifest["blocks"]))
        self._require_shards()
        self.config: dict[str, Any] = disk.read_json(directory / "config.json")
        self._dtype: dict[str, str] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        for path in self.weights.shards():
            for name, entry in entries(path).items():
                self._dtype[name], self._shape[name] = entry["dtype"], tuple(entry["shape"])
        self.linears = set(self._find_linears())
        refuse_other_counts(directory, self.manifest["counts"], self.stage.reports())

    def _require_shards(self) -> None:
        """The index names a shard a block and one of the rest, no others."""
        files, blocks = set(self.weights.shards()), self.stage.blocks
        expected = {self.stage.shard(index) for index in range(-1, blocks)} if len(files) == blocks + 1 else set()
        if files != expected:
            raise BesaError(
                f"{self.directory / INDEX} does not name the shards of {blocks} blocks, as {MANIFEST} says",
                "make the stage anew with --restart",
            )

    def refuse_misfit(self) -> None:
        """Refuse a configuration that describes another model than the tensors are of: nothing would load the export.

        Raises
        ------
        BesaError
            It cannot be read, or gives another number of blocks or another shape.
        """
        model = architecture.skeleton(architecture.config_of(self.directory), torch.bfloat16)
        _, blocks = architecture.block_list(model)
        if len(blocks) != self.stage.blocks:
            raise BesaError(
                f"{self.directory / 'config.json'} describes {len(blocks)} blocks, the stage has {self.stage.blocks}",
                "restore the file, or make the stage anew with --restart",
            )
        tensor_names.reconcile(model, tensor_names.Names(model, self.weights.names), self.weights)

    def _find_linears(self) -> Iterator[str]:
        for report in self.stage.reports():
            stored = entries(self.stage.shard(report.index))
            for linear in report.linears:
                ending = f".{report.index}.{linear.name}.weight"
                name = next((name for name in stored if f".{name}".endswith(ending)), None)
                if name is None or stored[name]["shape"] != [linear.rows, linear.cols]:
                    raise BesaError(
                        f"{self.stage.shard(report.index)} does not hold {linear.name} as its report says",
                        "make the stage anew with --restart",
                    )
                yield name

    @property
    def names(self) -> list[str]:
        """All tensors, in the order of the stage's shards: what belongs to no block first, then block after block."""
        return [name for held in self.weights.shards().values() for name in held]

    def only(self, files: Iterable[Path]) -> "StageSource":
        """The same stage as if it had no other files of weights."""
        found = copy.copy(self)
        found.weights = self.weights.only(files)
        return found

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self.weights.read([name])[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._shape[name]

    def dtype(self, name: str) -> str:
        """The dtype of a tensor in the words of safetensors: ``BF16``."""
        return self._dtype[name]

    @property
    def grid(self) -> dict[str, Any] | None:
        """Of a quantized stage `bits`, `group_size` (None: all columns) and `symmetric`; else None."""
        found: dict[str, Any] | None = self.manifest.get("quantization")
        return found

    def coded(self, names: Sequence[str]) -> dict[str, Quantized]:
        """The codes of those among `names`, tensors of one file, that were quantized."""
        blocks = {self.stage.shard(index): index for index in range(self.stage.blocks)}
        block = blocks.get(self.weights.file(names[0]))
        if self.grid is None or block is None:
            return {}
        stored = self.stage.codes(block)
        grid = Grid(**{name: self.grid[name] for name in ("bits", "group_size", "symmetric")})
        linears = {name: name.removesuffix(".weight") for name in names if name in self.linears}
        return {
            name: affine.from_tensors(stored, prefix, grid)
            for name, prefix in linears.items()
            if f"{prefix}.codes" in stored
        }

    @property
    def linear_weights(self) -> int:
        """How many weights the linears have."""
        return sum(self._size(name) for name in self.linears)

    @property
    def dense_bytes(self) -> tuple[int, int]:
        """What the linears, and all tensors, take as bf16 without any packing."""
        total = sum(self._size(name) for name in self._shape)
        return self.linear_weights * DENSE_BITS // 8, total * DENSE_BITS // 8

    def _size(self, name: str) -> int:
        return int(torch.Size(self._shape[name]).numel())


def refuse_other_counts(directory: Path, counts: Mapping[str, Any], reports: Iterable[BlockReport]) -> None:
    """Refuse a stage whose manifest counts other weights than the reports of its blocks together.

    Parameters
    ----------
    directory : Path
        The stage's.
    counts : mapping
        Of its manifest.
    reports : iterable of BlockReport
        Of all its blocks.

    Raises
    ------
    BesaError
        They differ.
    """
    linears = [linear for report in reports for linear in report.linears]
    found = {
        "weights": sum(linear.rows * linear.cols for linear in linears),
        "pruned": sum(linear.pruned for linear in linears),
        "zeros": sum(linear.zeros for linear in linears),
    }
    for name, number in found.items():
        if counts[name] != number:
            raise BesaError(
                f"{directory / MANIFEST} counts {counts[name]} {name}, the reports of its blocks {number}",
                "make the stage anew with --restart",
            )


def private(export: Path) -> Path:
    """Where those small files of a stage are kept, beside a sparse export of it, that name paths on this machine."""
    return export.with_name(f".{export.name}.private")


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor in another dtype; any other as it is.

    Raises
    ------
    BesaError
        A value is too large for the dtype.
    """
    if not tensor.is_floating_point():
        return tensor
    found = tensor.to(dtype)
    if not bool(found.isfinite().all()):
        raise BesaError(
            f"{name} holds {float(tensor.abs().max()):g}, too large for {str(dtype).removeprefix('torch.')}",
            "export in bfloat16 or float32",
        )
    return found
