"""Sparsities of rows under one budget for the whole model: a logit a row, its counts, and its gradient.

A row r of C_r weights prunes its k_r lowest ranks, with k_r ≈ C_r·σ(θ_r + t) and one shift t for all rows, so that
Σ k_r is the budget. The mask is straight-through: see `gradient`.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from besa_cli.ops import budget, kernels
from besa_cli.ops.kernels import plain

BUCKETS = 100  # a row's ranks are summed in as many parts of equal length
_SPAN = 2  # buckets on each side of that of the last pruned rank, whose weights the gradient is the mean of
_EDGE = 0.002  # smallest distance of a starting sparsity from 0 and 1: beyond it, a logit hardly has a gradient
_STEPS = 200  # more than bisection needs in float64


def logits(counts: Int[Tensor, " rows"], cols: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return the logits θ = logit(k/C) of the sparsities of rows, in fp32, kept off 0 and 1."""
    return torch.logit((counts.double() / cols.double()).clamp(_EDGE, 1 - _EDGE)).float()


def shift(theta: Float[Tensor, " rows"], cols: Int[Tensor, " rows"], total: int) -> float:
    """Solve Σ C_r·σ(θ_r + t) = total for t by bisection, in float64.

    Parameters
    ----------
    theta, cols : Tensors of shape (rows,)
    total : int
        Between 0 and the sum of `cols`; t is limited to ±60 at these ends.
    """
    values, weights = theta.detach().double(), cols.double()
    low, high = -60.0 - float(values.max()), 60.0 - float(values.min())
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if float(torch.sigmoid(values + middle) @ weights) < total:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def counts(
    theta: Float[Tensor, " rows"], cols: Int[Tensor, " rows"], zeros: NDArray[np.int64], total: int
) -> Int[Tensor, " rows"]:
    """Compute how many weights each row prunes, `total` together: C·σ(θ) as integers, by largest remainder.

    Parameters
    ----------
    theta, cols : Tensors of shape (rows,)
    zeros : array of shape (rows,)
        Weights of each row that are zero already and are always pruned.
    total : int
        The budget; the sum is larger only if the existing zeros are more.
    """
    wished = (torch.sigmoid(theta.detach().double()) * cols.double()).numpy()
    return torch.from_numpy(budget.round_to_total(wished, total, zeros, cols.numpy().astype(np.int64)))


def gradient(
    weight_gradient: Float[Tensor, "rows cols"],
    weight: Float[Tensor, "rows cols"],
    ranks: Int[Tensor, "rows cols"],
    pruned: Int[Tensor, " rows"],
) -> Float[Tensor, " rows"]:
    """Compute dL/dk of every row, straight-through: − the mean of (∂L/∂Ŵ)∘W over the ranks near the last pruned one.

    To prune one weight more changes the loss by −(∂L/∂Ŵ)·W of that weight to first order. The mean is over five
    hundredths of the row around rank k (fewer at its ends), since one weight's own derivative is mostly noise.

    Parameters
    ----------
    weight_gradient, weight, ranks : Tensors of shape (rows, cols)
        ∂L/∂Ŵ at the masked weights, the weights without mask, and their ranks as `kernels.ranks` returns them.
    pruned : Tensor of shape (rows,)
        k, the ranks that are pruned now.
    """
    cols = weight.shape[1]
    sums = kernels.candidate_sums(weight_gradient, weight, ranks, BUCKETS)  # −Σ over the ranks j < d/BUCKETS·C
    edges = torch.tensor(plain.cuts(BUCKETS, cols))
    bucket = (pruned.to(torch.int64) * BUCKETS // cols).cpu()
    low, high = (bucket - _SPAN).clamp_min(0), (bucket + _SPAN + 1).clamp_max(BUCKETS)
    found = (edges[high] - edges[low]).clamp_min(1).to(sums)
    low, high = (place.to(sums.device).unsqueeze(1) for place in (low, high))
    return (sums.gather(1, high) - sums.gather(1, low)).squeeze(1) / found
