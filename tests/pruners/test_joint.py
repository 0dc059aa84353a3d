"""BESA and a grid learned together, on a toy block: what goes, what stays, and whether it is worth it."""

import pytest
import torch
import toy
from torch import Tensor

from besa_cli.ops import affine
from besa_cli.pruners import besa
from besa_cli.stream.block import Block

JOINT = {"bits": 4, "group_size": "7", "epochs": 4}


def block(**settings: int) -> Block:
    weights = toy.source(hidden=20, inner=33)
    return toy.block(weights, toy.size(weights) // 2, samples=24, **settings)


def error(made: Block, weights: dict[str, Tensor]) -> float:
    """Mean over the first 16 samples' tokens of ‖output − target‖² / ‖target‖², the block written out."""
    kept = toy.block(weights, 0, samples=24)
    outputs = toy.outputs(kept, {name: torch.ones_like(weight) for name, weight in weights.items()})
    pairs = list(zip(outputs, toy.outputs(made, {name: torch.ones(1) for name in weights}), strict=True))[:16]
    ratios = [(ours - target).square().sum(-1) / target.square().sum(-1) for ours, target in pairs]
    return float(torch.cat(ratios).mean())


@pytest.mark.parametrize("symmetric", [True, False])
def test_together_beats_one_after_the_other(symmetric: bool) -> None:
    together = besa.prune(block(), besa.Options(**JOINT, symmetric=symmetric))
    alone = besa.prune(block(), besa.Options(epochs=4))
    grid = affine.grid(4, "7", symmetric=symmetric)
    source = block().weights
    rounded = {
        name: affine.dequantize(affine.nearest(weight * alone.masks[name], grid)) for name, weight in source.items()
    }
    assert toy.pruned(together.masks) == toy.pruned(alone.masks) == block().budget
    assert together.error_after == pytest.approx(error(block(), dict(together.weights)), rel=1e-3)
    assert error(block(), dict(together.weights)) < 0.9 * error(block(), rounded)


def test_every_row_loses_the_weights_that_the_source_scores_lowest() -> None:
    made = block()
    result = besa.prune(made, besa.Options(**JOINT))
    for name, inputs in toy.linear_inputs(made).items():
        scores = made.weights[name].abs() * inputs.norm(dim=0)
        kept = result.masks[name]
        lowest_kept = scores.masked_fill(~kept, torch.inf).amin(1)
        assert bool((scores.masked_fill(kept, 0.0).amax(1) <= lowest_kept * 1.0001).all())
        assert bool((result.weights[name][~kept] == 0).all())
