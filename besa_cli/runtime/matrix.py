"""Pruned matrices in memory: one bit per weight and the kept values, multiplied without expanding the whole matrix."""

import mmap
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor
from typing_extensions import override

from besa_cli.ops import affine, packing
from besa_cli.ops.affine import Quantized
from besa_cli.ops.kernels import native_codes, native_tiles

_LINE = 64  # bytes
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
        All that is stored of the matrix.
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
        outputs = inputs.new_empty(self.rows, len(inputs))
        rows_at_once = max(_EXPANDED // (2 * max(self.cols, 1)) // native_tiles.ROWS, 1) * native_tiles.ROWS
        buffer = torch.empty(min(rows_at_once, self.rows), self.cols, dtype=self.dtype)
        for first in range(0, self.rows, rows_at_once):
            dense = buffer[: self.rows - first]
            self.expand_into(dense, first)
            torch.mm(dense.to(inputs.dtype), inputs.T, out=outputs[first : first + len(dense)])
        return outputs.T.contiguous()


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


@dataclass(frozen=True, kw_only=True)
class CodedMatrix(PackedMatrix):
    """A quantized matrix in the order in which the C++ kernels read it.

    Attributes
    ----------
    codes : Codes
        Views of `data`.
    """

    codes: native_codes.Codes

    @override
    def expand_into(self, out: Shaped[Tensor, "part cols"], first: int) -> None:
        native_codes.expand(self.codes, first // native_tiles.ROWS, out)

    @override
    def multiply(self, inputs: Float[Tensor, "vectors cols"]) -> Float[Tensor, "vectors rows"]:
        if 0 < len(inputs) <= native_tiles.MOST:
            return native_codes.multiply(self.codes, inputs)
        return super().multiply(inputs)


@dataclass(frozen=True, kw_only=True)
class QuantizedMatrix(PackedMatrix):
    """A quantized matrix multiplied with torch alone: `data` holds the codes of each row, those of zeros, too.

    Attributes
    ----------
    quantized : Quantized
        Scales, zero points and grid; its codes are packed, of shape (rows, bytes).
    """

    quantized: Quantized

    @override
    def expand_into(self, out: Shaped[Tensor, "part cols"], first: int) -> None:
        rows = slice(first, first + len(out))
        codes = packing.unpack_codes(self.quantized.codes[rows], self.quantized.grid.bits, self.cols)
        scales, zeros = self.quantized.scales[rows], self.quantized.zeros[rows]
        part = Quantized(codes=codes, scales=scales, zeros=zeros, grid=self.quantized.grid)
        out.copy_(affine.dequantize(part))


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


def pack_codes(quantized: Quantized, dtype: torch.dtype) -> PackedMatrix:
    """Pack a quantized matrix for the kernels, or for torch where there are none.

    Codes of fewer than 4 bits take 4. Groups that are neither whole rows nor multiples of 32 columns are not kept: the
    matrix is packed by its weights.

    Parameters
    ----------
    quantized : Quantized
    dtype : dtype
        bf16 or fp16: what its weights are rounded to.
    """
    grid, (rows, cols) = quantized.grid, quantized.codes.shape
    if native_tiles.level() == native_tiles.TORCH:
        return _pack_rows(quantized, dtype)
    if not native_codes.supports(grid.width(cols), cols):
        dense = affine.dequantize(quantized).to(dtype)
        mask = packing.stored_mask(dense)
        return pack(mask, dense[mask])
    bits = max(grid.bits, 4)
    kept = quantized.codes != affine.per_column(quantized.zeros, grid, cols)
    starts = {masked: native_codes.block_starts(kept, bits, masked=masked) for masked in (True, False)}
    masked = bool(starts[True][-1] <= starts[False][-1])
    blocks = starts[masked]
    format = native_codes.Format(
        rows=rows, cols=cols, bits=bits, masked=masked, width=grid.width(cols), middle=grid.middle, value=dtype
    )
    scales, zeros = native_codes.by_blocks(quantized.scales), native_codes.by_blocks(quantized.zeros)
    stored_zeros = zeros.flatten()[: 0 if grid.symmetric else None]
    data, (tiles, *views) = _one_buffer(native_codes.packed_bytes(blocks), scales.nbytes, stored_zeros.nbytes)
    native_codes.pack(quantized.codes, zeros, blocks, format, tiles)
    scales = views[0].view(torch.float16).view(scales.shape).copy_(scales)
    codes = native_codes.Codes(
        format=format, tiles=tiles, blocks=blocks, scales=scales, zeros=views[1].copy_(stored_zeros)
    )
    return CodedMatrix(rows=rows, cols=cols, dtype=dtype, data=data, codes=codes)


def _pack_rows(quantized: Quantized, dtype: torch.dtype) -> QuantizedMatrix:
    """Pack a quantized matrix for torch."""
    grid, (rows, cols) = quantized.grid, quantized.codes.shape
    packed = packing.pack_codes(quantized.codes, grid.bits)
    stored_zeros = quantized.zeros.flatten()[: 0 if grid.symmetric else None]
    data, views = _one_buffer(packed.nbytes, quantized.scales.nbytes, stored_zeros.nbytes)
    codes = views[0].view(packed.shape).copy_(packed)
    scales = views[1].view(torch.float16).view(quantized.scales.shape).copy_(quantized.scales)
    zeros = torch.tensor(grid.middle, dtype=torch.uint8).expand(scales.shape)
    if not grid.symmetric:
        zeros = views[2].view(scales.shape).copy_(quantized.zeros)
    quantized = Quantized(codes=codes, scales=scales, zeros=zeros, grid=grid)
    return QuantizedMatrix(rows=rows, cols=cols, dtype=dtype, data=data, quantized=quantized)


def _one_buffer(*sizes: int) -> tuple[UInt8[Tensor, " bytes"], list[UInt8[Tensor, " bytes"]]]:
    """Return a buffer of zeros and views of it with these numbers of bytes, each beginning at a line of the cache."""
    places = [0]
    for size in sizes:
        places.append(places[-1] + -(-size // _LINE) * _LINE)
    data = huge_pages(max(places[-1], 1))
    return data, [data[place : place + size] for place, size in zip(places, sizes, strict=False)]


def huge_pages(size: int) -> UInt8[Tensor, " size"]:
    """Return `size` bytes of zeros, in large pages of memory where the system has them: a third faster to read."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
