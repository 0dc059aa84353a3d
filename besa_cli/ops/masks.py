"""Masks from scores. A mask is boolean, True = keep; higher scores mark more important weights."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from besa_cli.ops import budget, kernels


def count_zeros(tensor: Real[Tensor, "..."] | Bool[Tensor, "..."]) -> int:
    """Count the zeros in weights; in a mask, the pruned weights."""
    return int((tensor == 0).count_nonzero())


def mark_zeros_(scores: Float[Tensor, "rows cols"], weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """Overwrite the scores with −1 where the weight is zero, so that existing zeros are pruned first."""
    return scores.masked_fill_(weight == 0, -1.0)


def mask_from_ranks(ranks: Int[Tensor, "rows cols"], counts: Int[Tensor, " rows"]) -> Bool[Tensor, "rows cols"]:
    """Build the mask that prunes the `counts[r]` lowest ranks of row r."""
    return ranks >= counts.to(ranks.dtype).unsqueeze(1)


def row_counts(
    shares: budget.Floats, total: int, scores: Float[Tensor, "rows cols"], ranks: Int[Tensor, "rows cols"]
) -> Int[Tensor, " rows"]:
    """Compute the number of weights that each row prunes, so that the linear prunes exactly `total`.

    Rows get the floor of their share; the rest goes by largest remainder, then by the smallest score of the next weight
    to be pruned, then by index. Scores below zero mark existing zeros, which are always pruned.

    Parameters
    ----------
    shares : array of shape (rows,)
        Desired real counts.
    total : int
        Number of weights to prune in the linear.
    scores, ranks : Tensors of shape (rows, cols)
    """
    rows, cols = scores.shape
    marked = scores < 0
    lower = marked.sum(1).cpu().numpy() if marked.any() else np.zeros(rows, dtype=np.int64)
    upper = np.full(rows, cols, dtype=np.int64)
    filled = budget.fill(shares, float(total), lower.astype(np.float64), upper.astype(np.float64))
    next_ranks = torch.from_numpy(np.clip(np.floor(filled), 0, cols - 1).astype(np.int64)).to(ranks.device)
    is_next = ranks == next_ranks.to(ranks.dtype).unsqueeze(1)  # one in each row
    tie = scores[is_next].double().cpu().numpy()
    counts = budget.round_to_total(shares, total, lower, upper, tie)
    return torch.from_numpy(counts).to(ranks.device)


def row_wise(scores: Float[Tensor, "rows cols"], total: int) -> Bool[Tensor, "rows cols"]:
    """Prune exactly `total` weights of the linear: the same share of every row, with the lowest scores of the row."""
    rows = scores.shape[0]
    ranks = kernels.ranks(scores)
    return mask_from_ranks(ranks, row_counts(np.full(rows, total / rows), total, scores, ranks))


def n_of_m(scores: Float[Tensor, "rows cols"], n: int, m: int) -> Bool[Tensor, "rows cols"]:
    """Prune the n lowest scores in every full window of m consecutive columns; a ragged tail stays dense.

    Existing zeros (scores below zero) count among the n; more than n of them stay zero.
    """
    rows, cols = scores.shape
    keep = scores >= 0
    full = cols - cols % m
    if full == 0 or n == 0:
        return keep
    windows = scores[:, :full].reshape(rows, full // m, m)
    lowest = windows.argsort(dim=2, stable=True)[:, :, :n]
    pruned = torch.zeros_like(windows, dtype=torch.bool).scatter_(2, lowest, True)
    keep[:, :full] &= ~pruned.reshape(rows, full)
    return keep
