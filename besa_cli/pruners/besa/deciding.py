"""BESA's decision for one window: learn the sparsities, project them onto the exact budget, compare with uniform."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from besa_cli.ops import affine, allocation, budget, masks
from besa_cli.ops.affine import Quantized
from besa_cli.pruners.besa.learning import learn
from besa_cli.pruners.besa.options import BesaOptions
from besa_cli.pruners.besa.window import RankedWindow
from besa_cli.stream import descent
from besa_cli.stream.block import Block, Decision


def prune(block: Block, options: BesaOptions) -> Decision:
    """Learn the sparsities of the block, project them onto the exact budget, and compare with uniform sparsity."""
    window = RankedWindow(block, options)
    try:
        return _decide(window)
    finally:
        for name, linear in window.linears.items():
            linear.restore(block.weights[name])


def _decide(window: RankedWindow) -> Decision:
    options = window.options
    if window.budget_met and not window.clipped:
        (kept,) = _masks(window, window.uniform_counts())
        return Decision(masks=kept, uniform=kept)
    theta, strengths, history = learn(window)
    facts = descent.learned(history)
    quantized = {name: clipped.quantized(strengths[name]) for name, clipped in window.clipped.items()}
    for name, each in quantized.items():
        window.linears[name].set_quantized(each)
    if window.budget_met:
        (kept,) = _masks(window, window.uniform_counts())
        return Decision(masks=kept, **_on_grid(quantized, kept), **facts)
    if not options.rules.meets_budget:
        return Decision(masks=_learned_masks(window, theta), **facts, exact=False)
    sparsities = allocation.project(theta, window.sizes, window.candidates, window.budget_share)
    uniform, learned = _masks(window, window.uniform_counts(), window.wished_counts(sparsities))
    before, after = (_errors(window, kept) for kept in (uniform, learned))
    better = after[0] < before[0]
    kept = learned if better else uniform
    return Decision(
        masks=kept,
        **_on_grid(quantized, kept),
        error_before=before[1],
        error_after=after[1] if better else before[1],
        **facts,
        kept_uniform=not better,
        uniform=uniform,
    )


def _on_grid(quantized: Mapping[str, Quantized], kept: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the quantized linears with pruned weights at zero, as fields of `Decision`."""
    pruned = {name: affine.pruned(each, kept[name]) for name, each in quantized.items()}
    return {"weights": {name: affine.dequantize(each) for name, each in pruned.items()}, "quantized": pruned}


def _learned_masks(window: RankedWindow, theta: Tensor) -> dict[str, Tensor]:
    """Return the masks of the last learning step, whatever their sparsity."""
    alpha = allocation.expected_sparsity(window.mixture(theta), window.candidates)
    return {
        name: masks.mask_from_ranks(linear.ranks, allocation.repeat_rows(count, linear.group, linear.rows))
        for (name, linear), count in zip(window.linears.items(), window.learning_counts(alpha), strict=True)
    }


def _masks(window: RankedWindow, *allocations: Mapping[str, budget.Floats]) -> list[dict[str, Tensor]]:
    """Return masks that prune exactly the budget, each row as close to its share as existing zeros allow."""
    totals = [_totals(window, shares) for shares in allocations]
    kept: list[dict[str, Tensor]] = [{} for _ in allocations]
    for name, linear in window.linears.items():
        scores = window.score(name)
        for shares, total, found in zip(allocations, totals, kept, strict=True):
            counts = masks.row_counts(shares[name], total[name], scores, linear.ranks)
            found[name] = masks.mask_from_ranks(linear.ranks, counts)
        del scores  # before there are those of the next
    return kept


def _totals(window: RankedWindow, shares: Mapping[str, budget.Floats]) -> dict[str, int]:
    """Return the weights that each linear prunes; they sum to the window's budget."""
    wished = np.array([shares[name].sum() for name in window.linears])
    zeros = np.array([linear.zeros for linear in window.linears.values()])
    sizes = np.array([linear.size for linear in window.linears.values()])
    totals = budget.round_to_total(wished, window.block.budget, zeros, sizes)
    return dict(zip(window.linears, totals.tolist(), strict=True))


def _errors(window: RankedWindow, kept: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return the mean loss and the mean relative error per token under fixed masks."""
    weights = {
        name: linear.masked.copy_(linear.weight).masked_fill_(~kept[name], 0.0)
        for name, linear in window.linears.items()
    }
    return descent.compare_errors(window.block, weights, window.options.loss)
