"""Codes of a quantized stage in GGUF's blocks of 32 weights, without rounding them again."""

from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from besa_cli.errors import BesaError
from besa_cli.exporters.source import StageSource
from besa_cli.ops import affine
from besa_cli.ops.affine import Quantized

BLOCK = 32  # weights that share a scale
_BITS = {Kind.Q4_0: 4, Kind.Q8_0: 8}


def carries(source: StageSource, kind: Kind) -> bool:
    """Return True if a type stores the codes of this stage exactly; for Q4_0 `check` must have passed, too."""
    if source.grid is None or not source.grid["symmetric"] or source.grid["bits"] != _BITS.get(kind):
        return False
    size = source.grid["group_size"]
    return kind is Kind.Q4_0 or size is None or size % BLOCK == 0


def check(source: StageSource) -> None:
    """Refuse to write Q4_0 if it cannot store the codes of the stage exactly.

    Raises
    ------
    BesaError
        The stage is on another grid, or its columns or groups are not multiples of 32.
    """
    remedy = "quantize with --bits 4 --symmetric --group-size 128, or export --type Q8_0"
    if not carries(source, Kind.Q4_0):
        raise BesaError(f"{source.directory} is not on a symmetric 4-bit grid, which Q4_0 needs", remedy)
    size = source.grid["group_size"] if source.grid else None
    for name in sorted(source.linears):
        cols = source.shape(name)[1]
        if cols % BLOCK or (size is not None and size < cols and size % BLOCK):
            raise BesaError(
                f"{name} has {cols} columns in groups of {size or cols}; Q4_0 needs multiples of {BLOCK}", remedy
            )


def blocks(quantized: Quantized) -> "npt.NDArray[np.uint8]":
    """Return the bytes of a weight as Q4_0 or Q8_0, shape (rows, bytes): for each block its fp16 scale, then its codes.

    In Q4_0, the low four bits of a byte hold a code of the block's first half, the high four bits one of the second.
    """
    rows, cols = quantized.codes.shape
    scales = _numpy(affine.per_column(quantized.scales, quantized.grid, cols)[:, ::BLOCK])
    codes = _numpy(quantized.codes).reshape(rows, cols // BLOCK, BLOCK)
    nibbles = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    data = nibbles if quantized.grid.bits == 4 else codes ^ 128  # 8 bits: code − 128 as int8
    first = scales.astype(np.float16).view(np.uint8).reshape(rows, cols // BLOCK, 2)
    return np.ascontiguousarray(np.concatenate([first, data.astype(np.uint8)], axis=2).reshape(rows, -1))


def _numpy(tensor: Tensor) -> "npt.NDArray[Any]":
    return tensor.contiguous().numpy()
