"""Codes of a few bits, packed into bytes."""

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor


def packed(codes: UInt8[Tensor, "rows cols"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Codes of `bits` bits back to back, the lowest bit of the first code first; every row begins with its own byte.

    Of 4 bits, the first of two codes is in the low half of a byte.
    """
    rows, cols = codes.shape
    places = torch.arange(bits, dtype=torch.uint8)
    each = (codes.unsqueeze(2) >> places) & 1
    return torch.from_numpy(np.packbits(each.reshape(rows, cols * bits).numpy(), axis=1, bitorder="little"))


def unpacked(data: UInt8[Tensor, "rows bytes"], bits: int, cols: int) -> UInt8[Tensor, "rows cols"]:
    """The inverse of `packed`."""
    each = np.unpackbits(data.numpy(), axis=1, count=cols * bits, bitorder="little")
    places = 1 << torch.arange(bits, dtype=torch.uint8)
    found: Tensor = (torch.from_numpy(each).reshape(-1, cols, bits) * places).sum(2, dtype=torch.uint8)
    return found
