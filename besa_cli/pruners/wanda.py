"""Wanda: |W| · ‖X‖₂, compared within each row (Sun et al. 2023, arXiv 2306.11695)."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from besa_cli.ops import importance
from besa_cli.stream import uniform
from besa_cli.stream.block import Block, Decision
from besa_cli.stream.memory_model import MemoryUse
from besa_cli.stream.method import MethodOptions


@dataclass(frozen=True, kw_only=True)
class WandaOptions(MethodOptions):
    """Options of Wanda.

    Attributes
    ----------
    nm : (n, m), optional
        Prune n of every m columns instead of the block's budget.
    """

    nm: tuple[int, int] | None = None

    @override
    def memory_use(self) -> MemoryUse:
        return MemoryUse(state=5)  # scores in fp32, masks


Options = WandaOptions


def prune(block: Block, options: WandaOptions) -> Decision:
    """Prune the weights of each row with the smallest |W| · ‖X‖₂."""
    return Decision(masks=uniform.uniform_masks(block, scores(block), options.nm))


def scores(block: Block) -> dict[str, Tensor]:
    """Return the scores δ = |W| · ‖X_:,c‖₂ of every linear, over the block's calibration inputs."""
    columns = uniform.input_norms(block)
    return {name: importance.wanda(weight, columns[name]) for name, weight in block.weights.items()}
