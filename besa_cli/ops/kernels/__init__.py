"""The inner loops of learning an allocation: `plain` is torch on any device, `native` C++ for the CPU, `fused` Triton.

All forms give the same ranks and masks, and the same sums up to the rounding of fp32. Which one is taken depends on the
tensors alone; ``BESA_KERNELS=plain`` in the environment takes the plain one everywhere.
"""

import os

from jaxtyping import Float, Int
from torch import Tensor

from besa_cli.ops.kernels import fused, native, plain

_CHOICE = "BESA_KERNELS"


def name() -> str:
    """``native`` or ``plain``: what serves tensors on the CPU."""
    return "native" if _wanted() and native.available() else "plain"


def _wanted() -> bool:
    return os.environ.get(_CHOICE) != "plain"


def ranks(scores: Float[Tensor, "rows cols"]) -> Int[Tensor, "rows cols"]:
    """The rank of each column within its row, 0 = the lowest score; ties by column.

    16-bit numbers below 32,768 columns, 32-bit ones above.
    """
    found = native.ranks(scores) if _wanted() else None
    return plain.ranks(scores) if found is None else found


def mask(
    weight: Float[Tensor, "rows cols"],
    ranks: Int[Tensor, "rows cols"],
    counts: Int[Tensor, " rows"],
    out: Float[Tensor, "rows cols"],
) -> Float[Tensor, "rows cols"]:
    """Write the weight without the `counts[r]` lowest ranks of row r into `out`, in the dtype of `out`; returns it."""
    found = (fused if weight.is_cuda else native).mask(weight, ranks, counts, out) if _wanted() else None
    return plain.mask(weight, ranks, counts, out) if found is None else found


def candidate_sums(
    gradient: Float[Tensor, "rows cols"],
    weight: Float[Tensor, "rows cols"],
    ranks: Int[Tensor, "rows cols"],
    count: int,
    *,
    floored: bool = False,
) -> Float[Tensor, "rows candidates"]:
    """dL/dβ_d = − Σ_{j < p_d·C} g_j for d = 0 … D, with g = (∂L/∂Ŵ)∘W in the order of the ranks j (BESA Eq. 6).

    Parameters
    ----------
    gradient : Tensor of shape (rows, cols)
        ∂L/∂Ŵ.
    weight, ranks : Tensors of shape (rows, cols)
    count : int
        D: the candidates are 0, 1/D, …, 1.
    floored : bool
        Sum over j < ⌊p_d·C⌋, as the paper's released program does.

    Returns
    -------
    Tensor of shape (rows, D + 1), fp32
    """
    form = fused if weight.is_cuda else native
    found = form.candidate_sums(gradient, weight, ranks, count, floored) if _wanted() else None
    return plain.candidate_sums(gradient, weight, ranks, count, floored) if found is None else found
