"""Wanda: |W| · ‖X‖₂, compared within each row (Sun et al. 2023, arXiv 2306.11695)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from typing_extensions import override

from besa_cli.ops import budget, importance, masks
from besa_cli.stream.block import Block, Decision
from besa_cli.stream.memory_model import MemoryUse
from besa_cli.stream.method import MethodOptions


@dataclass(frozen=True, kw_only=True)
class WandaOptions(MethodOptions):
    """Options of Wanda.

    Attributes
    ----------
    nm : (n, m), optional
        Prune n of every m columns instead of the block's budget.
    """

    nm: tuple[int, int] | None = None

    @override
    def memory_use(self) -> MemoryUse:
        return MemoryUse(state=5)  # scores in fp32, masks


Options = WandaOptions


def prune(block: Block, options: WandaOptions) -> Decision:
    """Prune the weights of each row whose size times the norm of their input is smallest."""
    return Decision(masks=uniform(block, scores(block), options.nm))


def scores(block: Block) -> dict[str, Tensor]:
    """δ = |W| · ‖X_:,c‖₂ of every linear, over the block's calibration inputs."""
    columns = norms(block)
    return {name: importance.wanda(weight, columns[name]) for name, weight in block.weights.items()}


def norms(block: Block) -> dict[str, Tensor]:
    """‖X_:,c‖₂ for each column of every linear, over the block's calibration inputs."""
    return {name: sums.sqrt() for name, sums in block.observe(importance.squared_sums).items()}


def uniform(block: Block, scores: Mapping[str, Tensor], nm: tuple[int, int] | None) -> dict[str, Tensor]:
    """Masks with the same sparsity in every row of every linear (or n of every m columns), lowest scores pruned.

    The scores are written over where a weight is zero.
    """
    ready = {name: masks.mark_zeros_(score, block.weights[name]) for name, score in scores.items()}
    if nm:
        return {name: masks.n_of_m(score, *nm) for name, score in ready.items()}
    counts = linear_counts(block)
    return {name: masks.row_wise(score, counts[name]) for name, score in ready.items()}


def linear_counts(block: Block) -> dict[str, int]:
    """The block's budget split over its linears by size; linears with more zeros already keep those."""
    sizes = np.array([weight.numel() for weight in block.weights.values()])
    zeros = np.array([masks.count_zeros(weight) for weight in block.weights.values()])
    counts = budget.round_to_total(block.budget * (sizes / sizes.sum()), block.budget, zeros, sizes)
    return dict(zip(block.weights, counts.tolist(), strict=True))
