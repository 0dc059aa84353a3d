"""BESA and a grid learned together, on a toy block: what goes, what stays, and whether it is worth it."""

from typing import Any

import pytest
import torch
from support import toy_block
from torch import Tensor

from besa_cli.ops import affine
from besa_cli.pruners import besa
from besa_cli.quantizers import clip
from besa_cli.stream.block import Block

JOINT = {"bits": 4, "group_size": "7", "epochs": 4}


def block(**settings: Any) -> Block:
    weights = toy_block.source(hidden=20, inner=33)
    return toy_block.block(weights, toy_block.size(weights) // 2, samples=24, **settings)


def error(made: Block, weights: dict[str, Tensor]) -> float:
    """Mean over all tokens of ‖output − target‖² / ‖target‖², the block written out."""
    kept = toy_block.block(weights, 0, samples=24)
    outputs = toy_block.outputs(kept, {name: torch.ones_like(weight) for name, weight in weights.items()})
    pairs = list(zip(outputs, toy_block.outputs(made, {name: torch.ones(1) for name in weights}), strict=True))
    ratios = [(ours - target).square().sum(-1) / target.square().sum(-1) for ours, target in pairs]
    return float(torch.cat(ratios).mean())


@pytest.mark.parametrize("symmetric", [True, False])
def test_together_beats_one_after_the_other(symmetric: bool) -> None:
    together = besa.prune(block(), besa.Options.from_given({**JOINT, "symmetric": symmetric}))
    alone = besa.prune(block(), besa.Options(epochs=4))
    grid = affine.grid(4, "7", symmetric=symmetric)
    source = block().weights
    rounded = {
        name: affine.dequantize(affine.nearest(weight * alone.masks[name], grid)) for name, weight in source.items()
    }
    assert toy_block.pruned(together.masks) == toy_block.pruned(alone.masks) == block().budget
    assert together.error_after == pytest.approx(error(block(), dict(together.weights)), rel=1e-3)
    assert error(block(), dict(together.weights)) < 0.9 * error(block(), rounded)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_where_enough_is_zero_already_only_the_grids_are_learned_as_by_clipping(share: float, symmetric: bool) -> None:
    weights = toy_block.source(hidden=20, inner=33)
    for index, weight in enumerate(weights.values()):
        zero = torch.rand(weight.shape, generator=torch.Generator().manual_seed(index)) < share
        weight.masked_fill_(zero, 0.0)
    blocks = [
        toy_block.block(weights, int(0.2 * share * toy_block.size(weights)), samples=24, seed=3) for _ in range(2)
    ]
    joint = besa.prune(blocks[0], besa.Options(grid=affine.grid(3, "9", symmetric=symmetric), epochs=4))
    clipped = clip.quantize(blocks[1], affine.grid(3, "9", symmetric=symmetric), clip.Options(epochs=4))
    assert not clipped.kept_uniform
    assert joint.learned_loss == clipped.learned_loss
    for name, weight in weights.items():
        assert torch.equal(joint.masks[name], weight != 0)
        assert torch.equal(joint.weights[name], clipped.weights[name])


def test_every_row_loses_the_weights_that_the_source_scores_lowest() -> None:
    made = block()
    result = besa.prune(made, besa.Options.from_given(JOINT))
    for name, inputs in toy_block.linear_inputs(made).items():
        scores = made.weights[name].abs() * inputs.norm(dim=0)
        kept = result.masks[name]
        lowest_kept = scores.masked_fill(~kept, torch.inf).amin(1)
        assert bool((scores.masked_fill(kept, 0.0).amax(1) <= lowest_kept * 1.0001).all())
        assert bool((result.weights[name][~kept] == 0).all())
