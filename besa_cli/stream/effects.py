"""Effect of pruning each block on the loss of the dense model, and the budgets of the blocks that follow from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from besa_cli.decoder.decoder import Decoder
from besa_cli.ops import budget, importance, kernels, knapsack, losses, masks
from besa_cli.stream import uniform
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.backward import BackwardStream, StoredBlocks
from besa_cli.stream.block import Block, OnStep
from besa_cli.stream.windows import WholeBlocks
from besa_cli.system import compute

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # at which effects may be measured
FARTHEST = 0.15  # distance of a block's sparsity from that of the whole model
HIGHEST = 0.95  # sparsity of a block, unless the whole model's is higher
PASSES = 10  # through each block: forward, backward as three, norms, and each sparsity; for forecasts
_TOKENS, _SAMPLES = 4096, 8  # tokens and samples to measure, at least
_STEP = 0.0025  # between two sparsities that a block may have


@dataclass(frozen=True, kw_only=True)
class BlockEffects:
    """Effects of pruning single blocks of a model on its loss.

    Attributes
    ----------
    sparsities : tuple of float
    errors : tuple of tuple of float
        For each block, the effect at each of the sparsities, in nats per token: see `effect`.
    sizes, zeros : tuple of int
        Weights of each block's linears, and how many of them are zero.
    """

    sparsities: tuple[float, ...]
    errors: tuple[tuple[float, ...], ...]
    sizes: tuple[int, ...]
    zeros: tuple[int, ...]


def measured_samples(samples: int, seqlen: int) -> int:
    """Return how many of the calibration samples, the first ones, are measured."""
    return min(samples, max(_SAMPLES, -(-_TOKENS // seqlen)))


def bounds(target_sparsity: float, reachable: tuple[float, float]) -> tuple[float, float]:
    """Return the lowest and the highest sparsity of a block, of those that the method can reach."""
    low = max(target_sparsity - FARTHEST, reachable[0])
    return max(low, 0.0), max(min(target_sparsity + FARTHEST, reachable[1], HIGHEST), target_sparsity)


def sparsities_around(target_sparsity: float, reachable: tuple[float, float] = (0.0, 1.0)) -> list[float]:
    """Return the fewest of `SPARSITIES` that enclose all sparsities of a block; two at least."""
    low, high = bounds(target_sparsity, reachable)
    first = max([number for number, sparsity in enumerate(SPARSITIES[:-1]) if sparsity <= low], default=0)
    last = min([number for number, sparsity in enumerate(SPARSITIES) if sparsity >= high], default=len(SPARSITIES) - 1)
    return list(SPARSITIES[first : max(last, first + 1) + 1])


def measure(
    decoder: Decoder,
    tokens: Tensor,
    *,
    sparsities: Sequence[float],
    batch: int = 1,
    seed: int = 0,
    on_step: OnStep = lambda done, total, phase: None,
    activations: ActivationStore | None = None,
) -> BlockEffects:
    """Measure what pruning each block alone, by Wanda's scores, changes at the end of the dense model.

    One pass forward keeps the inputs of all blocks; one pass backward brings the gradient of the model's own loss to
    the outputs of each block, where the errors of the pruned block are weighed by it. One block is loaded at a time.

    Parameters
    ----------
    decoder : Decoder
    tokens : Tensor of shape (samples, seqlen)
    sparsities : sequence of float
    batch : int
        Samples in a pass without gradients; those with gradients have one.
    seed : int
        Seed of the labels, which are drawn from the model's own distribution.
    on_step : function
        Gets the progress in blocks.
    activations : ActivationStore, optional
        Storage of the hidden states; in memory by default.
    """
    activations = activations or ActivationStore()
    stream = BackwardStream(decoder, _Blocks(decoder), tokens, activations=activations)
    outputs = stream.forward()
    inputs = stream.inputs
    generator = torch.Generator(decoder.device).manual_seed(seed)
    _, gradient = stream.head_gradient(outputs, lambda logits, part, positions: losses.own_labels(logits, generator))
    del outputs
    decoder.drop_head()
    decoder.drop_embedding()
    found: dict[int, tuple[tuple[float, ...], int, int]] = {}

    def visit(index: int, weights: Mapping[str, Tensor] | None, at_output: Tensor) -> None:
        window = WholeBlocks(decoder, range(index, index + 1))
        kept = {name: linear.weight.detach() for name, linear in window.linears.items()}
        block = Block(
            window, kept, budget=None, inputs=inputs.pop(), tokens=tokens, batch=batch, activations=activations
        )
        zeros = sum(masks.count_zeros(weight) for weight in kept.values())
        found[index] = (_errors(block, at_output, sparsities), sum(weight.numel() for weight in kept.values()), zeros)
        on_step(len(found), len(decoder), "budget")

    stream.backward(gradient, visit)
    errors, sizes, zeros = zip(*(found[index] for index in range(len(decoder))), strict=True)
    return BlockEffects(sparsities=tuple(sparsities), errors=errors, sizes=sizes, zeros=zeros)


def effect(output: Tensor, dense: Tensor, gradient: Tensor) -> Tensor:
    """Compute Σ g² · (output − dense)² / 2 over all tokens and channels, g the gradient of the loss at `dense`."""
    return (gradient.float() * (output.float() - dense.float())).square().sum() / 2


class _Blocks(StoredBlocks):
    """Blocks of the checkpoint; the embedding is dropped when the first is loaded."""

    @override
    def _read(self, index: int) -> None:
        self._decoder.drop_embedding()
        super()._read(index)


def _errors(block: Block, gradient: Tensor, sparsities: Sequence[float]) -> tuple[float, ...]:
    """Return the effect of pruning a loaded block to each sparsity; `gradient` is that at its outputs."""
    norms = uniform.input_norms(block)
    scores = {name: importance.wanda(weight, norms[name]) for name, weight in block.weights.items()}
    ranks = {name: kernels.ranks(masks.mark_zeros_(scores.pop(name), block.weights[name])) for name in block.weights}
    errors = []
    for sparsity in sparsities:
        pruned = {
            name: weight * (ranks[name] >= round(sparsity * weight.shape[1])) for name, weight in block.weights.items()
        }
        total = 0.0
        with torch.no_grad(), compute.repeated_passes():
            for part in block.batches():
                output = block.forward(block.inputs[part], pruned)
                total += float(effect(output, block.target[part].to(output), gradient[part].to(output)))
        errors.append(total / block.tokens.numel())
    return tuple(errors)


def block_budgets(
    effects: BlockEffects, target_sparsity: float, reachable: tuple[float, float] = (0.0, 1.0)
) -> list[int]:
    """Return the number of weights that each block prunes, by their effects, the whole model's count met exactly.

    The least sum of effects takes those of blocks pruned alone; the budgets go the share
    `target_sparsity` of the way to it.

    Parameters
    ----------
    effects : BlockEffects
    target_sparsity : float
        Share of the whole model's weights to prune.
    reachable : tuple of float
        Lowest and highest sparsity that the method can reach.
    """
    sizes, zeros = np.array(effects.sizes), np.array(effects.zeros)
    total = sum(budget.window_counts(target_sparsity, effects.sizes))
    low, high = bounds(target_sparsity, reachable)
    points = np.linspace(low, high, max(round((high - low) / _STEP), 1) + 1)
    curves = knapsack.error_curves(np.array(effects.sparsities), np.array(effects.errors), points)
    least = knapsack.allocate(sizes.astype(np.float64), points, curves, float(total))
    shares = sizes * (total / sizes.sum()) * (1 - target_sparsity) + least * target_sparsity
    counts: list[int] = budget.round_to_total(shares, total, zeros, sizes).tolist()
    return counts
