"""The inner loops of learning: `plain` in torch for any device, `native` in C++ for the CPU, `fused` in Triton.

All implementations give the same ranks, masks and weights on a grid, and the same sums up to fp32 rounding. The choice
depends on the tensors alone; ``BESA_KERNELS=plain`` in the environment forces the plain one, and ``fast`` is the
default.
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
    """Validate the environment variable ``BESA_KERNELS``.

    Raises
    ------
    UsageError
        BESA_KERNELS is neither fast nor plain.
    """
    _fast_allowed()


def name(device: torch.device, dtype: torch.dtype) -> str:
    """Return the implementation for a device and a dtype of computation: ``fused``, ``native`` or ``plain``."""
    module = _implementation(device)
    return (plain if module is native and not native.computes_in(dtype) else module).__name__.rpartition(".")[2]


def _implementation(device: torch.device) -> ModuleType:
    """Return the fastest implementation for a device; its functions return None for tensors that need the plain one."""
    if not _fast_allowed():
        return plain
    if fused.available(device):
        return fused
    return native if device.type == "cpu" and native.available() else plain


def _fast_allowed() -> bool:
    """Return whether ``BESA_KERNELS`` allows the fast implementations."""
    choice = os.environ.get(_CHOICE) or "fast"
    if choice not in ("fast", "plain"):
        raise UsageError(f"BESA_KERNELS={choice} is neither fast nor plain", "unset it, or set it to plain")
    return choice == "fast"


def ranks(scores: Float[Tensor, "rows cols"]) -> Int[Tensor, "rows cols"]:
    """Rank each column within its row, 0 = the lowest score, ties by column.

    The dtype is int16 below 32,768 columns, else int32.
    """
    result = native.ranks(scores) if _fast_allowed() else None
    return plain.ranks(scores) if result is None else result


def mask(
    weight: Float[Tensor, "rows cols"],
    ranks: Int[Tensor, "rows cols"],
    counts: Int[Tensor, " rows"],
    out: Float[Tensor, "rows cols"],
) -> Float[Tensor, "rows cols"]:
    """Write the weight without the `counts[r]` lowest ranks of row r into `out`, in its dtype, and return `out`."""
    result = _implementation(weight.device).mask(weight, ranks, counts, out)
    return plain.mask(weight, ranks, counts, out) if result is None else result


def candidate_sums(
    gradient: Float[Tensor, "rows cols"],
    weight: Float[Tensor, "rows cols"],
    ranks: Int[Tensor, "rows cols"],
    count: int,
    *,
    floored: bool = False,
) -> Float[Tensor, "rows candidates"]:
    """Compute dL/dβ_d = − Σ_{j < p_d·C} g_j for d = 0 … D, with g = (∂L/∂Ŵ)∘W in the order of the ranks j (BESA Eq. 6).

    Parameters
    ----------
    gradient : Tensor of shape (rows, cols)
        ∂L/∂Ŵ.
    weight, ranks : Tensors of shape (rows, cols)
    count : int
        D, for the candidates 0, 1/D, …, 1.
    floored : bool
        Sum over j < ⌊p_d·C⌋, as the paper's released program does.

    Returns
    -------
    Tensor of shape (rows, D + 1), fp32
    """
    result = _implementation(weight.device).candidate_sums(gradient, weight, ranks, count, floored)
    return plain.candidate_sums(gradient, weight, ranks, count, floored) if result is None else result


def on_grid(
    weight: Float[Tensor, "rows cols"],
    scales: Float[Tensor, "rows groups"],
    zeros: Float[Tensor, "rows groups"],
    width: int,
    top: int,
) -> Float[Tensor, "rows cols"]:
    """Compute the weights on their groups' grids in fp32: Ŵ = (Q − z)·h with Q = clamp(round(W/h) + z, 0, top).

    Parameters
    ----------
    weight : Tensor of shape (rows, cols)
    scales, zeros : Tensors of shape (rows, groups), fp32
        h and z of each group, z an integer. A group is `width` consecutive columns, fewer at the end of a row.
    width, top : int
        Number of columns in a group, and largest code.
    """
    result = native.on_grid(weight, scales, zeros, width, top) if _fast_allowed() else None
    return plain.on_grid(weight, scales, zeros, width, top) if result is None else result


def grid_slopes(
    gradient: Float[Tensor, "rows cols"],
    weight: Float[Tensor, "rows cols"],
    scales: Float[Tensor, "rows groups"],
    zeros: Float[Tensor, "rows groups"],
    width: int,
    top: int,
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """Compute ∂L/∂h and ∂L/∂z of every group of `on_grid`, straight-through, in fp32.

    Inside the grid ∂Ŵ/∂h = round(W/h) − W/h and ∂Ŵ/∂z = 0; for a clipped weight they are Q − z and −h.

    Parameters
    ----------
    gradient : Tensor of shape (rows, cols)
        ∂L/∂Ŵ.
    weight, scales, zeros, width, top
        As in `on_grid`.
    """
    result = native.grid_slopes(gradient, weight, scales, zeros, width, top) if _fast_allowed() else None
    return plain.grid_slopes(gradient, weight, scales, zeros, width, top) if result is None else result
