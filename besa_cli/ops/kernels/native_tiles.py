"""Products of pruned matrices in C++ (`tiles.cpp`), for tensors on the CPU; built when the package is installed.

The layout of the tiles is described in `tiles.h`.
"""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from besa_cli.errors import UsageError
from besa_cli.ops.kernels import library

LIBRARY = Path(__file__).with_name("tiles.so")
LEVELS = ("plain", "avx2", "avx512", "avx512bf16")  # instructions, the fastest last
TORCH = "torch"  # no level: the library was not built, or is not wanted
ROWS, COLS = 16, 64  # of a tile
MOST = 32  # vectors that `multiply` takes
PADDING = 64  # bytes behind the last tile that the kernels may read
_CHOICE = "BESA_INSTRUCTIONS"
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as `tiles.h` numbers them
INPUTS = tuple(TYPES)  # dtypes that vectors may have
_THREAD_WORK = 100_000  # weights: the least work that a further thread should take over


@cache
def supported() -> tuple[str, ...]:
    """Return the levels that the processor can run, the fastest last; none if the library was not built."""
    loaded = library.load(LIBRARY)
    if loaded is None:
        return ()
    return tuple(name for number, name in enumerate(LEVELS) if loaded.tiles_supports(ctypes.c_int64(number)))


def level() -> str:
    """Return the level in use: the fastest, or the one that ``BESA_INSTRUCTIONS`` names; ``torch`` if there is none.

    Raises
    ------
    UsageError
        BESA_INSTRUCTIONS names something else, or a level that the processor cannot run.
    """
    levels = (TORCH, *supported())
    choice = os.environ.get(_CHOICE)
    if not choice:
        return levels[-1]
    if choice not in levels:
        raise UsageError(f"{_CHOICE}={choice} is not one of {', '.join(levels)}", "unset it, or set it to one of these")
    return choice


def number() -> int:
    """Return the number that the C++ library gives the level in use, which is not ``torch``."""
    return LEVELS.index(level())


def reason() -> str:
    """Say in a few words why the fastest kernels are not in use."""
    if not supported():
        return "the C++ kernels were not built, for lack of a compiler"
    if os.environ.get(_CHOICE):
        return f"{_CHOICE} is {level()}"
    return "the processor has neither AVX2 nor AVX-512"


def block_starts(starts: Tensor, cols: int) -> Tensor:
    """Return the byte at which each block of 16 rows begins in the tiles, and at the end where the last one ends.

    Parameters
    ----------
    starts : Tensor of shape (rows + 1,), int64
        Index of the first value of each row, and the number of all values.
    cols : int
    """
    rows = len(starts) - 1
    blocks, masks = -(-rows // ROWS), -(-cols // COLS) * COLS * ROWS // 8
    firsts = (torch.arange(blocks + 1) * ROWS).clamp_max(rows)
    return starts[firsts] * 2 + torch.arange(blocks + 1) * masks


def packed_bytes(blocks: Tensor) -> int:
    """Return the bytes of the buffer that `pack` fills, given the starts of its blocks."""
    return int(blocks[-1]) + PADDING


def pack(mask: Tensor, values: Tensor, starts: Tensor, blocks: Tensor, cols: int, out: Tensor) -> None:
    """Write a matrix as tiles.

    Parameters
    ----------
    mask : Tensor of shape (rows, ⌈cols / 8⌉), uint8
        As `besa_cli.ops.packing.pack_mask` gives it: bits beyond the last column are 0.
    values : Tensor of shape (kept,), bf16 or fp16
    starts : Tensor of shape (rows + 1,), int64
        Index of the first value of each row by the mask, and `kept`.
    blocks : Tensor
        From `block_starts`.
    cols : int
    out : Tensor of `packed_bytes(blocks)` bytes, uint8, of zeros
    """
    sizes = (mask.shape[0], cols, threads(mask.shape[0] * cols))
    call("tiles_pack", mask, values, starts, blocks, out, sizes=sizes)


def multiply(tiles: Tensor, blocks: Tensor, inputs: Tensor, rows: int, value: torch.dtype) -> Tensor:
    """Multiply tiles with 1 to 32 vectors in fp32: (vectors, cols) → (vectors, rows), in the dtype of the inputs.

    Parameters
    ----------
    tiles, blocks : Tensors
        From `pack` and `block_starts`.
    inputs : Tensor of shape (vectors, cols), bf16, fp16 or fp32
    rows : int
    value : dtype
        bf16 or fp16: the dtype of the values in the tiles.
    """
    inputs = inputs.contiguous()
    vectors, cols = inputs.shape
    outputs = inputs.new_empty(vectors, rows)
    sizes = (rows, cols, vectors, TYPES[value], TYPES[inputs.dtype], number(), threads(rows * cols))
    call("tiles_multiply", tiles, blocks, inputs, outputs, sizes=sizes)
    return outputs


def expand(tiles: Tensor, blocks: Tensor, rows: int, first: int, out: Tensor) -> None:
    """Write the rows of the blocks from `first` on into `out`, as many as it has; it is of shape (…, cols), 16-bit."""
    height, cols = out.shape
    sizes = (rows, cols, first, first + -(-height // ROWS), number(), threads(out.numel()))
    call("tiles_expand", tiles, blocks, out, sizes=sizes)


def multiplies_dense(weight: Tensor, inputs: Tensor) -> bool:
    """Check that `multiply_dense` supports the weight and the vectors here."""
    supported = weight.dtype in (torch.bfloat16, torch.float16) and inputs.dtype in INPUTS and weight.is_contiguous()
    return supported and weight.device.type == inputs.device.type == "cpu" and level() != TORCH


def multiply_dense(weight: Tensor, inputs: Tensor) -> Tensor:
    """Multiply a dense matrix with one vector in fp32: (1, cols) → (1, rows), in the dtype of the inputs.

    Parameters
    ----------
    weight : Tensor of shape (rows, cols), bf16 or fp16
    inputs : Tensor of shape (1, cols), bf16, fp16 or fp32
    """
    inputs = inputs.contiguous()
    rows, cols = weight.shape
    outputs = inputs.new_empty(1, rows)
    level_and_threads = (number(), threads(rows * cols))
    sizes = (rows, cols, TYPES[weight.dtype], TYPES[inputs.dtype], *level_and_threads)
    call("dense_multiply", weight, inputs, outputs, sizes=sizes)
    return outputs


def threads(work: int) -> int:
    """Return the number of threads for a matrix of `work` weights."""
    return max(1, min(torch.get_num_threads(), work // _THREAD_WORK))


def call(function: str, *tensors: Tensor, sizes: tuple[int, ...]) -> None:
    """Call a C function with pointers to tensors and 64-bit integers."""
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
    getattr(library.load(LIBRARY), function)(*pointers, *map(ctypes.c_int64, sizes))
