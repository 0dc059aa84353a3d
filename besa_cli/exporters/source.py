"""The stage to be exported: its tensors, read a few at a time, and the names of its pruned linears."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from besa_cli.checkpoint import stages
from besa_cli.checkpoint.manifests import MANIFEST, Counts, Quantization
from besa_cli.checkpoint.reports import BlockReport
from besa_cli.checkpoint.stages import Stage
from besa_cli.checkpoint.tensor_places import TensorPlace
from besa_cli.checkpoint.weights import Weights
from besa_cli.decoder import architecture, linears, tensor_names
from besa_cli.errors import BesaError
from besa_cli.models.headers import INDEX, entries
from besa_cli.ops import affine
from besa_cli.ops.affine import Grid, Quantized
from besa_cli.system import disk

STAGE_FILES = "stage"  # directory of a sparse export with the small files of the stage
DENSE_BITS = 16  # bits of a weight of the dense model that sizes are compared with
_REMEDY = "make the stage again with --restart"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Counts of what one step of an export has written.

    Attributes
    ----------
    linear_bytes : int
        Bytes of the linears written.
    rounded_to_zero : int
        Weights of linears that are zero in the export but not in the stage.
    """

    linear_bytes: int = 0
    rounded_to_zero: int = 0


class StageSource:
    """A finished stage, opened for export.

    Parameters
    ----------
    directory : Path

    Attributes
    ----------
    linears : set of str
        Stored tensors that hold the matrices of linears.
    rearranged : set of str
        Those of them that hold a transposed matrix, or the matrices of several experts.

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
        self.config = disk.read_json(directory / "config.json")
        self._dtype: dict[str, str] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        for path in self.weights.shards():
            for name, entry in entries(path).items():
                self._dtype[name], self._shape[name] = entry["dtype"], tuple(entry["shape"])
        places = list(self._find_linears())
        self.linears = {place.tensor for place in places}
        self.rearranged = {place.tensor for place in places if place.transposed or place.expert is not None}
        refuse_other_counts(directory, self.manifest["counts"], self.stage.reports())

    def _require_shards(self) -> None:
        """Check that the index names exactly the shards of the blocks and the shard of the other tensors."""
        files, blocks = set(self.weights.shards()), self.stage.blocks
        expected = {self.stage.shard(index) for index in range(-1, blocks)} if len(files) == blocks + 1 else set()
        if files != expected:
            raise BesaError(
                f"{self.directory / INDEX} does not name the shards of {blocks} blocks, as {MANIFEST} says",
                _REMEDY,
            )

    def refuse_misfit(self) -> None:
        """Refuse a configuration that does not match the tensors, since no program could load the export.

        Raises
        ------
        BesaError
            The configuration cannot be read, or describes another number of blocks or other shapes.
        """
        model = architecture.skeleton(architecture.config_of(self.directory), torch.bfloat16)
        prefix, blocks = architecture.block_list(model)
        if len(blocks) != self.stage.blocks:
            raise BesaError(
                f"{self.directory / 'config.json'} describes {len(blocks)} blocks, the stage has {self.stage.blocks}",
                "restore the file, or make the stage again with --restart",
            )
        names = tensor_names.Names(model, self.weights.names)
        linears.separate(prefix, blocks, names)
        tensor_names.reconcile(model, names, self.weights)

    def _find_linears(self) -> Iterator[TensorPlace]:
        for report in self.stage.reports():
            stored = entries(self.stage.shard(report.index))
            for linear in report.linears:
                place = linear.place(report.index, stored)
                shape = None if place is None else place.shape(lambda name, stored=stored: tuple(stored[name]["shape"]))  # type: ignore[misc]
                if place is None or shape != (linear.rows, linear.cols):
                    raise BesaError(
                        f"{self.stage.shard(report.index)} does not hold {linear.name} as its report says",
                        _REMEDY,
                    )
                yield place

    @property
    def names(self) -> list[str]:
        """Names of all tensors in the order of the stage's shards: those outside the blocks first, then by block."""
        return [name for names in self.weights.shards().values() for name in names]

    def only(self, files: Iterable[Path]) -> "StageSource":
        """Return a copy restricted to some of the stage's files of weights."""
        restricted = copy.copy(self)
        restricted.weights = self.weights.only(files)
        return restricted

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own."""
        return self.weights.read([name])[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._shape[name]

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor by its name in safetensors, for instance ``BF16``."""
        return self._dtype[name]

    @property
    def grid(self) -> Quantization | None:
        """`bits`, `group_size` (None: all columns) and `symmetric` of a quantized stage; else None."""
        return self.manifest.get("quantization")

    def coded(self, names: Sequence[str]) -> dict[str, Quantized]:
        """Read the codes of the quantized tensors among `names`, which are all in one file."""
        blocks = {self.stage.shard(index): index for index in range(self.stage.blocks)}
        block = blocks.get(self.weights.file(names[0]))
        if self.grid is None or block is None:
            return {}
        stored = self.stage.codes(block)
        grid = Grid(bits=self.grid["bits"], group_size=self.grid["group_size"], symmetric=self.grid["symmetric"])
        linears = {name: name.removesuffix(".weight") for name in names if name in self.linears}
        return {
            name: affine.from_tensors(stored, prefix, grid)
            for name, prefix in linears.items()
            if f"{prefix}.codes" in stored
        }

    @property
    def linear_weights(self) -> int:
        """Number of weights of all linears."""
        return sum(self._size(name) for name in self.linears)

    @property
    def dense_bytes(self) -> tuple[int, int]:
        """Bytes of the linears, and of all tensors, stored densely in bf16."""
        total = sum(self._size(name) for name in self._shape)
        return self.linear_weights * DENSE_BITS // 8, total * DENSE_BITS // 8

    def _size(self, name: str) -> int:
        return int(torch.Size(self._shape[name]).numel())


def refuse_other_counts(directory: Path, counts: Counts, reports: Iterable[BlockReport]) -> None:
    """Refuse a stage whose manifest has other counts than the sum of its blocks' reports.

    Parameters
    ----------
    directory : Path
        The stage.
    counts : mapping
        Counts in the manifest.
    reports : iterable of BlockReport
        Reports of all blocks.

    Raises
    ------
    BesaError
        A count differs.
    """
    linears = [linear for report in reports for linear in report.linears]
    sums = {
        "weights": sum(linear.rows * linear.cols for linear in linears),
        "pruned": sum(linear.pruned for linear in linears),
        "zeros": sum(linear.zeros for linear in linears),
    }
    for name in ("weights", "pruned", "zeros"):
        if counts[name] != sums[name]:
            raise BesaError(
                f"{directory / MANIFEST} counts {counts[name]} {name}, the reports of its blocks {sums[name]}", _REMEDY
            )


def private(export: Path) -> Path:
    """Return the directory beside a sparse export that keeps the stage's small files with paths of this machine."""
    return export.with_name(f".{export.name}.private")


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a floating-point tensor to another dtype; other tensors are returned unchanged.

    Raises
    ------
    BesaError
        A value is too large for the dtype.
    """
    if not tensor.is_floating_point():
        return tensor
    converted = tensor.to(dtype)
    if not bool(converted.isfinite().all()):
        raise BesaError(
            f"{name} holds {float(tensor.abs().max()):g}, too large for {str(dtype).removeprefix('torch.')}",
            "export in bfloat16 or float32",
        )
    return converted
