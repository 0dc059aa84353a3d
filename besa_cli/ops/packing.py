"""Compact storage: bit-packed codes, and sparse matrices as a bit mask with the kept values."""

import numpy as np
import torch
from jaxtyping import Bool, Shaped, UInt8
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer dtype by element size in bytes


def pack_codes(codes: UInt8[Tensor, "rows cols"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Pack codes of `bits` bits, the lowest bit of the first code first; every row begins at a new byte.

    With 4 bits, the first of two codes is in the low half of a byte.
    """
    rows, cols = codes.shape
    places = torch.arange(bits, dtype=torch.uint8)
    code_bits = (codes.unsqueeze(2) >> places) & 1
    return torch.from_numpy(np.packbits(code_bits.reshape(rows, cols * bits).numpy(), axis=1, bitorder="little"))


def unpack_codes(data: UInt8[Tensor, "rows bytes"], bits: int, cols: int) -> UInt8[Tensor, "rows cols"]:
    """Unpack codes: the inverse of `pack_codes`."""
    code_bits = np.unpackbits(data.numpy(), axis=1, count=cols * bits, bitorder="little")
    places = 1 << torch.arange(bits, dtype=torch.uint8)
    codes: Tensor = (torch.from_numpy(code_bits).reshape(-1, cols, bits) * places).sum(2, dtype=torch.uint8)
    return codes


def stored_mask(matrix: Shaped[Tensor, "rows cols"]) -> Bool[Tensor, "rows cols"]:
    """Mark the stored elements: those with any bit set (negative zero is stored, so that it is restored exactly)."""
    return matrix.contiguous().view(_BITS[matrix.element_size()]) != 0


def pack_mask(mask: Bool[Tensor, "rows cols"]) -> UInt8[Tensor, "rows bytes"]:
    """Pack a mask into bits: column c of a row is bit c mod 8, from the lowest, of the row's byte ⌊c / 8⌋.

    Every row begins at a new byte; bits beyond the last column are 0.
    """
    return torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))


def unpack_mask(bits: UInt8[Tensor, "rows bytes"], cols: int) -> Bool[Tensor, "rows cols"]:
    """Unpack a mask: the inverse of `pack_mask`."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=cols, bitorder="little").astype(bool))


def expand(mask: Bool[Tensor, "rows cols"], values: Shaped[Tensor, " kept"]) -> Shaped[Tensor, "rows cols"]:
    """Place `values` in order where the mask is set, row by row, with zeros elsewhere."""
    matrix = torch.zeros(mask.shape, dtype=values.dtype)
    matrix[mask] = values
    return matrix
