"""Affine grids: weights as whole codes, with a scale and a zero point for each group; zero is a code of every grid.

    Ŵ = (Q − z)·h,   Q = clamp(round(W/h) + z, 0, 2^N − 1)

with h = (γ1·max(W) − γ0·min(W)) / (2^N − 1) and z = −round(γ0·min(W)/h) (BESA, arXiv 2402.16880, Eq. 7), the least and
greatest weight taken together with 0, so that z is a code and a zero weight stays exactly zero. A *group* is
`group_size` consecutive columns of one row; the last one of a row may be shorter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float16, Real, UInt8
from torch import Tensor

from besa_cli.errors import BesaError, UsageError
from besa_cli.ops.kernels import plain

BITS = (2, 3, 4, 8)
CHANNEL = "channel"
GROUP = "128"  # columns that share a scale where nothing else is said
LARGEST = torch.finfo(torch.float16).max
_SCALE_BITS = 16  # an fp16 number
_SMALLEST = 2.0**-24  # of the fp16 numbers above zero


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What codes a linear may take.

    Attributes
    ----------
    bits : int
        N: codes are 0 … 2^N − 1.
    group_size : int, optional
        Columns that share a scale; None for all columns of a row (per channel).
    symmetric : bool
        The zero point is 2^(N−1) everywhere; h = 2γ·max|W| / (2^N − 1).
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True

    def __str__(self) -> str:
        group = f"groups of {self.group_size}" if self.group_size else "channels"
        return f"{self.bits} bits in {group}, {'symmetric' if self.symmetric else 'asymmetric'}"

    @property
    def top(self) -> int:
        """The greatest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    def width(self, cols: int) -> int:
        """Columns in a group of a linear with `cols` columns."""
        return min(self.group_size or cols, cols)

    def groups(self, cols: int) -> int:
        """Groups in each row."""
        return -(-cols // self.width(cols))


def grid(bits: int, group_size: str, *, symmetric: bool) -> Grid:
    """The grid that the options ``--bits``, ``--group-size`` and ``--symmetric`` name.

    Raises
    ------
    UsageError
        No such grid.
    """
    if bits not in BITS:
        raise UsageError(f"--bits {bits} is none of {', '.join(map(str, BITS))}", "4 is the usual choice")
    if group_size != CHANNEL and not (group_size.isdecimal() and int(group_size)):
        raise UsageError(
            f"--group-size '{group_size}' is neither {CHANNEL} nor a number of columns", "128 is the usual choice"
        )
    return Grid(bits=bits, group_size=None if group_size == CHANNEL else int(group_size), symmetric=symmetric)


def grid_options(grid: Grid) -> dict[str, int | str | bool]:
    """Return the options ``--bits``, ``--group-size`` and ``--symmetric`` that name a grid: the inverse of `grid`."""
    group_size = CHANNEL if grid.group_size is None else str(grid.group_size)
    return {"bits": grid.bits, "group_size": group_size, "symmetric": grid.symmetric}


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """One linear on a grid.

    Attributes
    ----------
    codes : Tensor of shape (rows, cols), uint8
    scales : Tensor of shape (rows, groups), fp16
    zeros : Tensor of shape (rows, groups), uint8
    grid : Grid
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    grid: Grid


def to_tensors(quantized: Quantized, name: str) -> dict[str, Tensor]:
    """As stored, on the CPU: `name`.codes, `name`.scales and, on an asymmetric grid, `name`.zeros."""
    parts = {"codes": quantized.codes, "scales": quantized.scales, "zeros": quantized.zeros}
    return {
        f"{name}.{part}": tensor.cpu().contiguous()
        for part, tensor in parts.items()
        if part != "zeros" or not quantized.grid.symmetric
    }


def from_tensors(tensors: Mapping[str, Tensor], name: str, grid: Grid) -> Quantized:
    """The inverse of `tensors`."""
    codes, scales = tensors[f"{name}.codes"], tensors[f"{name}.scales"]
    middle = torch.full_like(scales, grid.middle, dtype=torch.uint8)
    return Quantized(
        codes=codes, scales=scales, zeros=middle if grid.symmetric else tensors[f"{name}.zeros"], grid=grid
    )


def per_column(values: Real[Tensor, "rows groups"], grid: Grid, cols: int) -> Real[Tensor, "rows cols"]:
    """Each group's value for each of its columns."""
    if values.shape[1] == 1:
        return values.expand(-1, cols)
    return values.repeat_interleave(grid.width(cols), dim=1)[:, :cols]


def grouped(weight: Float[Tensor, "rows cols"], grid: Grid) -> Float[Tensor, "rows groups width"]:
    """The columns by group; a shorter last group is filled up with zeros."""
    return plain.grouped(weight, grid.width(weight.shape[1]))


def extremes(
    weight: Float[Tensor, "rows cols"], grid: Grid
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """The least and the greatest weight of every group, 0 always among them; on a symmetric grid −max|W| and max|W|."""
    parts = grouped(weight.float(), grid)
    low, high = parts.amin(2).clamp_max(0.0), parts.amax(2).clamp_min(0.0)
    if grid.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    return low, high


def representable(steps: Float[Tensor, "rows groups"]) -> Float16[Tensor, "rows groups"]:
    """The nearest fp16 numbers above zero; 1 for a step of 0, which is that of a group of zeros alone."""
    return steps.half().clamp_min(_SMALLEST).masked_fill(steps == 0, 1.0)


def scales_and_zeros(
    low: Float[Tensor, "rows groups"], high: Float[Tensor, "rows groups"], grid: Grid
) -> tuple[Float16[Tensor, "rows groups"], UInt8[Tensor, "rows groups"]]:
    """The scales h (fp16 numbers) and zero points z of groups whose weights are to lie in [low, high].

    Parameters
    ----------
    low, high : Tensors of shape (rows, groups)
        low ≤ 0 ≤ high. A group of zeros alone gets the scale 1.

    Raises
    ------
    BesaError
        A scale is beyond fp16.
    """
    scales = representable((high - low) / grid.top)
    if not bool(scales.isfinite().all()):
        raise BesaError(
            f"weights as large as {float(torch.maximum(high, -low).max()):.3g} need a scale beyond fp16",
            "this model cannot be quantized; is one of its weights damaged?",
        )
    if grid.symmetric:
        return scales, torch.full_like(scales, grid.middle, dtype=torch.uint8)
    return scales, zero_points(low, scales.float(), grid).to(torch.uint8)


def zero_points(
    low: Float[Tensor, "rows groups"], scales: Float[Tensor, "rows groups"], grid: Grid
) -> Float[Tensor, "rows groups"]:
    """z = −round(low/h), a code of the grid."""
    return (-low / scales).round().clamp(0, grid.top)


def encode(
    weight: Float[Tensor, "rows cols"],
    scales: Float16[Tensor, "rows groups"],
    zeros: UInt8[Tensor, "rows groups"],
    grid: Grid,
) -> UInt8[Tensor, "rows cols"]:
    """The nearest code of every weight."""
    cols = weight.shape[1]
    h, z = per_column(scales.float(), grid, cols), per_column(zeros.float(), grid, cols)
    return ((weight.float() / h).round() + z).clamp(0, grid.top).to(torch.uint8)


def dequantize(quantized: Quantized) -> Float[Tensor, "rows cols"]:
    """Ŵ = (Q − z)·h, fp32."""
    cols, grid = quantized.codes.shape[1], quantized.grid
    h, z = per_column(quantized.scales.float(), grid, cols), per_column(quantized.zeros.float(), grid, cols)
    return (quantized.codes.float() - z) * h


def survive_dtype(quantized: Quantized, dtype: torch.dtype) -> Quantized:
    """The same with codes that `encode` finds again in weights rounded to `dtype`; it alters a code by a few at most.

    A code moves where its weight would be beyond the greatest number, of fp16; and where two neighbours may round to
    one: 8 bits, asymmetric, in bf16, whose numbers are further apart than h beyond 128·h. To round and to encode keep
    the order of codes, so that this comes to an end.
    """
    grid, greatest = quantized.grid, torch.finfo(dtype).max
    farthest = grid.middle if grid.symmetric else grid.top
    if farthest * float(quantized.scales.max()) > greatest:
        quantized = _within(quantized, greatest)
    if farthest * torch.finfo(dtype).eps <= 1:
        return quantized
    while True:
        found = encode(dequantize(quantized).to(dtype), quantized.scales, quantized.zeros, quantized.grid)
        if torch.equal(found, quantized.codes):
            return quantized
        quantized = replace(quantized, codes=found)


def _within(quantized: Quantized, greatest: float) -> Quantized:
    """The same without weights beyond ±`greatest`: the last codes before it are taken for them."""
    grid, cols = quantized.grid, quantized.codes.shape[1]
    most = per_column((greatest / quantized.scales.float()).floor().clamp_max(grid.top), grid, cols)
    z = per_column(quantized.zeros.float(), grid, cols)
    codes = torch.minimum(torch.maximum(quantized.codes.float(), z - most), z + most)
    return replace(quantized, codes=codes.to(torch.uint8))


def nearest(weight: Float[Tensor, "rows cols"], grid: Grid) -> Quantized:
    """Round to nearest on the grid between the least and the greatest weight of every group."""
    scales, zeros = scales_and_zeros(*extremes(weight, grid), grid)
    return Quantized(codes=encode(weight, scales, zeros, grid), scales=scales, zeros=zeros, grid=grid)


def pruned(quantized: Quantized, keep: Bool[Tensor, "rows cols"]) -> Quantized:
    """The same with the zero point as the code of all that is not kept."""
    grid, cols = quantized.grid, quantized.codes.shape[1]
    zeros = per_column(quantized.zeros, grid, cols)
    return replace(quantized, codes=torch.where(keep, quantized.codes, zeros))


def bits_needed(rows: int, cols: int, nonzero: int, grid: Grid) -> int:
    """Bits that a linear takes when packed, `nonzero` of its weights not zero."""
    return packed_bits(rows * cols, nonzero, rows * grid.groups(cols), grid)


def packed_bits(size: int, nonzero: int, groups: int, grid: Grid) -> int:
    """Bits of so many weights in so many groups: codes, scales, zero points of an asymmetric grid, and a mask."""
    return value_bits(size, nonzero, grid.bits) + groups * (_SCALE_BITS + (0 if grid.symmetric else grid.bits))


def value_bits(size: int, nonzero: int, bits: int) -> int:
    """Bits of so many weights of `bits` each.

    With a mask (one bit a weight) only what is not zero is stored; without one everything is. The smaller counts.
    """
    return min(bits * size, bits * nonzero + size)
