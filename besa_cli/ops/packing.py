"""Compact storage: codes of a few bits back to back, and sparse matrices as a bit mask and the values that are left."""

import numpy as np
import torch
from jaxtyping import Bool, Shaped, UInt8
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # the dtype that shows an element's bits


def pack_codes(codes: UInt8[Tensor, "rows cols"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Codes of `bits` bits back to back, the lowest bit of the first code first; every row begins with its own byte.

    Of 4 bits, the first of two codes is in the low half of a byte.
    """
    rows, cols = codes.shape
    places = torch.arange(bits, dtype=torch.uint8)
    each = (codes.unsqueeze(2) >> places) & 1
    return torch.from_numpy(np.packbits(each.reshape(rows, cols * bits).numpy(), axis=1, bitorder="little"))


def unpack_codes(data: UInt8[Tensor, "rows bytes"], bits: int, cols: int) -> UInt8[Tensor, "rows cols"]:
    """The inverse of `packed`."""
    each = np.unpackbits(data.numpy(), axis=1, count=cols * bits, bitorder="little")
    places = 1 << torch.arange(bits, dtype=torch.uint8)
    found: Tensor = (torch.from_numpy(each).reshape(-1, cols, bits) * places).sum(2, dtype=torch.uint8)
    return found


def stored_mask(matrix: Shaped[Tensor, "rows cols"]) -> Bool[Tensor, "rows cols"]:
    """Which elements are stored: all whose bits are not all zero (a negative zero is stored, so that it comes back)."""
    return matrix.contiguous().view(_BITS[matrix.element_size()]) != 0


def pack_mask(mask: Bool[Tensor, "rows cols"]) -> UInt8[Tensor, "rows bytes"]:
    """A mask as bits: column c of a row is bit c mod 8, counted from the lowest, of the row's byte ⌊c / 8⌋.

    Every row begins with a byte of its own; bits beyond the last column are 0.
    """
    return torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))


def unpack_mask(bits: UInt8[Tensor, "rows bytes"], cols: int) -> Bool[Tensor, "rows cols"]:
    """The inverse of `packed`."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=cols, bitorder="little").astype(bool))


def expand(mask: Bool[Tensor, "rows cols"], values: Shaped[Tensor, " kept"]) -> Shaped[Tensor, "rows cols"]:
    """The matrix that has `values`, in their order, where the mask is set, row after row, and zeros elsewhere."""
    matrix = torch.zeros(mask.shape, dtype=values.dtype)
    matrix[mask] = values
    return matrix
