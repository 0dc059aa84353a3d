"""The codes of a quantized stage in GGUF's blocks of 32 weights, bit for bit: nothing is rounded again."""

from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from besa_cli.errors import BesaError
from besa_cli.exporters.source import StageSource
from besa_cli.ops import affine
from besa_cli.ops.affine import Quantized

BLOCK = 32  # weights that share a scale
_BITS = {Kind.Q4_0: 4, Kind.Q8_0: 8}


def carries(source: StageSource, kind: Kind) -> bool:
    """Whether a type holds the codes of this stage as they are; of Q4_0, once `check` has passed."""
    if source.grid is None or not source.grid["symmetric"] or source.grid["bits"] != _BITS.get(kind):
        return False
    size = source.grid["group_size"]
    return kind is Kind.Q4_0 or size is None or size % BLOCK == 0


def check(source: StageSource) -> None:
    """Refuse to write Q4_0 where it would not hold the codes of the stage.

    Raises
    ------
    BesaError
        The stage is on another grid, or columns or groups are no multiples of 32.
    """
    otherwise = "quantize with --bits 4 --symmetric --group-size 128, or export --type Q8_0"
    if not carries(source, Kind.Q4_0):
        raise BesaError(f"{source.directory} is not on a symmetric 4-bit grid, which Q4_0 is", otherwise)
    size = source.grid["group_size"] if source.grid else None
    for name in sorted(source.linears):
        cols = source.shape(name)[1]
        if cols % BLOCK or (size is not None and size < cols and size % BLOCK):
            raise BesaError(
                f"{name} has {cols} columns in groups of {size or cols}; Q4_0 needs multiples of {BLOCK}", otherwise
            )


def blocks(quantized: Quantized) -> "np.ndarray[Any, Any]":
    """The bytes of a weight as Q4_0 or Q8_0, shape (rows, bytes): of each block its scale in fp16, then its codes.

    Of Q4_0 a byte holds a code of the block's first half in its low four bits and one of the second half above.
    """
    rows, cols = quantized.codes.shape
    scales = _numpy(affine.per_column(quantized.scales, quantized.grid, cols)[:, ::BLOCK])
    codes = _numpy(quantized.codes).reshape(rows, cols // BLOCK, BLOCK)
    nibbles = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    data = nibbles if quantized.grid.bits == 4 else codes ^ 128  # of 8 bits: code − 128, as int8
    first = scales.astype(np.float16).view(np.uint8).reshape(rows, cols // BLOCK, 2)
    return np.ascontiguousarray(np.concatenate([first, data.astype(np.uint8)], axis=2).reshape(rows, -1))


def _numpy(tensor: Tensor) -> "np.ndarray[Any, Any]":
    return tensor.contiguous().numpy()
