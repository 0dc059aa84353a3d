"""The inner loops of learning in plain torch, on any device: the oracle of the faster forms."""

from functools import cache

import torch
from torch import Tensor

_CHUNK = 1 << 22  # weights whose indices, or places on a grid, exist at a time


def index_type(cols: int) -> torch.dtype:
    """16-bit numbers below 32,768 columns, 32-bit ones above."""
    return torch.int16 if cols < 2**15 else torch.int32


@cache
def cuts(count: int, cols: int, floored: bool = False) -> tuple[int, ...]:
    """How many ranks j satisfy j < p_d·C, for d = 0 … D: ⌈d·C/D⌉, by whole numbers; ⌊d·C/D⌋ where floored."""
    return tuple((d * cols if floored else d * cols + count - 1) // count for d in range(count + 1))


def ranks(scores: Tensor) -> Tensor:
    """See `besa_cli.ops.kernels.ranks`."""
    rows, cols = scores.shape
    result = torch.empty(rows, cols, dtype=index_type(cols), device=scores.device)
    places = torch.arange(cols, dtype=result.dtype, device=scores.device)
    for part in _chunks(rows, cols):
        order = scores[part].argsort(dim=1, stable=True)
        result[part] = torch.empty_like(result[part]).scatter_(1, order, places.expand_as(order))
    return result


def mask(weight: Tensor, ranks: Tensor, counts: Tensor, out: Tensor) -> Tensor:
    """See `besa_cli.ops.kernels.mask`."""
    pruned = ranks < counts.to(ranks.dtype).unsqueeze(1)
    return out.copy_(weight).masked_fill_(pruned, 0.0)


def candidate_sums(gradient: Tensor, weight: Tensor, ranks: Tensor, count: int, floored: bool = False) -> Tensor:
    """See `besa_cli.ops.kernels.candidate_sums`."""
    rows, cols = weight.shape
    ends = torch.tensor(cuts(count, cols, floored), device=weight.device)
    result = torch.empty(rows, count + 1, device=weight.device)
    for part in _chunks(rows, cols):
        product = gradient[part].float() * weight[part].float()
        sums = torch.empty_like(product).scatter_(1, ranks[part].long(), product).cumsum(1)
        result[part] = torch.nn.functional.pad(sums, (1, 0))[:, ends]
    return result.neg_()


def on_grid(weight: Tensor, scales: Tensor, zeros: Tensor, width: int, top: int) -> Tensor:
    """See `besa_cli.ops.kernels.on_grid`."""
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
    """See `besa_cli.ops.kernels.grid_slopes`."""
    by_scale, by_zero = torch.empty_like(scales), torch.empty_like(scales)
    for part in _chunks(*weight.shape):
        h, z = scales[part].unsqueeze(2), zeros[part].unsqueeze(2)
        slope, steps = grouped(gradient[part].float(), width), grouped(weight[part].float(), width).div(h)
        wished = steps.round().add_(z)
        codes = wished.clamp(0, top)
        clipped = codes != wished
        by_scale[part] = codes.sub_(z).sub_(steps.masked_fill_(clipped, 0.0)).mul_(slope).sum(2)
        by_zero[part] = (slope * clipped).sum(2).mul_(-scales[part])
    return by_scale, by_zero


def grouped(matrix: Tensor, width: int) -> Tensor:
    """(rows, groups, width): `width` columns a group; a shorter last group is filled up with zeros."""
    rows, cols = matrix.shape
    missing = -cols % width
    if missing:
        matrix = torch.nn.functional.pad(matrix, (0, missing))
    return matrix.reshape(rows, -1, width)


def _chunks(rows: int, cols: int) -> list[slice]:
    step = max(_CHUNK // cols, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
