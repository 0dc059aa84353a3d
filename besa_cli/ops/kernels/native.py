"""The inner loops of learning in C++ (`loops.cpp`), for tensors on the CPU; built when the package is installed.

All functions return None for tensors that the library does not support.
"""

import ctypes
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from besa_cli.ops.kernels import library, plain

LIBRARY = Path(__file__).with_name("loops.so")
_NAMES = {
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int16: "short",
    torch.int32: "int",
}
_THREAD_COST = 70_000  # ns to start a thread and wait for it: the least work that it should take over
_RANK, _MASK, _SUM, _GRID, _SLOPE = 5.0, 0.1, 0.6, 0.1, 0.5  # approximate ns per weight


def _function(name: str, *types: torch.dtype) -> "ctypes._NamedFuncPointer | None":
    loaded = library.load(LIBRARY)
    if loaded is None or not all(dtype in _NAMES for dtype in types):
        return None
    return getattr(loaded, "_".join([name, *(_NAMES[dtype] for dtype in types)]), None)


def available() -> bool:
    """Check that the library was built for this machine."""
    return library.load(LIBRARY) is not None


def computes_in(dtype: torch.dtype) -> bool:
    """Check that masked weights and their gradients may have this dtype."""
    return _function("mask", torch.float32, dtype, torch.int16) is not None


def ranks(scores: Tensor) -> Tensor | None:
    """Run the C++ loop of `besa_cli.ops.kernels.ranks`."""
    rows, cols = scores.shape
    result = torch.empty(rows, cols, dtype=plain.index_type(cols))
    function = _function("ranks", result.dtype)
    if function is None or scores.dtype != torch.float32 or not _supported(scores):
        return None
    _call(function, scores, result, sizes=(rows, cols), cost=_RANK)
    return result


def mask(weight: Tensor, ranks: Tensor, counts: Tensor, out: Tensor) -> Tensor | None:
    """Run the C++ loop of `besa_cli.ops.kernels.mask`."""
    function = _function("mask", weight.dtype, out.dtype, ranks.dtype)
    if function is None or not _supported(weight, ranks, out):
        return None
    _call(function, weight, ranks, counts.to(torch.int32).contiguous(), out, sizes=weight.shape, cost=_MASK)
    return out


def candidate_sums(gradient: Tensor, weight: Tensor, ranks: Tensor, count: int, floored: bool = False) -> Tensor | None:
    """Run the C++ loop of `besa_cli.ops.kernels.candidate_sums`."""
    rows, cols = weight.shape
    function = _function("sums", gradient.dtype, weight.dtype, ranks.dtype)
    if function is None or not _supported(gradient, weight, ranks):
        return None
    result = torch.empty(rows, count + 1)
    first_pruned = _first_pruned(count, cols, floored)
    _call(function, gradient, weight, ranks, first_pruned, result, sizes=(rows, cols, count + 1), cost=_SUM)
    return result


def on_grid(weight: Tensor, scales: Tensor, zeros: Tensor, width: int, top: int) -> Tensor | None:
    """Run the C++ loop of `besa_cli.ops.kernels.on_grid`."""
    function = _function("grid", weight.dtype)
    if function is None or not _supported(weight, scales, zeros) or not _are_per_group(weight, scales, zeros, width):
        return None
    result = torch.empty_like(weight, dtype=torch.float32)
    _call(function, weight, scales, zeros, result, sizes=(*weight.shape, width, top), cost=_GRID)
    return result


def grid_slopes(
    gradient: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, width: int, top: int
) -> tuple[Tensor, Tensor] | None:
    """Run the C++ loop of `besa_cli.ops.kernels.grid_slopes`."""
    function = _function("slopes", weight.dtype)
    if function is None or not _supported(gradient, weight, scales, zeros) or gradient.dtype != torch.float32:
        return None
    if gradient.shape != weight.shape or not _are_per_group(weight, scales, zeros, width):
        return None
    slopes = torch.empty_like(scales), torch.empty_like(scales)
    _call(function, gradient, weight, scales, zeros, *slopes, sizes=(*weight.shape, width, top), cost=_SLOPE)
    return slopes


def _supported(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)


def _are_per_group(weight: Tensor, scales: Tensor, zeros: Tensor, width: int) -> bool:
    """Check that there is an fp32 scale and zero point for each group; otherwise the plain form reports the error."""
    groups = (weight.shape[0], -(-weight.shape[1] // width))
    return all(tensor.shape == groups and tensor.dtype == torch.float32 for tensor in (scales, zeros))


def _call(function: "ctypes._NamedFuncPointer", *tensors: Tensor, sizes: tuple[int, ...], cost: float) -> None:
    """Call a function on as many threads as have enough work.

    Parameters
    ----------
    function : C function
    tensors : Tensors
        Passed by pointer.
    sizes : tuple of int
        Begin with rows and columns; passed as 64-bit integers, followed by the number of threads.
    cost : float
        Approximate ns per weight.
    """
    threads = int(sizes[0] * sizes[1] * cost / _THREAD_COST)
    arguments = (*sizes, max(1, min(torch.get_num_threads(), threads)))
    function(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors), *map(ctypes.c_int64, arguments))


@cache
def _first_pruned(count: int, cols: int, floored: bool) -> Tensor:
    """Return the index, 1 … `count`, of the first candidate that prunes each rank, as uint16."""
    table = torch.empty(cols, dtype=torch.uint16)
    for d, (start, stop) in enumerate(pairwise(plain.cuts(count, cols, floored)), 1):
        table[start:stop] = d
    return table
