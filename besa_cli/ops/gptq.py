"""GPTQ: put a linear on a grid column by column; the columns that follow make up for the error (arXiv 2210.17323)."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from besa_cli.ops import affine
from besa_cli.ops.affine import Grid, Quantized
from besa_cli.ops.clipping import Clipped

_CHUNK = 1 << 20  # weights whose places on one grid after the other exist at a time


def quantize(
    weight: Float[Tensor, "rows cols"],
    keep: Bool[Tensor, "rows cols"],
    factor: Float[Tensor, "cols cols"],
    grid: Grid,
    *,
    search: bool = False,
    width: int = 128,
) -> Quantized:
    """Quantize column by column; each column's error, also that of what has to stay zero, is spread to the right.

    A pruned weight takes what the columns before it spread to it, is put back to zero, and passes that on as an error
    of its own; so only the surviving weights make up for anything.

    Parameters
    ----------
    weight : Tensor of shape (rows, cols)
    keep : boolean Tensor of shape (rows, cols)
        False where a weight has to be exactly zero.
    factor : Tensor of shape (cols, cols)
        Upper Cholesky factor of the inverse Hessian: `besa_cli.ops.obs.inverse_factor`.
    search : bool
        Lay the grid of each group where Σ_c (ŵ − w)²/U_cc² of its nearest codes is least, among those of
        `besa_cli.ops.clipping.Clipped.searched`, and not from extreme to extreme. The sum is what the errors of its
        columns cost, each by the formula of the paper, as if none passed its own on to the next.
    width : int
        Columns after which the error is spread over all columns further right.

    Returns
    -------
    Quantized
        The grid of a group is laid over its weights as they are when the first of its columns is reached.
    """
    updated = weight.float().clone()
    rows, cols = updated.shape
    group = grid.width(cols)
    scales = torch.empty(rows, grid.groups(cols), dtype=torch.float16, device=weight.device)
    zeros = torch.empty_like(scales, dtype=torch.uint8)
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=weight.device)
    costs = factor.diagonal().square().reciprocal()
    lonely = replace(grid, group_size=None)
    for start in range(0, cols, _step(group, width)):
        part = slice(start, min(start + _step(group, width), cols))
        errors = torch.zeros_like(updated[:, part])
        for index in range(part.start, part.stop):
            own = slice(index // group, index // group + 1)
            if index % group == 0:
                members = slice(index, min(index + group, cols))
                kept = updated[:, members].masked_fill(~keep[:, members], 0.0)
                reach = _reach(kept, lonely, costs[members]) if search else affine.extremes(kept, lonely)
                scales[:, own], zeros[:, own] = affine.scales_and_zeros(*reach, lonely)
            column = updated[:, index : index + 1]
            wished = column.masked_fill(~keep[:, index : index + 1], 0.0)
            code = affine.encode(wished, scales[:, own], zeros[:, own], grid)
            codes[:, index : index + 1] = code
            reached = (code.float() - zeros[:, own].float()) * scales[:, own].float()
            error = (column - reached) / factor[index, index]
            updated[:, index + 1 : part.stop] -= error * factor[index, index + 1 : part.stop]
            errors[:, index - part.start] = error[:, 0]
        updated[:, part.stop :] -= errors @ factor[part, part.stop :]
    return Quantized(codes=codes, scales=scales, zeros=zeros, grid=grid)


def _reach(
    weight: Float[Tensor, "rows cols"], grid: Grid, costs: Float[Tensor, " cols"]
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    found = []
    for part in torch.split(weight, max(_CHUNK // weight.shape[1], 1)):
        clipped = Clipped(part, grid)
        found.append(clipped.bounds(clipped.searched(costs)))
    low, high = (torch.cat(ends) for ends in zip(*found, strict=True))
    return low, high


def _step(group: int, width: int) -> int:
    """About `width` columns, so that no group begins before the columns that it needs are up to date."""
    if group <= width:
        return width // group * group
    return next(size for size in range(width, 0, -1) if group % size == 0)
