"""GPTQ: column by column, on the second-order statistics of the inputs (Frantar et al. 2022, arXiv 2210.17323)."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from besa_cli.choices import DAMPING
from besa_cli.errors import require_factors
from besa_cli.ops import gptq, importance, obs
from besa_cli.ops.affine import Grid
from besa_cli.stream import quantized as quantized_blocks
from besa_cli.stream.block import Block, Decision
from besa_cli.stream.memory_model import MemoryUse
from besa_cli.stream.method import MethodOptions


@dataclass(frozen=True, kw_only=True)
class GptqOptions(MethodOptions):
    """Options of GPTQ.

    Attributes
    ----------
    damping : float
        Share of the mean diagonal of XᵀX added to it.
    search : bool
        Search how far each group's grid reaches; else it reaches from extreme to extreme, as in the paper.
    """

    damping: float = DAMPING
    search: bool = True

    def __post_init__(self) -> None:
        require_factors(damping=self.damping)

    @override
    def memory_use(self) -> MemoryUse:
        return MemoryUse(state=6, grams=True, changes=True, codes=True)  # codes, their values in fp32, masks


Options = GptqOptions


def quantize(block: Block, grid: Grid, options: GptqOptions) -> Decision:
    """Quantize every linear of the block, using second-order statistics of the block's compressed inputs."""
    grams = block.observe(importance.gram)
    factors: dict[int, Tensor] = {}
    quantized = {}
    for done, (name, weight) in enumerate(block.weights.items(), 1):
        gram = grams[name]
        if id(gram) not in factors:
            factors = {id(gram): obs.inverse_factor(gram, options.damping)}  # linears of one input follow each other
        quantized[name] = gptq.quantize(weight, weight != 0, factors[id(gram)], grid, search=options.search)
        block.on_step(done, len(block.weights), "update")
    return quantized_blocks.decision(block, quantized)
