"""The inner loops of learning: `plain` is torch on any device, `native` C++ for the CPU, `fused` Triton.

All forms give the same ranks, masks and weights on a grid, and the same sums up to the rounding of fp32. Which one is
taken depends on the tensors alone; ``BESA_KERNELS=plain`` in the environment takes the plain one everywhere, and
``fast`` is what happens without it.
"""

import os
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from besa_cli.errors import UsageError
from besa_cli.ops.kernels import fused, native, plain

_CHOICE = "BESA_KERNELS"


def check() -> None:
    """Refuse what is no choice.

    Raises
    ------
    UsageError
        BESA_KERNELS is neither fast nor plain.
    """
    _wanted()


def name(device: torch.device, dtype: torch.dtype) -> str:
    """``fused``, ``native`` or ``plain``: what serves a device's tensors where `dtype` is computed in."""
    form = _form(device)
    return (plain if form is native and not native.computes_in(dtype) else form).__name__.rpartition(".")[2]


def _form(device: torch.device) -> ModuleType:
    """The fastest form for a device's tensors; for some it gives None, and the plain one has to serve."""
    if not _wanted():
        return plain
    if fused.available(device):
        return fused
    return native if device.type == "cpu" and native.available() else plain


def _wanted() -> bool:
    choice = os.environ.get(_CHOICE) or "fast"
    if choice not in ("fast", "plain"):
        raise UsageError(f"BESA_KERNELS={choice} is neither fast nor plain", "unset it, or set it to plain")
    return choice == "fast"


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
    found = _form(weight.device).mask(weight, ranks, counts, out)
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
    found = _form(weight.device).candidate_sums(gradient, weight, ranks, count, floored)
    return plain.candidate_sums(gradient, weight, ranks, count, floored) if found is None else found


def on_grid(
    weight: Float[Tensor, "rows cols"],
    scales: Float[Tensor, "rows groups"],
    zeros: Float[Tensor, "rows groups"],
    width: int,
    top: int,
) -> Float[Tensor, "rows cols"]:
    """Ŵ = (Q − z)·h with Q = clamp(round(W/h) + z, 0, top): the weights on the grids of their groups, fp32.

    Parameters
    ----------
    weight : Tensor of shape (rows, cols)
    scales, zeros : Tensors of shape (rows, groups), fp32
        h and z of each group, z a whole number: `width` consecutive columns, fewer in the last group of a row.
    width, top : int
        Columns in a group; the greatest code.
    """
    found = native.on_grid(weight, scales, zeros, width, top) if _wanted() else None
    return plain.on_grid(weight, scales, zeros, width, top) if found is None else found


def grid_slopes(
    gradient: Float[Tensor, "rows cols"],
    weight: Float[Tensor, "rows cols"],
    scales: Float[Tensor, "rows groups"],
    zeros: Float[Tensor, "rows groups"],
    width: int,
    top: int,
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """∂L/∂h and ∂L/∂z of every group of `on_grid`, the rounding straight-through, fp32.

    Of a weight within its grid ∂Ŵ/∂h = round(W/h) − W/h and ∂Ŵ/∂z = 0; of one that is clipped, Q − z and −h.

    Parameters
    ----------
    gradient : Tensor of shape (rows, cols)
        ∂L/∂Ŵ.
    """
    found = native.grid_slopes(gradient, weight, scales, zeros, width, top) if _wanted() else None
    return plain.grid_slopes(gradient, weight, scales, zeros, width, top) if found is None else found
