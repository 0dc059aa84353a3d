"""Round to nearest: every weight to its nearest code on a grid between the extremes of its group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from besa_cli.ops import affine
from besa_cli.ops.affine import Grid, Quantized
from besa_cli.stream.block import Block, Decision
from besa_cli.stream.memory_model import MemoryUse
from besa_cli.stream.method import MethodOptions


@dataclass(frozen=True, kw_only=True)
class RtnOptions(MethodOptions):
    """Options of round to nearest: none of its own; it decides from the weights alone."""

    uses_calibration: ClassVar[bool] = False

    @override
    def memory_use(self) -> MemoryUse:
        return MemoryUse(state=6, changes=True, codes=True)  # codes, their values in fp32, masks


Options = RtnOptions


def quantize(block: Block, grid: Grid, options: RtnOptions) -> Decision:
    """Put every linear of the block on the grid."""
    return decided(block, nearest(block, grid))


def nearest(block: Block, grid: Grid) -> dict[str, Quantized]:
    """Return every linear of the block, rounded to nearest."""
    return {name: affine.nearest(weight, grid) for name, weight in block.weights.items()}


def decided(block: Block, quantized: Mapping[str, Quantized], **facts: Any) -> Decision:
    """Return the decision for linears on their grid; zeros count as pruned. `facts` are more fields of `Decision`."""
    return Decision(
        masks={name: weight != 0 for name, weight in block.weights.items()},
        weights={name: affine.dequantize(each) for name, each in quantized.items()},
        quantized=quantized,
        **facts,
    )
