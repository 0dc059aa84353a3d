"""Importance scores of weights, of shape (rows, cols), non-negative, higher = keep."""

import torch
from jaxtyping import Float
from torch import Tensor


def squared_sums(inputs: Float[Tensor, "*batch cols"]) -> Float[Tensor, " cols"]:
    """Sum the squares of each input column over all tokens, in fp32: the squares of Wanda's ‖X_:,c‖₂."""
    return inputs.reshape(-1, inputs.shape[-1]).float().square().sum(0)


def gram(inputs: Float[Tensor, "*batch cols"]) -> Float[Tensor, "cols cols"]:
    """Compute XᵀX over all tokens, in fp32: half the Hessian of the squared output error (arXiv 2301.00774)."""
    flat = inputs.reshape(-1, inputs.shape[-1]).float()
    return flat.T @ flat


def magnitude(weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """Compute |W|."""
    return weight.abs().float()


def wanda(weight: Float[Tensor, "rows cols"], column_norms: Float[Tensor, " cols"]) -> Float[Tensor, "rows cols"]:
    """Compute δ = |W| · ‖X_:,c‖₂ (BESA Eq. 2; Wanda, arXiv 2306.11695).

    Parameters
    ----------
    weight : Tensor of shape (rows, cols)
    column_norms : Tensor of shape (cols,)
        ‖X_:,c‖₂ of the linear's inputs over all calibration tokens; only ratios between columns matter.
    """
    return weight.abs().float().mul_(torch.as_tensor(column_norms, dtype=torch.float32))


def sparsegpt(
    weight: Float[Tensor, "rows cols"], inverse_diagonal: Float[Tensor, " cols"]
) -> Float[Tensor, "rows cols"]:
    """Compute δ = W² / [(XᵀX + λI)⁻¹]_cc, the output error that SparseGPT cannot compensate (arXiv 2301.00774, Eq. 3).

    Columns whose inputs are all zero score 0.

    Parameters
    ----------
    weight : Tensor of shape (rows, cols)
    inverse_diagonal : Tensor of shape (cols,)
        Diagonal of the inverse, from `besa_cli.ops.obs.inverse_diagonal`.
    """
    return weight.float().square() / inverse_diagonal
