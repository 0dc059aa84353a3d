"""Magnitude pruning: |W|, compared within each row; calibration serves only to report the error."""

from dataclasses import dataclass

from typing_extensions import override

from besa_cli.ops import importance
from besa_cli.stream import uniform
from besa_cli.stream.block import Block, Decision
from besa_cli.stream.memory_model import MemoryUse
from besa_cli.stream.method import MethodOptions


@dataclass(frozen=True, kw_only=True)
class MagnitudeOptions(MethodOptions):
    """Options of magnitude pruning.

    Attributes
    ----------
    nm : (n, m), optional
        Prune n of every m columns instead of the block's budget.
    """

    nm: tuple[int, int] | None = None

    @override
    def memory_use(self) -> MemoryUse:
        return MemoryUse(state=5)  # scores in fp32, masks


Options = MagnitudeOptions


def prune(block: Block, options: MagnitudeOptions) -> Decision:
    """Prune the smallest weights of each row."""
    scores = {name: importance.magnitude(weight) for name, weight in block.weights.items()}
    return Decision(masks=uniform.uniform_masks(block, scores, options.nm))
