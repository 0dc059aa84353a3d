"""Learned clipping (OmniQuant's LWC): learn the range of each group's grid so that the block keeps its output."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from besa_cli.choices import CLIP_RATE, Loss, Target
from besa_cli.errors import require_counts, require_factors
from besa_cli.ops import affine, importance
from besa_cli.ops.affine import Grid, Quantized
from besa_cli.ops.clipping import Clipped
from besa_cli.stream import descent
from besa_cli.stream import quantized as quantized_blocks
from besa_cli.stream.block import Block, Decision
from besa_cli.stream.memory_model import MemoryUse
from besa_cli.stream.method import MethodOptions


@dataclass(frozen=True, kw_only=True)
class ClipOptions(MethodOptions):
    """Options of learned clipping.

    Attributes
    ----------
    target : {"block", "stream"}
        Output to reproduce: the block's own on the compressed inputs, or the uncompressed model's hidden states.
    epochs, batch_size : int
        Passes over the calibration samples, and samples in one step.
    lr : float
        AdamW's rate, decaying to 0 along a half cosine.
    loss : {"token", "sensitivity", "channel", "frobenius"}
        Squared error relative to each token's norm, to the same with every channel weighted by its sensitivity, to each
        channel's norm, or to the norm of the whole.
    """

    target: Target = "block"
    epochs: int = 1
    batch_size: int = 1
    lr: float = CLIP_RATE
    loss: Loss = "token"

    def __post_init__(self) -> None:
        require_counts(epochs=self.epochs, batch_size=self.batch_size)
        require_factors(lr=self.lr)

    @override
    def memory_use(self) -> MemoryUse:
        return MemoryUse(
            state=7, learned=5, batch=self.batch_size, changes=True, codes=True
        )  # values in fp32; two sets of codes and masks, which are compared

    @override
    def learning_target(self) -> Target:
        return self.target

    @override
    def needs_sensitivity(self) -> bool:
        return self.loss == "sensitivity"


Options = ClipOptions


def quantize(block: Block, grid: Grid, options: ClipOptions) -> Decision:
    """Learn the block's grids; keep round to nearest if learning did not beat it on the same samples."""
    nearest = quantized_blocks.round_to_nearest(block, grid)
    learned, history = _learn(block, grid, options)
    before, after = (_errors(block, each, options.loss) for each in (nearest, learned))
    better = after[0] < before[0]
    return quantized_blocks.decision(
        block,
        learned if better else nearest,
        error_before=before[1],
        error_after=after[1] if better else before[1],
        **descent.learned(history),
        kept_uniform=not better,
    )


def _learn(block: Block, grid: Grid, options: ClipOptions) -> tuple[dict[str, Quantized], list[float]]:
    """Minimise the reconstruction error; return the codes, and the loss of every step."""
    linears = {name: Clipped(weight, grid) for name, weight in block.weights.items()}
    sums = block.observe(importance.squared_sums)
    logits = {name: linear.searched(sums[name]).requires_grad_() for name, linear in linears.items()}
    dtype = next(iter(block.linears.values())).weight.dtype

    def weights() -> dict[str, Tensor]:
        return {name: linear.weights(logits[name]).to(dtype) for name, linear in linears.items()}

    schedule = descent.Schedule(loss=options.loss, epochs=options.epochs, batch_size=options.batch_size)
    history = descent.minimise(block, weights, descent.adamw(list(logits.values()), options.lr), schedule)
    found = {name: linear.quantized(logits[name].detach()) for name, linear in linears.items()}
    return found, history


def _errors(block: Block, quantized: Mapping[str, Quantized], loss: Loss) -> tuple[float, float]:
    """Return the mean loss and the mean relative error per token on these grids."""
    dtype = next(iter(block.linears.values())).weight.dtype
    return descent.compare_errors(
        block, {name: affine.dequantize(each).to(dtype) for name, each in quantized.items()}, loss
    )
