"""Round to nearest: every weight to its nearest code on a grid between the extremes of its group."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from besa_cli.ops.affine import Grid
from besa_cli.stream import quantized
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
    return quantized.decision(block, quantized.round_to_nearest(block, grid))
