"""The inner loops of learning in plain torch, for any device: the reference for the faster implementations."""

from functools import cache

import torch
from torch import Tensor

_CHUNK = 1 << 22  # weights processed at a time, to bound the memory of indices and codes


def index_type(cols: int) -> torch.dtype:
    """Return the dtype of ranks: int16 below 32,768 columns, else int32."""
    return torch.int16 if cols < 2**15 else torch.int32


@cache
def cuts(count: int, cols: int, floored: bool = False) -> tuple[int, ...]:
    """Count the ranks j < p_d·C for d = 0 … D: ⌈d·C/D⌉, by integer arithmetic; ⌊d·C/D⌋ if `floored`."""
    return tuple((d * cols if floored else d * cols + count - 1) // count for d in range(count + 1))


def ranks(scores: Tensor) -> Tensor:
    """Rank by stable sorting, in chunks of rows."""
    rows, cols = scores.shape
    result = torch.empty(rows, cols, dtype=index_type(cols), device=scores.device)
    places = torch.arange(cols, dtype=result.dtype, device=scores.device)
    for part in _chunks(rows, cols):
        order = scores[part].argsort(dim=1, stable=True)
        result[part] = torch.empty_like(result[part]).scatter_(1, order, places.expand_as(order))
    return result


def mask(weight: Tensor, ranks: Tensor, counts: Tensor, out: Tensor) -> Tensor:
    """Copy the weight and zero the pruned elements."""
    pruned = ranks < counts.to(ranks.dtype).unsqueeze(1)
    return out.copy_(weight).masked_fill_(pruned, 0.0)


def candidate_sums(gradient: Tensor, weight: Tensor, ranks: Tensor, count: int, floored: bool = False) -> Tensor:
    """Sum by scattering the products into rank order and accumulating, in chunks of rows."""
    rows, cols = weight.shape
    ends = torch.tensor(cuts(count, cols, floored), device=weight.device)
    result = torch.empty(rows, count + 1, device=weight.device)
    for part in _chunks(rows, cols):
        product = gradient[part].float() * weight[part].float()
        sums = torch.empty_like(product).scatter_(1, ranks[part].long(), product).cumsum(1)
        result[part] = torch.nn.functional.pad(sums, (1, 0))[:, ends]
    return result.neg_()


def on_grid(weight: Tensor, scales: Tensor, zeros: Tensor, width: int, top: int) -> Tensor:
    """Round to the grid, in chunks of rows."""
    result = torch.empty_like(weight, dtype=torch.float32)
    for part in _chunks(*weight.shape):
        h, z = scales[part].unsqueeze(2), zeros[part].unsqueeze(2)
        steps = grouped(weight[part].float(), width).div(h)
        kept = steps.round_().add_(z).clamp_(0, top).sub_(z).mul_(h)
        result[part] = kept.flatten(1)[:, : weight.shape[1]]
    return result


def grid_slopes(
    gradient: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, width: int, top: int
) -> tuple[Tensor, Tensor]:
    """Sum the slopes of every group, in chunks of rows."""
    by_scale, by_zero = torch.empty_like(scales), torch.empty_like(scales)
    for part in _chunks(*weight.shape):
        h, z = scales[part].unsqueeze(2), zeros[part].unsqueeze(2)
        slope, steps = grouped(gradient[part].float(), width), grouped(weight[part].float(), width).div(h)
        unclipped = steps.round().add_(z)
        codes = unclipped.clamp(0, top)
        clipped = codes != unclipped
        by_scale[part] = codes.sub_(z).sub_(steps.masked_fill_(clipped, 0.0)).mul_(slope).sum(2)
        by_zero[part] = (slope * clipped).sum(2).mul_(-scales[part])
    return by_scale, by_zero


def grouped(matrix: Tensor, width: int) -> Tensor:
    """Reshape to (rows, groups, width), `width` columns per group; a shorter last group is padded with zeros."""
    rows, cols = matrix.shape
    missing = -cols % width
    if missing:
        matrix = torch.nn.functional.pad(matrix, (0, missing))
    return matrix.reshape(rows, -1, width)


def _chunks(rows: int, cols: int) -> list[slice]:
    step = max(_CHUNK // cols, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
