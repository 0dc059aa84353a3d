"""Sparsity of every linear in every block, and how it is spread over the rows, counted from the zeros on disk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from besa_cli.checkpoint import inspection
from besa_cli.checkpoint.inspection import BlockMatrices

_MOST_BINS = 18  # of a distribution
_PARTS = (200, 100, 50, 20, 10)  # bins that the range from 0 to 1 may be divided into, finest first


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Number of rows whose share of zeros is in [low, high)."""

    low: float
    high: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Zeros of one linear in one block; of a mixture of experts the same linear of all its experts.

    Attributes
    ----------
    weights, pruned, zeros : int
        Weights, those that the mask takes, and zeros on disk.
    rows : int
        Number of rows.
    lowest, median, highest : float
        Share of zeros in a row.
    bins : tuple of Bin
        Distribution over the rows, from the first bin with rows to the last.
    """

    weights: int
    pruned: int
    zeros: int
    rows: int
    lowest: float
    median: float
    highest: float
    bins: tuple[Bin, ...]

    @property
    def sparsity(self) -> float:
        """Share of the weights that are pruned."""
        return self.pruned / max(self.weights, 1)


@dataclass(frozen=True, kw_only=True)
class SparsityMap:
    """Cells of a stage: for each block, by its number, the cells of its linears by name."""

    names: tuple[str, ...]
    blocks: Mapping[int, Mapping[str, Cell]]

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest sparsity of a cell."""
        shares = [cell.sparsity for cells in self.blocks.values() for cell in cells.values()]
        return min(shares, default=0.0), max(shares, default=0.0)


def count(directory: Path, on_block: Callable[[int], None] = lambda done: None) -> SparsityMap:
    """Count the zeros of a stage, or of its finished blocks, reading one block at a time.

    Parameters
    ----------
    directory : Path
    on_block : function of the number of blocks counted so far

    Raises
    ------
    BesaError
        A shard or a report is missing or damaged.
    """
    blocks = {}
    for done, block in enumerate(inspection.matrices(directory), start=1):
        blocks[block.index] = _cells(block)
        on_block(done)
    names = tuple(dict.fromkeys(name for cells in blocks.values() for name in cells))
    return SparsityMap(names=names, blocks=blocks)


def _cells(block: BlockMatrices) -> dict[str, Cell]:
    """Return the cells of a block; linears that differ only in a number, as experts do, share one."""
    pruned = {linear.name: linear.pruned for linear in block.report.linears} if block.report else {}
    groups: dict[str, list[str]] = {}
    for name in block.weights:
        groups.setdefault(inspection.label(name), []).append(name)
    return {
        group: _cell([block.weights[name] for name in names], sum(pruned.get(name, 0) for name in names))
        for group, names in groups.items()
    }


def _cell(weights: Sequence[Tensor], pruned: int) -> Cell:
    zeros = torch.cat([(weight == 0).sum(dim=1) for weight in weights])
    cols = weights[0].shape[1]
    shares = zeros.double() / cols
    return Cell(
        weights=sum(weight.numel() for weight in weights),
        pruned=pruned,
        zeros=int(zeros.sum()),
        rows=len(zeros),
        lowest=float(shares.min()),
        median=float(shares.median()),
        highest=float(shares.max()),
        bins=_bins(zeros, cols),
    )


def _bins(zeros: Tensor, cols: int) -> tuple[Bin, ...]:
    """Return the distribution of the rows, as finely as few bins allow; a row of zeros only is in the last bin."""
    low, high = int(zeros.min()), int(zeros.max())
    parts = next(
        (parts for parts in _PARTS if high * parts // cols - low * parts // cols < _MOST_BINS),
        _PARTS[-1],
    )
    numbers = (zeros * parts // cols).clamp(max=parts - 1)
    counted = torch.bincount(numbers, minlength=parts).tolist()
    return tuple(
        Bin(low=number / parts, high=(number + 1) / parts, rows=counted[number])
        for number in range(int(numbers.min()), int(numbers.max()) + 1)
    )
