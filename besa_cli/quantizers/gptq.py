"""GPTQ: column by column, on the second-order statistics of the inputs (Frantar et al. 2022, arXiv 2210.17323)."""

from dataclasses import dataclass

from torch import Tensor

from besa_cli.errors import require_factors
from besa_cli.ops import gptq, importance, obs
from besa_cli.ops.affine import Grid
from besa_cli.quantizers import rtn
from besa_cli.stream.block import Block, Decision
from besa_cli.stream.memory_model import MemoryUse

OBSERVES = True


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of GPTQ.

    Attributes
    ----------
    damping : float
        Share of the mean diagonal of XᵀX added to it.
    search : bool
        Search how far each group's grid reaches; else it reaches from extreme to extreme, as in the paper.
    """

    damping: float = 0.01
    search: bool = True

    def __post_init__(self) -> None:
        require_factors(damping=self.damping)


def memory_use(options: Options) -> MemoryUse:
    """Codes (1 byte), what they stand for (4), masks (1)."""
    return MemoryUse(state=6, grams=True, changes=True, codes=True)


def quantize(block: Block, grid: Grid, options: Options) -> Decision:
    """Quantize every linear of the block on the statistics of the block's compressed inputs."""
    grams = block.observe(importance.gram)
    factors: dict[int, Tensor] = {}
    quantized = {}
    for done, (name, weight) in enumerate(block.weights.items(), 1):
        gram = grams[name]
        if id(gram) not in factors:
            factors = {id(gram): obs.inverse_factor(gram, options.damping)}  # linears of one input follow each other
        quantized[name] = gptq.quantize(weight, weight != 0, factors[id(gram)], grid, search=options.search)
        block.on_step(done, len(block.weights), "update")
    return rtn.decided(block, quantized)
