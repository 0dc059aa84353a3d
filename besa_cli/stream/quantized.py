"""Quantized blocks: linears rounded to nearest, and the decision that any quantizer makes of its codes."""

from collections.abc import Mapping
from typing import Any

from besa_cli.ops import affine
from besa_cli.ops.affine import Grid, Quantized
from besa_cli.stream.block import Block, Decision


def round_to_nearest(block: Block, grid: Grid) -> dict[str, Quantized]:
    """Return every linear of the block, rounded to nearest."""
    return {name: affine.nearest(weight, grid) for name, weight in block.weights.items()}


def decision(block: Block, quantized: Mapping[str, Quantized], **facts: Any) -> Decision:
    """Return the decision for linears on their grid; zeros count as pruned. `facts` are more fields of `Decision`."""
    return Decision(
        masks={name: weight != 0 for name, weight in block.weights.items()},
        weights={name: affine.dequantize(each) for name, each in quantized.items()},
        quantized=quantized,
        **facts,
    )
