"""From scores to masks. A mask is boolean, True = keep; scores are higher for weights that matter more."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from besa_cli.ops import budget


def zeros_first(scores: Float[Tensor, "rows cols"], weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """The scores with −1 wherever the weight is zero already: existing zeros are the first to count as pruned."""
    return scores.masked_fill(weight == 0, -1.0)


def order(scores: Float[Tensor, "rows cols"]) -> Int[Tensor, "rows cols"]:
    """Columns of each row from the least to the most important; ties by column (a stable sort).

    16-bit numbers below 32,768 columns, 32-bit ones above.
    """
    return scores.argsort(dim=1, stable=True).to(_index_type(scores.shape[1]))


def ranks(order: Int[Tensor, "rows cols"]) -> Int[Tensor, "rows cols"]:
    """The rank of each column within its row (0 = least important): the inverse of `order`, in its integer type."""
    result = torch.empty_like(order)
    places = torch.arange(order.shape[1], dtype=order.dtype, device=order.device)
    return result.scatter_(1, order.long(), places.expand_as(order))


def _index_type(cols: int) -> torch.dtype:
    return torch.int16 if cols < 2**15 else torch.int32


def keep_above(ranks: Int[Tensor, "rows cols"], counts: Int[Tensor, " rows"]) -> Bool[Tensor, "rows cols"]:
    """The mask that prunes the `counts[r]` lowest ranks of row r."""
    return ranks >= counts.to(ranks.dtype).unsqueeze(1)


def row_counts(
    shares: budget.Floats, total: int, scores: Float[Tensor, "rows cols"], order: Int[Tensor, "rows cols"]
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
    lower = (scores < 0).sum(1).cpu().numpy().astype(np.int64)
    upper = np.full(rows, cols, dtype=np.int64)
    filled = budget.fill(shares, float(total), lower.astype(np.float64), upper.astype(np.float64))
    following = torch.from_numpy(np.clip(np.floor(filled), 0, cols - 1).astype(np.int64)).to(order.device)
    next_column = order.gather(1, following.unsqueeze(1)).long()
    tie = scores.gather(1, next_column).squeeze(1).double().cpu().numpy()
    counts = budget.round_to_total(shares, total, lower, upper, tie)
    return torch.from_numpy(counts).to(order.device)


def row_wise(scores: Float[Tensor, "rows cols"], total: int) -> Bool[Tensor, "rows cols"]:
    """Prune exactly `total` weights of the linear, the same share in every row, the lowest scores of each row."""
    rows = scores.shape[0]
    by_score = order(scores)
    counts = row_counts(np.full(rows, total / rows), total, scores, by_score)
    return keep_above(ranks(by_score), counts)


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
