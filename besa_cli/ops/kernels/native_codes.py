"""Products of quantized matrices in C++, for tensors on the CPU: codes stay packed, with or without a mask.

The layout of the tiles is described in `tiles.h`; `native_tiles` chooses the instructions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor

from besa_cli.ops.kernels import native_tiles
from besa_cli.ops.kernels.native_tiles import COLS, PADDING, ROWS

_STREAMS = {4: 2, 8: 1}  # of codes in a tile, by bits
_HALF = COLS // 2


@dataclass(frozen=True, kw_only=True)
class Format:
    """Layout of the codes of a matrix, and what they stand for.

    Attributes
    ----------
    rows, cols : int
    bits : int
        4 or 8: of a stored code.
    masked : bool
        Only codes that do not stand for zero are stored, and one bit per weight.
    width : int
        Number of columns in a group, such that `supports` it.
    middle : int
        Zero point of all groups, where no zero points are given.
    value : dtype
        bf16 or fp16: what the weights are rounded to.
    """

    rows: int
    cols: int
    bits: int
    masked: bool
    width: int
    middle: int
    value: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A matrix of codes for the kernels.

    Attributes
    ----------
    format : Format
    tiles : Tensor, uint8
        From `pack`.
    blocks : Tensor, int64
        From `block_starts`.
    scales : Tensor, fp16
        From `by_blocks`.
    zeros : Tensor, uint8
        The same of zero points; empty if all are the middle.
    """

    format: Format
    tiles: UInt8[Tensor, " bytes"]
    blocks: Int64[Tensor, " starts"]
    scales: Float[Tensor, "blocks groups 16"]
    zeros: UInt8[Tensor, "..."]


def supports(width: int, cols: int) -> bool:
    """Check that the kernels know groups of `width` columns: multiples of 32, or whole rows."""
    return width % _HALF == 0 or width >= cols


def by_blocks(values: Shaped[Tensor, "rows groups"]) -> Shaped[Tensor, "blocks groups 16"]:
    """Order scales or zero points by blocks of 16 rows; rows that fill the last block have ones."""
    rows, groups = values.shape
    blocks = -(-rows // ROWS)
    padded = torch.nn.functional.pad(values, (0, 0, 0, blocks * ROWS - rows), value=1)
    return padded.view(blocks, ROWS, groups).transpose(1, 2).contiguous()


def block_starts(kept: Bool[Tensor, "rows cols"], bits: int, *, masked: bool) -> Int64[Tensor, " starts"]:
    """Return the byte at which each block of 16 rows begins in the tiles, and at the end where the last one ends.

    Parameters
    ----------
    kept : Tensor of shape (rows, cols)
        The codes that do not stand for zero.
    bits : int
        4 or 8.
    masked : bool
    """
    rows, cols = kept.shape
    blocks, tiles, streams = -(-rows // ROWS), -(-cols // COLS), _STREAMS[bits]
    if masked:
        padded = torch.nn.functional.pad(kept, (0, tiles * COLS - cols, 0, blocks * ROWS - rows))
        counts = padded.view(blocks, streams, ROWS // streams, tiles, COLS).sum((2, 4))
        sizes = counts.amax(1).sum(1) + tiles * COLS * ROWS // 8
    else:
        sizes = torch.full((blocks,), tiles * COLS * ROWS // streams)
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def packed_bytes(blocks: Int64[Tensor, " starts"]) -> int:
    """Return the bytes of the buffer that `pack` fills, given the starts of its blocks."""
    return int(blocks[-1]) + PADDING


def pack(
    codes: UInt8[Tensor, "rows cols"],
    zeros: UInt8[Tensor, "blocks groups 16"],
    blocks: Int64[Tensor, " starts"],
    format: Format,
    out: UInt8[Tensor, " bytes"],
) -> None:
    """Write codes as tiles.

    Parameters
    ----------
    codes : Tensor of shape (rows, cols), uint8
    zeros : Tensor
        From `by_blocks`, of symmetric grids, too.
    blocks : Tensor
        From `block_starts` of `codes` that differ from their zero points.
    format : Format
    out : Tensor of `packed_bytes(blocks)` bytes, uint8, of zeros
    """
    sizes = (format.rows, format.cols, format.width, format.bits, int(format.masked))
    threads = native_tiles.threads(codes.numel())
    native_tiles.call("codes_pack", codes.contiguous(), zeros, blocks, out, sizes=(*sizes, threads))


def multiply(codes: Codes, inputs: Float[Tensor, "vectors cols"]) -> Float[Tensor, "vectors rows"]:
    """Multiply codes with 1 to 32 vectors in fp32; the result has the dtype of the inputs: bf16, fp16 or fp32."""
    inputs, rows = inputs.contiguous(), codes.format.rows
    outputs = inputs.new_empty(len(inputs), rows)
    tensors = (codes.tiles, codes.blocks, codes.scales, codes.zeros, inputs, outputs)
    level_and_threads = (native_tiles.number(), native_tiles.threads(rows * codes.format.cols))
    sizes = (*_sizes(codes.format), len(inputs), native_tiles.TYPES[inputs.dtype], *level_and_threads)
    native_tiles.call("codes_multiply", *tensors, sizes=sizes)
    return outputs


def expand(codes: Codes, first: int, out: Shaped[Tensor, "part cols"]) -> None:
    """Write the rows of the blocks from `first` on into `out`, as many as it has, in the dtype of the format."""
    tensors = (codes.tiles, codes.blocks, codes.scales, codes.zeros, out)
    last = first + -(-len(out) // ROWS)
    sizes = (*_sizes(codes.format), first, last, native_tiles.number(), native_tiles.threads(out.numel()))
    native_tiles.call("codes_expand", *tensors, sizes=sizes)


def _sizes(format: Format) -> tuple[int, ...]:
    value = native_tiles.TYPES[format.value]
    return (format.rows, format.cols, format.width, format.middle, format.bits, int(format.masked), value)
