"""SparseGPT: prune column by column and let the surviving weights make up for it (arXiv 2301.00774)."""

from dataclasses import dataclass

from typing_extensions import override

from besa_cli.choices import DAMPING
from besa_cli.errors import require_factors
from besa_cli.ops import importance, obs
from besa_cli.stream import uniform
from besa_cli.stream.block import Block, Decision
from besa_cli.stream.memory_model import MemoryUse
from besa_cli.stream.method import MethodOptions


@dataclass(frozen=True, kw_only=True)
class SparseGptOptions(MethodOptions):
    """Options of SparseGPT.

    Attributes
    ----------
    nm : (n, m), optional
        Prune n of every m columns instead of the block's budget.
    damping : float
        Share of the mean diagonal of XᵀX added to it.
    """

    nm: tuple[int, int] | None = None
    damping: float = DAMPING

    def __post_init__(self) -> None:
        require_factors(damping=self.damping)

    @override
    def memory_use(self) -> MemoryUse:
        return MemoryUse(state=5, grams=True, changes=True)  # updated weights in fp32, masks


Options = SparseGptOptions


def prune(block: Block, options: SparseGptOptions) -> Decision:
    """Prune every linear of the block, using second-order statistics of the block's compressed inputs."""
    grams = block.observe(importance.gram)
    counts = uniform.linear_counts(block)
    kept, updated = {}, {}
    for done, (name, weight) in enumerate(block.weights.items(), 1):
        updated[name], kept[name] = obs.prune(
            weight, grams[name], counts[name], n_of_m=options.nm, damping=options.damping
        )
        block.on_step(done, len(block.weights), "update")
    return Decision(masks=kept, weights=updated)
