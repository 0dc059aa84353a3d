"""Magnitude: |W|, compared within each row. No calibration is used but for reporting the error."""

from dataclasses import dataclass

from besa_cli.ops import importance
from besa_cli.pruners import wanda
from besa_cli.stream.block import Block, Decision
from besa_cli.stream.memory_model import MemoryUse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of magnitude pruning: `nm` = (n, m) prunes n of every m columns instead of the block's budget."""

    nm: tuple[int, int] | None = None


def memory_use(options: Options) -> MemoryUse:
    """As Wanda: scores (4 bytes), masks (1)."""
    return MemoryUse(state=5)


def prune(block: Block, options: Options) -> Decision:
    """Prune the smallest weights of each row."""
    scores = {name: importance.magnitude(weight) for name, weight in block.weights.items()}
    return Decision(masks=wanda.uniform(block, scores, options.nm))
