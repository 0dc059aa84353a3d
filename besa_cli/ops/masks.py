"""From scores to masks. A mask is boolean, True = keep; scores are higher for weights that matter more."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from besa_cli.ops import budget, kernels


def count_zeros(tensor: Real[Tensor, "..."] | Bool[Tensor, "..."]) -> int:
    """How many zeros there are in weights; in a mask, how many weights are pruned."""
    return int((tensor == 0).count_nonzero())


def mark_zeros_(scores: Float[Tensor, "rows cols"], weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """The scores, written over with −1 wherever the weight is zero already: existing zeros count as pruned first."""
    return scores.masked_fill_(weight == 0, -1.0)


def mask_from_ranks(ranks: Int[Tensor, "rows cols"], counts: Int[Tensor, " rows"]) -> Bool[Tensor, "rows cols"]:
    """The mask that prunes the `counts[r]` lowest ranks of row r."""
    return ranks >= counts.to(ranks.dtype).unsqueeze(1)


def row_counts(
    shares: budget.Floats, total: int, scores: Float[Tensor, "rows cols"], ranks: Int[Tensor, "rows cols"]
) -> Int[Tensor, " rows"]:
    """How many weights each row prunes so that the linear prunes exactly `total`.

    Rows get the floor of their share; what remains goes by largest remainder, then by the smallest score of the next
    weight to go, then by index. Scores below zero mark existing zeros: they are pruned in any case.

    Parameters
    ----------
    shares : array of shape (rows,)
        Wished real counts.
    total : int
        Weights to prune in the linear.
    """
    rows, cols = scores.shape
    marked = scores < 0
    lower = marked.sum(1).cpu().numpy() if marked.any() else np.zeros(rows, dtype=np.int64)
    upper = np.full(rows, cols, dtype=np.int64)
    filled = budget.fill(shares, float(total), lower.astype(np.float64), upper.astype(np.float64))
    following = torch.from_numpy(np.clip(np.floor(filled), 0, cols - 1).astype(np.int64)).to(ranks.device)
    next_to_go = ranks == following.to(ranks.dtype).unsqueeze(1)  # one in each row
    tie = scores[next_to_go].double().cpu().numpy()
    counts = budget.round_to_total(shares, total, lower, upper, tie)
    return torch.from_numpy(counts).to(ranks.device)


def row_wise(scores: Float[Tensor, "rows cols"], total: int) -> Bool[Tensor, "rows cols"]:
    """Prune exactly `total` weights of the linear, the same share in every row, the lowest scores of each row."""
    rows = scores.shape[0]
    ranks = kernels.ranks(scores)
    return mask_from_ranks(ranks, row_counts(np.full(rows, total / rows), total, scores, ranks))


def n_of_m(scores: Float[Tensor, "rows cols"], n: int, m: int) -> Bool[Tensor, "rows cols"]:
    """Prune the n lowest scores in every full window of m consecutive columns; a ragged tail stays dense.

    Weights that are zero already (scores below zero) count among the n, and stay zero beyond them.
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
