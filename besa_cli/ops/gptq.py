"""GPTQ: quantize a linear column by column; later columns compensate for the error (arXiv 2210.17323)."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from besa_cli.ops import affine
from besa_cli.ops.affine import Grid, Quantized
from besa_cli.ops.clipping import Clipped

_CHUNK = 1 << 20  # weights searched at a time, to bound the memory


def quantize(
    weight: Float[Tensor, "rows cols"],
    keep: Bool[Tensor, "rows cols"],
    factor: Float[Tensor, "cols cols"],
    grid: Grid,
    *,
    search: bool = False,
    width: int = 128,
) -> Quantized:
    """Quantize column by column, spreading each column's error to the columns on its right.

    A pruned weight receives the errors of earlier columns, is set back to zero, and passes this on as its own error; so
    only the surviving weights compensate.

    Parameters
    ----------
    weight : Tensor of shape (rows, cols)
    keep : boolean Tensor of shape (rows, cols)
        False where a weight must be exactly zero.
    factor : Tensor of shape (cols, cols)
        Upper Cholesky factor of the inverse Hessian, from `besa_cli.ops.obs.inverse_factor`.
    grid : Grid
    search : bool
        Choose the grid of each group among those of `besa_cli.ops.clipping.Clipped.searched` by the smallest Σ_c (ŵ −
        w)²/U_cc² of its nearest codes, instead of from minimum to maximum. The sum is the cost of the errors of its
        columns by the paper's formula, as if no error were spread to later columns.
    width : int
        Number of columns after which the error is spread to all columns further right.

    Returns
    -------
    Quantized
        The grid of a group is fitted to its weights as they are when its first column is reached.
    """
    updated = weight.float().clone()
    rows, cols = updated.shape
    group = grid.width(cols)
    scales = torch.empty(rows, grid.groups(cols), dtype=torch.float16, device=weight.device)
    zeros = torch.empty_like(scales, dtype=torch.uint8)
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=weight.device)
    costs = factor.diagonal().square().reciprocal()
    channel_grid = replace(grid, group_size=None)
    for start in range(0, cols, _columns_per_step(group, width)):
        part = slice(start, min(start + _columns_per_step(group, width), cols))
        errors = torch.zeros_like(updated[:, part])
        for index in range(part.start, part.stop):
            group_index = slice(index // group, index // group + 1)
            if index % group == 0:
                members = slice(index, min(index + group, cols))
                kept = updated[:, members].masked_fill(~keep[:, members], 0.0)
                bounds = (
                    _searched_bounds(kept, channel_grid, costs[members])
                    if search
                    else affine.extremes(kept, channel_grid)
                )
                scales[:, group_index], zeros[:, group_index] = affine.scales_and_zeros(*bounds, channel_grid)
            column = updated[:, index : index + 1]
            desired = column.masked_fill(~keep[:, index : index + 1], 0.0)
            code = affine.encode(desired, scales[:, group_index], zeros[:, group_index], grid)
            codes[:, index : index + 1] = code
            dequantized = (code.float() - zeros[:, group_index].float()) * scales[:, group_index].float()
            error = (column - dequantized) / factor[index, index]
            updated[:, index + 1 : part.stop] -= error * factor[index, index + 1 : part.stop]
            errors[:, index - part.start] = error[:, 0]
        updated[:, part.stop :] -= errors @ factor[part, part.stop :]
    return Quantized(codes=codes, scales=scales, zeros=zeros, grid=grid)


def _searched_bounds(
    weight: Float[Tensor, "rows cols"], grid: Grid, costs: Float[Tensor, " cols"]
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """Compute the bounds of the best grid of each row, over chunks of rows."""
    bounds = []
    for part in torch.split(weight, max(_CHUNK // weight.shape[1], 1)):
        clipped = Clipped(part, grid)
        bounds.append(clipped.bounds(clipped.searched(costs)))
    low, high = (torch.cat(ends) for ends in zip(*bounds, strict=True))
    return low, high


def _columns_per_step(group: int, width: int) -> int:
    """Return about `width` columns, such that no group begins before its columns are up to date."""
    if group <= width:
        return width // group * group
    return next(size for size in range(width, 0, -1) if group % size == 0)
