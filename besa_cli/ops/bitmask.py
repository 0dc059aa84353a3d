"""A matrix with many zeros as one bit a weight and the values that are left, row after row."""

import numpy as np
import torch
from jaxtyping import Bool, Shaped, UInt8
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # the dtype that shows an element's bits


def stored(matrix: Shaped[Tensor, "rows cols"]) -> Bool[Tensor, "rows cols"]:
    """Which elements are stored: all whose bits are not all zero (a negative zero is stored, so that it comes back)."""
    return matrix.contiguous().view(_BITS[matrix.element_size()]) != 0


def packed(mask: Bool[Tensor, "rows cols"]) -> UInt8[Tensor, "rows bytes"]:
    """A mask as bits: column c of a row is bit c mod 8, counted from the lowest, of the row's byte ⌊c / 8⌋.

    Every row begins with a byte of its own; bits beyond the last column are 0.
    """
    return torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))


def unpacked(bits: UInt8[Tensor, "rows bytes"], cols: int) -> Bool[Tensor, "rows cols"]:
    """The inverse of `packed`."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=cols, bitorder="little").astype(bool))


def expanded(mask: Bool[Tensor, "rows cols"], values: Shaped[Tensor, " kept"]) -> Shaped[Tensor, "rows cols"]:
    """The matrix that has `values`, in their order, where the mask is set, row after row, and zeros elsewhere."""
    matrix = torch.zeros(mask.shape, dtype=values.dtype)
    matrix[mask] = values
    return matrix
