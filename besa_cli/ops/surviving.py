"""Weights that a mask keeps, changed so that a linear's output stays what it was without the mask."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

STEPS = 64  # at most so many steps of conjugate gradients
_TOLERANCE = 1e-4  # of the residual, relative to where it starts, in the norm of the preconditioner
_SMALL = 1e-30


def solve(
    weight: Float[Tensor, "rows cols"],
    mask: Bool[Tensor, "rows cols"],
    gram: Float[Tensor, "cols cols"],
    *,
    damping: float,
    steps: int = STEPS,
) -> Float[Tensor, "rows cols"]:
    """Minimise ‖X(Ŵ − W)ᵀ‖² + λ‖Ŵ − W‖² over all Ŵ that are zero where the mask is False, by conjugate gradients.

    Each row has a system of its own, (XᵀX + λI) restricted to the columns that it keeps. All rows take their steps
    together, preconditioned by the diagonal, as ALPS does after it decided its masks (arXiv 2406.07831).
    No step is worse than the one before.

    Parameters
    ----------
    weight : Tensor of shape (rows, cols)
        W.
    mask : boolean Tensor of shape (rows, cols)
        True = keep.
    gram : Tensor of shape (cols, cols)
        XᵀX of the linear's inputs, fp32.
    damping : float
        λ as a share of the mean diagonal of XᵀX.

    Returns
    -------
    Tensor of shape (rows, cols), fp32
    """
    diagonal = gram.diagonal()
    shift = damping * float(diagonal.mean()) + _SMALL
    inverse = 1 / (diagonal + shift)
    target, kept = weight.float(), mask.to(torch.float32)

    def times(rows: Tensor) -> Tensor:
        return (rows @ gram).add_(rows, alpha=shift)

    found = target * kept
    residual = times(target - found).mul_(kept)
    direction = residual * inverse
    size = (residual * direction).sum(1, keepdim=True)
    smallest = size * _TOLERANCE**2 + _SMALL
    for _ in range(steps):
        moved = times(direction).mul_(kept)
        length = size / (direction * moved).sum(1, keepdim=True).clamp_min(_SMALL)
        length = length.masked_fill(size <= smallest, 0.0)  # a row that has arrived stays where it is
        if not bool(length.any()):
            break
        found.addcmul_(direction, length)
        residual.addcmul_(moved, length, value=-1.0)
        scaled = residual * inverse
        following = (residual * scaled).sum(1, keepdim=True)
        direction = scaled.addcmul_(direction, following / size.clamp_min(_SMALL))
        size = following
    return found
