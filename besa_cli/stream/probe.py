"""Probe of many compressed models in one pass: how far the predictions of each are from those of the dense model.

Every model is the dense one with a uniform sparsity by Wanda's scores (arXiv 2306.11695) and, where asked, its kept
weights rounded to the nearest code. Scores come from the inputs of the dense model. That is worse than what the methods
of `besa prune` make of the same sparsity and bits, but it orders them, and one pass gives all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from besa_cli.decoder.decoder import Decoder
from besa_cli.ops import affine, importance, kernels, masks
from besa_cli.ops.affine import Grid
from besa_cli.stream import held_out, uniform
from besa_cli.stream.block import Block, OnStep
from besa_cli.stream.propagation import batches, embed
from besa_cli.stream.windows import WholeBlocks
from besa_cli.system import compute

_TOKENS = 1024  # tokens to measure, at least


@dataclass(frozen=True)
class Compression:
    """Sparsity of every row, and the grid that the kept weights are rounded to, if any."""

    sparsity: float
    grid: Grid | None = None


def probed_samples(samples: int, seqlen: int) -> int:
    """Return how many of the calibration samples, the first ones, are passed."""
    return min(samples, -(-_TOKENS // seqlen))


def divergences(
    decoder: Decoder,
    tokens: Tensor,
    compressions: Sequence[Compression],
    *,
    batch: int = 1,
    on_step: OnStep = lambda done, total, phase: None,
) -> list[float]:
    """Measure KL(dense ‖ compressed) in nats per token for each compression; one block is loaded at a time.

    Parameters
    ----------
    decoder : Decoder
    tokens : Tensor of shape (samples, seqlen)
    compressions : sequence of Compression
    batch : int
        Samples in a pass.
    on_step : function
        Gets the progress in blocks.
    """
    dense = embed(decoder, tokens, batch)
    decoder.drop_embedding()
    hidden = [dense.clone() for _ in compressions]
    for index in range(len(decoder)):
        decoder.load(index)
        window = WholeBlocks(decoder, range(index, index + 1))
        weights = {name: linear.weight.detach() for name, linear in window.linears.items()}
        block = Block(window, weights, budget=None, inputs=dense, tokens=tokens, batch=batch)
        norms = uniform.input_norms(block)
        scores = {name: importance.wanda(weight, norms[name]) for name, weight in weights.items()}
        ranks = {name: kernels.ranks(masks.mark_zeros_(scores.pop(name), weights[name])) for name in weights}
        for compression, states in zip(compressions, hidden, strict=True):
            _advance(block, states, _compressed(weights, ranks, compression))
        dense = block.target
        decoder.drop(index)
        on_step(index + 1, len(decoder), "probe")
    return [held_out.mean_divergence(decoder, states, dense, tokens) for states in hidden]


def _compressed(weights: dict[str, Tensor], ranks: dict[str, Tensor], compression: Compression) -> dict[str, Tensor]:
    """Return the weights of a block's linears with the lowest ranks of each row zeroed, and the rest on the grid."""
    found = {}
    for name, weight in weights.items():
        kept = weight * (ranks[name] >= round(compression.sparsity * weight.shape[1]))
        if compression.grid is not None:
            kept = affine.dequantize(affine.nearest(kept.float(), compression.grid)).to(weight.dtype)
        found[name] = kept
    return found


def _advance(block: Block, hidden: Tensor, weights: dict[str, Tensor]) -> None:
    """Overwrite the hidden states with the output of the block with these weights."""
    with torch.no_grad(), compute.repeated_passes():
        for part in batches(len(hidden), block.batch):
            hidden[part] = block.forward(hidden[part], weights).to(hidden)
