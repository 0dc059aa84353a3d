"""Uniform sparsity: the same share of every row, by the scores of any method; and the statistics that scores need."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from besa_cli.ops import budget, importance, masks
from besa_cli.stream.block import Block


def input_norms(block: Block) -> dict[str, Tensor]:
    """Return ‖X_:,c‖₂ for each column of every linear, over the block's calibration inputs; fp32."""
    return {name: sums.sqrt() for name, sums in block.observe(importance.squared_sums).items()}


def uniform_masks(block: Block, scores: Mapping[str, Tensor], nm: tuple[int, int] | None) -> dict[str, Tensor]:
    """Return masks with the same sparsity in every row of every linear (or n of every m columns), lowest scores pruned.

    The scores are overwritten where a weight is zero.
    """
    ready = {name: masks.mark_zeros_(score, block.weights[name]) for name, score in scores.items()}
    if nm:
        return {name: masks.n_of_m(score, *nm) for name, score in ready.items()}
    counts = linear_counts(block)
    return {name: masks.row_wise(score, counts[name]) for name, score in ready.items()}


def linear_counts(block: Block) -> dict[str, int]:
    """Split the block's budget over its linears by size; a linear with more zeros than its share keeps them."""
    sizes = np.array([weight.numel() for weight in block.weights.values()])
    zeros = np.array([masks.count_zeros(weight) for weight in block.weights.values()])
    counts = budget.round_to_total(block.budget * (sizes / sizes.sum()), block.budget, zeros, sizes)
    return dict(zip(block.weights, counts.tolist(), strict=True))
