"""Optimal brain surgeon by columns: SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, Algorithm 1)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from besa_cli.choices import DAMPING
from besa_cli.errors import BesaError
from besa_cli.ops import masks


def inverse_factor(gram: Float[Tensor, "cols cols"], damping: float) -> Float[Tensor, "cols cols"]:
    """Compute the upper Cholesky factor of (XᵀX + damping·mean(diag)·I)⁻¹.

    Columns without any input get the diagonal 1.

    Raises
    ------
    BesaError
        The matrix is not positive definite even with 100 times the damping.
    """
    cols = gram.shape[0]
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    shift = damping * diagonal.mean()
    for factor in (1.0, 10.0, 100.0):
        shifted = hessian + torch.eye(cols, device=gram.device) * (shift * factor)
        lower: Tensor
        upper: Tensor
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if int(failed) == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(failed) == 0 and bool(upper.isfinite().all()):
                return upper
    raise BesaError(
        f"the Hessian of a linear with {cols} inputs is not positive definite",
        "give more calibration samples, or a higher --damping",
    )


def inverse_diagonal(gram: Float[Tensor, "cols cols"], damping: float) -> Float[Tensor, " cols"]:
    """Compute the diagonal of the inverse that `inverse_factor` factors; infinite for columns without any input."""
    inverse = inverse_factor(gram, damping).square().sum(0)
    return inverse.masked_fill(gram.diagonal() == 0, torch.inf)


def prune(
    weight: Float[Tensor, "rows cols"],
    gram: Float[Tensor, "cols cols"],
    total: int,
    *,
    n_of_m: tuple[int, int] | None = None,
    width: int = 128,
    damping: float = DAMPING,
) -> tuple[Float[Tensor, "rows cols"], Bool[Tensor, "rows cols"]]:
    """Prune column by column; the remaining columns compensate for the error of each.

    Parameters
    ----------
    weight : Tensor of shape (rows, cols)
    gram : Tensor of shape (cols, cols)
        XᵀX of the linear's inputs.
    total : int
        Number of weights to prune. Every group of `width` columns prunes its share, comparing scores over the whole
        group. Not used with `n_of_m`.
    n_of_m : (n, m), optional
        Prune n of every m consecutive columns instead; a ragged tail stays dense.
    width : int
        Number of columns whose mask is chosen together.
    damping : float
        Share of the mean diagonal of XᵀX that is added to the diagonal.

    Returns
    -------
    Tensor of shape (rows, cols), fp32
        The updated weight.
    boolean Tensor of shape (rows, cols)
        The mask, True = keep.
    """
    updated = weight.float().clone()
    keep = torch.ones_like(updated, dtype=torch.bool)
    zero, dead = weight == 0, gram.diagonal() == 0
    zeros = zero.sum(0)
    factor = inverse_factor(gram, damping)
    cols, remaining = updated.shape[1], total
    if n_of_m:
        width = max(width // n_of_m[1], 1) * n_of_m[1]
    for start in range(0, cols, width):
        part = slice(start, min(start + width, cols))
        scores = (updated[:, part] / factor.diagonal()[part]).square().masked_fill(dead[part], 0.0)
        scores = scores.masked_fill(zero[:, part], -1.0)
        if n_of_m:
            keep[:, part] = masks.n_of_m(scores, *n_of_m)
        else:
            share = round(remaining * (part.stop - part.start) / (cols - start))
            reserved = int(zeros[part.stop :].sum())  # existing zeros further right, always pruned
            keep[:, part] = _lowest(scores, min(share, remaining - reserved))
            remaining -= int((~keep[:, part]).sum())
        errors = _sweep(updated[:, part], keep[:, part], factor[part, part])
        updated[:, part.stop :] -= errors @ factor[part, part.stop :]
    return updated.masked_fill(~keep, 0.0), keep


def _lowest(scores: Float[Tensor, "rows part"], count: int) -> Bool[Tensor, "rows part"]:
    """Keep all but the `count` lowest scores of the whole matrix; existing zeros (below 0) are always pruned."""
    flat = scores.flatten()
    count = min(max(count, int((flat < 0).sum())), flat.numel())
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[flat.argsort(stable=True)[:count]] = False
    return keep.reshape(scores.shape)


def _sweep(
    columns: Float[Tensor, "rows part"], keep: Bool[Tensor, "rows part"], factor: Float[Tensor, "part part"]
) -> Float[Tensor, "rows part"]:
    """Zero pruned weights in place, column by column, spreading errors to the right; return the errors."""
    errors = torch.zeros_like(columns)
    for index in range(columns.shape[1]):
        column = columns[:, index]
        error = column.masked_fill(keep[:, index], 0.0) / factor[index, index]
        column.masked_fill_(~keep[:, index], 0.0)
        if index + 1 < columns.shape[1]:
            columns[:, index + 1 :] -= error.unsqueeze(1) * factor[index, index + 1 :].unsqueeze(0)
        errors[:, index] = error
    return errors
