"""Affine grids: weights as integer codes with a scale and a zero point per group; zero is always on the grid.

    Ŵ = (Q − z)·h,   Q = clamp(round(W/h) + z, 0, 2^N − 1)

with h = (γ1·max(W) − γ0·min(W)) / (2^N − 1) and z = −round(γ0·min(W)/h) (BESA, arXiv 2402.16880, Eq. 7). Minimum and
maximum include 0, so that z is a code and a zero weight stays exactly zero. A *group* is `group_size` consecutive
columns of one row; the last group of a row may be shorter.
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
GROUP = "128"  # default group size, in columns
LARGEST = torch.finfo(torch.float16).max
_SCALE_BITS = 16  # fp16
_SMALLEST = 2.0**-24  # smallest positive fp16 number


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Quantization grid of a linear.

    Attributes
    ----------
    bits : int
        N: codes are 0 … 2^N − 1.
    group_size : int, optional
        Number of columns that share a scale; None for all columns of a row (per channel).
    symmetric : bool
        All zero points are 2^(N−1), and h = 2γ·max|W| / (2^N − 1).
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True

    def __str__(self) -> str:
        group = f"groups of {self.group_size}" if self.group_size else "channels"
        return f"{self.bits} bits in {group}, {'symmetric' if self.symmetric else 'asymmetric'}"

    @property
    def top(self) -> int:
        """Largest code, 2^N − 1."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """Zero point of a symmetric grid, 2^(N−1)."""
        return 1 << (self.bits - 1)

    def width(self, cols: int) -> int:
        """Return the number of columns in a group of a linear with `cols` columns."""
        return min(self.group_size or cols, cols)

    def groups(self, cols: int) -> int:
        """Return the number of groups in each row."""
        return -(-cols // self.width(cols))


def grid(bits: int, group_size: str, *, symmetric: bool) -> Grid:
    """Build the grid that the options ``--bits``, ``--group-size`` and ``--symmetric`` describe.

    Raises
    ------
    UsageError
        An option has an invalid value.
    """
    if bits not in BITS:
        raise UsageError(f"--bits {bits} is not one of {', '.join(map(str, BITS))}", "4 is the usual choice")
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
    """One linear quantized on a grid.

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
    """Return the stored tensors, on the CPU: `name`.codes, `name`.scales and, on an asymmetric grid, `name`.zeros."""
    parts = {"codes": quantized.codes, "scales": quantized.scales, "zeros": quantized.zeros}
    return {
        f"{name}.{part}": tensor.cpu().contiguous()
        for part, tensor in parts.items()
        if part != "zeros" or not quantized.grid.symmetric
    }


def from_tensors(tensors: Mapping[str, Tensor], name: str, grid: Grid) -> Quantized:
    """Rebuild a quantized linear from its stored tensors: the inverse of `to_tensors`."""
    codes, scales = tensors[f"{name}.codes"], tensors[f"{name}.scales"]
    middle = torch.full_like(scales, grid.middle, dtype=torch.uint8)
    return Quantized(
        codes=codes, scales=scales, zeros=middle if grid.symmetric else tensors[f"{name}.zeros"], grid=grid
    )


def per_column(values: Real[Tensor, "rows groups"], grid: Grid, cols: int) -> Real[Tensor, "rows cols"]:
    """Expand each group's value to each of its columns."""
    if values.shape[1] == 1:
        return values.expand(-1, cols)
    return values.repeat_interleave(grid.width(cols), dim=1)[:, :cols]


def grouped(weight: Float[Tensor, "rows cols"], grid: Grid) -> Float[Tensor, "rows groups width"]:
    """Split the columns into groups; a shorter last group is padded with zeros."""
    return plain.grouped(weight, grid.width(weight.shape[1]))


