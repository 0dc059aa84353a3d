"""Pruned matrices in memory: one bit per weight and the kept values, multiplied without expanding the whole matrix."""

import mmap
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor
from typing_extensions import override

from besa_cli.ops import packing
from besa_cli.ops.kernels import native_tiles

_EXPANDED = 4 << 20  # bytes of the matrix that are expanded at a time, for products with many vectors


@dataclass(frozen=True, kw_only=True)
class PackedMatrix(ABC):
    """A matrix of shape (rows, cols) with values in bf16 or fp16, most of them zero.

    Attributes
    ----------
    rows, cols : int
    dtype : dtype
        Of the values.
    data : Tensor, uint8
        Masks and values.
    """

    rows: int
    cols: int
    dtype: torch.dtype
    data: UInt8[Tensor, " bytes"]

    @abstractmethod
    def expand_into(self, out: Shaped[Tensor, "part cols"], first: int) -> None:
        """Write the rows from `first`, a multiple of 16, on into `out`."""

    def expand(self) -> Shaped[Tensor, "rows cols"]:
        """Return the dense matrix."""
        out = torch.empty(self.rows, self.cols, dtype=self.dtype)
        self.expand_into(out, 0)
        return out

    def multiply(self, inputs: Float[Tensor, "vectors cols"]) -> Float[Tensor, "vectors rows"]:
        """Multiply with vectors; the result has the dtype of the inputs (bf16, fp16 or fp32).

        Rows are expanded a few at a time, into memory that stays in the cache, and multiplied by torch.
        """
        outputs = inputs.new_empty(len(inputs), self.rows)
        rows_at_once = max(_EXPANDED // (2 * max(self.cols, 1)) // native_tiles.ROWS, 1) * native_tiles.ROWS
        buffer = torch.empty(min(rows_at_once, self.rows), self.cols, dtype=self.dtype)
        for first in range(0, self.rows, rows_at_once):
            dense = buffer[: self.rows - first]
            self.expand_into(dense, first)
            outputs[:, first : first + len(dense)] = torch.nn.functional.linear(inputs, dense.to(inputs.dtype))
        return outputs


@dataclass(frozen=True, kw_only=True)
class TiledMatrix(PackedMatrix):
    """A matrix in the order in which the C++ kernels read it.

    Attributes
    ----------
    blocks : Tensor, int64
        Byte of `data` at which each block of 16 rows begins.
    """

    blocks: Int64[Tensor, " blocks"]

    @override
    def expand_into(self, out: Shaped[Tensor, "part cols"], first: int) -> None:
        block = first // native_tiles.ROWS
        native_tiles.expand(self.data, self.blocks, self.rows, block, out)

    @override
    def multiply(self, inputs: Float[Tensor, "vectors cols"]) -> Float[Tensor, "vectors rows"]:
        if 0 < len(inputs) <= native_tiles.MOST:
            return native_tiles.multiply(self.data, self.blocks, inputs, self.rows, self.dtype)
        return super().multiply(inputs)


@dataclass(frozen=True, kw_only=True)
class MaskedMatrix(PackedMatrix):
    """A matrix as the checkpoint stores it, multiplied with torch alone: `data` holds the values, then the mask.

    Attributes
    ----------
    starts : Tensor of shape (rows + 1,), int64
        Index of the first value of each row, and the number of values.
    """

    starts: Int64[Tensor, " starts"]

    @override
    def expand_into(self, out: Shaped[Tensor, "part cols"], first: int) -> None:
        last = first + len(out)
        kept, value_bytes = int(self.starts[-1]), self.dtype.itemsize
        values = self.data[: kept * value_bytes].view(self.dtype)
        bits = self.data[kept * value_bytes :].view(self.rows, -(-self.cols // 8))
        mask = packing.unpack_mask(bits[first:last], self.cols)
        out.copy_(packing.expand(mask, values[int(self.starts[first]) : int(self.starts[last])]))


def pack(mask: Bool[Tensor, "rows cols"], values: Float[Tensor, " kept"]) -> PackedMatrix:
    """Pack a matrix for the kernels, or for torch where there are none.

    Parameters
    ----------
    mask : Tensor of shape (rows, cols)
    values : Tensor of shape (kept,), bf16 or fp16
        Kept values, row after row: as many as the mask marks.
    """
    rows, cols = mask.shape
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(mask.sum(1), 0, out=starts[1:])
    bits, values = packing.pack_mask(mask), values.contiguous()
    if native_tiles.level() == native_tiles.TORCH:
        data = torch.cat([values.view(torch.uint8), bits.flatten()])
        return MaskedMatrix(rows=rows, cols=cols, dtype=values.dtype, data=data, starts=starts)
    blocks = native_tiles.block_starts(starts, cols)
    data = huge_pages(native_tiles.packed_bytes(blocks))
    native_tiles.pack(bits, values, starts, blocks, cols, data)
    return TiledMatrix(rows=rows, cols=cols, dtype=values.dtype, data=data, blocks=blocks)


def huge_pages(size: int) -> UInt8[Tensor, " size"]:
    """Return `size` bytes of zeros, in large pages of memory where the system has them: a third faster to read."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
