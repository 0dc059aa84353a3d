"""The inner loops of learning in C++ (`loops.cpp`), for tensors on the CPU; built when the package is installed."""

import ctypes
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from besa_cli.ops.kernels import plain

LIBRARY = Path(__file__).with_name("loops.so")
_NAMES = {
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int16: "short",
    torch.int32: "int",
}
_WORTH = 70_000  # ns of work that another thread should take over: to start one and wait for it costs as much
_RANK, _MASK, _SUM, _GRID, _SLOPE = 5.0, 0.1, 0.6, 0.1, 0.5  # ns for each weight, about


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(LIBRARY))
    except OSError:  # not built: there was no compiler
        return None


def _function(name: str, *types: torch.dtype) -> "ctypes._NamedFuncPointer | None":
    library = _library()
    if library is None or not all(dtype in _NAMES for dtype in types):
        return None
    return getattr(library, "_".join([name, *(_NAMES[dtype] for dtype in types)]), None)


def available() -> bool:
    """Whether the library was built for this machine."""
    return _library() is not None


def computes_in(dtype: torch.dtype) -> bool:
    """Whether masked weights and their gradients may be of this dtype."""
    return _function("mask", torch.float32, dtype, torch.int16) is not None


def ranks(scores: Tensor) -> Tensor | None:
    """See `besa_cli.ops.kernels.ranks`; None where the library does not serve these tensors, as in all of these."""
    rows, cols = scores.shape
    result = torch.empty(rows, cols, dtype=plain.index_type(cols))
    function = _function("ranks", result.dtype)
    if function is None or scores.dtype != torch.float32 or not _suited(scores):
        return None
    _call(function, scores, result, sizes=(rows, cols), each=_RANK)
    return result


def mask(weight: Tensor, ranks: Tensor, counts: Tensor, out: Tensor) -> Tensor | None:
    """See `besa_cli.ops.kernels.mask`."""
    function = _function("mask", weight.dtype, out.dtype, ranks.dtype)
    if function is None or not _suited(weight, ranks, out):
        return None
    _call(function, weight, ranks, counts.to(torch.int32).contiguous(), out, sizes=weight.shape, each=_MASK)
    return out


def candidate_sums(gradient: Tensor, weight: Tensor, ranks: Tensor, count: int, floored: bool = False) -> Tensor | None:
    """See `besa_cli.ops.kernels.candidate_sums`."""
    rows, cols = weight.shape
    function = _function("sums", gradient.dtype, weight.dtype, ranks.dtype)
    if function is None or not _suited(gradient, weight, ranks):
        return None
    result = torch.empty(rows, count + 1)
    first_pruned = _first_pruned(count, cols, floored)
    _call(function, gradient, weight, ranks, first_pruned, result, sizes=(rows, cols, count + 1), each=_SUM)
    return result


def on_grid(weight: Tensor, scales: Tensor, zeros: Tensor, width: int, top: int) -> Tensor | None:
    """See `besa_cli.ops.kernels.on_grid`."""
    function = _function("grid", weight.dtype)
    if function is None or not _suited(weight, scales, zeros) or not _fit(weight, scales, zeros, width):
        return None
    result = torch.empty_like(weight, dtype=torch.float32)
    _call(function, weight, scales, zeros, result, sizes=(*weight.shape, width, top), each=_GRID)
    return result


def grid_slopes(
    gradient: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, width: int, top: int
) -> tuple[Tensor, Tensor] | None:
    """See `besa_cli.ops.kernels.grid_slopes`."""
    function = _function("slopes", weight.dtype)
    if function is None or not _suited(gradient, weight, scales, zeros) or gradient.dtype != torch.float32:
        return None
    if gradient.shape != weight.shape or not _fit(weight, scales, zeros, width):
        return None
    found = torch.empty_like(scales), torch.empty_like(scales)
    _call(function, gradient, weight, scales, zeros, *found, sizes=(*weight.shape, width, top), each=_SLOPE)
    return found


def _suited(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)


def _fit(weight: Tensor, scales: Tensor, zeros: Tensor, width: int) -> bool:
    """Whether there is an fp32 number for each group; the plain form says what is wrong where there is not."""
    groups = (weight.shape[0], -(-weight.shape[1] // width))
    return all(each.shape == groups and each.dtype == torch.float32 for each in (scales, zeros))


def _call(function: "ctypes._NamedFuncPointer", *tensors: Tensor, sizes: tuple[int, ...], each: float) -> None:
    """Call it on as many threads as have enough to do: `sizes` begin with rows and columns, `each` is ns a weight."""
    enough = int(sizes[0] * sizes[1] * each / _WORTH)
    numbers = (*sizes, max(1, min(torch.get_num_threads(), enough)))
    function(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors), *map(ctypes.c_int64, numbers))


@cache
def _first_pruned(count: int, cols: int, floored: bool) -> Tensor:
    """For every rank the first candidate that prunes it: uint16 numbers from 1 to `count`."""
    table = torch.empty(cols, dtype=torch.uint16)
    for d, (start, stop) in enumerate(pairwise(plain.cuts(count, cols, floored)), 1):
        table[start:stop] = d
    return table