def extremes(
    weight: Float[Tensor, "rows cols"], grid: Grid
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """Return minimum and maximum of every group, including 0; on a symmetric grid −max|W| and max|W|."""
    parts = grouped(weight.float(), grid)
    low, high = parts.amin(2).clamp_max(0.0), parts.amax(2).clamp_min(0.0)
    if grid.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    return low, high


def representable(scales: Float[Tensor, "rows groups"]) -> Float16[Tensor, "rows groups"]:
    """Round scales to the nearest positive fp16 numbers; a scale of 0, of a group of zeros, becomes 1."""
    return scales.half().clamp_min(_SMALLEST).masked_fill(scales == 0, 1.0)


def scales_and_zeros(
    low: Float[Tensor, "rows groups"], high: Float[Tensor, "rows groups"], grid: Grid
) -> tuple[Float16[Tensor, "rows groups"], UInt8[Tensor, "rows groups"]]:
    """Compute the scales h (fp16) and zero points z of groups whose weights are to lie in [low, high].

    Parameters
    ----------
    low, high : Tensors of shape (rows, groups)
        Bounds with low ≤ 0 ≤ high. A group of zeros alone gets the scale 1.

    Raises
    ------
    BesaError
        A scale exceeds the range of fp16.
    """
    scales = representable((high - low) / grid.top)
    if not bool(scales.isfinite().all()):
        raise BesaError(
            f"weights as large as {float(torch.maximum(high, -low).max()):.3g} need a scale beyond fp16",
            "this model cannot be quantized; check its weights for damage",
        )
    if grid.symmetric:
        return scales, torch.full_like(scales, grid.middle, dtype=torch.uint8)
    return scales, zero_points(low, scales.float(), grid).to(torch.uint8)


def zero_points(
    low: Float[Tensor, "rows groups"], scales: Float[Tensor, "rows groups"], grid: Grid
) -> Float[Tensor, "rows groups"]:
    """Compute the zero points z = −round(low/h), clamped to codes of the grid."""
    return (-low / scales).round().clamp(0, grid.top)


def encode(
    weight: Float[Tensor, "rows cols"],
    scales: Float16[Tensor, "rows groups"],
    zeros: UInt8[Tensor, "rows groups"],
    grid: Grid,
) -> UInt8[Tensor, "rows cols"]:
    """Return the nearest code of every weight."""
    cols = weight.shape[1]
    h, z = per_column(scales.float(), grid, cols), per_column(zeros.float(), grid, cols)
    return ((weight.float() / h).round() + z).clamp(0, grid.top).to(torch.uint8)


def dequantize(quantized: Quantized) -> Float[Tensor, "rows cols"]:
    """Compute the weights Ŵ = (Q − z)·h in fp32."""
    cols, grid = quantized.codes.shape[1], quantized.grid
    h, z = per_column(quantized.scales.float(), grid, cols), per_column(quantized.zeros.float(), grid, cols)
    return (quantized.codes.float() - z) * h


def survive_dtype(quantized: Quantized, dtype: torch.dtype) -> Quantized:
    """Adjust codes so that `encode` recovers them from the weights rounded to `dtype`.

    A code changes, by a few at most, where its weight exceeds the largest number (fp16), and where two neighbouring
    codes may round to one number: 8 bits, asymmetric, in bf16, whose spacing beyond 128·h is larger than h. Rounding
    and encoding preserve the order of codes, so the iteration ends.
    """
    grid, largest = quantized.grid, torch.finfo(dtype).max
    farthest = grid.middle if grid.symmetric else grid.top
    if farthest * float(quantized.scales.max()) > largest:
        quantized = _within(quantized, largest)
    if farthest * torch.finfo(dtype).eps <= 1:
        return quantized
    while True:
        codes = encode(dequantize(quantized).to(dtype), quantized.scales, quantized.zeros, quantized.grid)
        if torch.equal(codes, quantized.codes):
            return quantized
        quantized = replace(quantized, codes=codes)


def _within(quantized: Quantized, largest: float) -> Quantized:
    """Clamp the codes of weights beyond ±`largest` to the last codes before it."""
    grid, cols = quantized.grid, quantized.codes.shape[1]
    limit = per_column((largest / quantized.scales.float()).floor().clamp_max(grid.top), grid, cols)
    z = per_column(quantized.zeros.float(), grid, cols)
    codes = torch.minimum(torch.maximum(quantized.codes.float(), z - limit), z + limit)
    return replace(quantized, codes=codes.to(torch.uint8))


def nearest(weight: Float[Tensor, "rows cols"], grid: Grid) -> Quantized:
    """Round to nearest on the grid from the minimum to the maximum of every group."""
    scales, zeros = scales_and_zeros(*extremes(weight, grid), grid)
    return Quantized(codes=encode(weight, scales, zeros, grid), scales=scales, zeros=zeros, grid=grid)


def pruned(quantized: Quantized, keep: Bool[Tensor, "rows cols"]) -> Quantized:
    """Set the codes of pruned weights (`keep` False) to the zero point."""
    grid, cols = quantized.grid, quantized.codes.shape[1]
    zeros = per_column(quantized.zeros, grid, cols)
    return replace(quantized, codes=torch.where(keep, quantized.codes, zeros))


def bits_needed(rows: int, cols: int, nonzero: int, grid: Grid) -> int:
    """Return the packed size of a linear in bits, `nonzero` of its weights not zero."""
    return packed_bits(rows * cols, nonzero, rows * grid.groups(cols), grid)


def packed_bits(size: int, nonzero: int, groups: int, grid: Grid) -> int:
    """Return the size in bits of `size` weights in `groups` groups.

    It includes codes, scales, zero points of an asymmetric grid, and a mask.
    """
    return value_bits(size, nonzero, grid.bits) + groups * (_SCALE_BITS + (0 if grid.symmetric else grid.bits))


def value_bits(size: int, nonzero: int, bits: int) -> int:
    """Return the size in bits of `size` values of `bits` each, in the smaller of two forms.

    With a mask (one bit per weight) only nonzero values are stored; without one, all values.
    """
    return min(bits * size, bits * nonzero + size)
