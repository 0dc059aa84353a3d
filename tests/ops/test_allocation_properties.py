"""What has to hold of the whole allocation, for any shapes, ties and logits."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracles, toy_block
from support.strategies import fewer
from torch import Tensor

from besa_cli.ops import allocation, kernels
from besa_cli.pruners import besa
from besa_cli.pruners.besa import deciding
from besa_cli.pruners.besa.window import RankedWindow

SIZES = st.integers(1, 9)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft_objective(theta: Tensor, weight: Tensor, ranks: Tensor, slope: Tensor, size: int) -> float:
    """Σ slope ∘ W ∘ (1 − P), with P from Eq. 4 term by term, in float64."""
    keep = 1 - oracles.prune_probability(allocation.mixture(theta), weight.shape[1])
    keep = keep.repeat_interleave(size, 0)[: len(weight)].gather(1, ranks.long())
    return float((slope * weight * keep).sum())


@fewer
@given(SIZES, SIZES, st.integers(1, 4), st.sampled_from([3, 10]), st.integers(0, 10**6), st.booleans())
def test_gradients_are_the_finite_differences_of_the_soft_objective(
    rows: int, cols: int, size: int, count: int, seed: int, tied: bool
) -> None:
    """For a loss that is linear in the masked weights the straight-through gradient is the exact one."""
    weight, slope = random(rows, cols, seed=seed), random(rows, cols, seed=seed + 1)
    scores = weight.abs().float()
    ranks = kernels.ranks((scores * 2).round() if tied else scores)
    groups = -(-rows // size)
    theta = random(groups, count + 1, seed=seed + 2)
    learned = theta.float().requires_grad_()
    beta = allocation.mixture(learned)
    counts = (allocation.expected_sparsity(beta, allocation.candidates(count)) * cols).round().to(torch.int32)
    masked = allocation.straight_through(beta, weight.float(), ranks, counts.detach(), size)
    (slope.float() * masked).sum().backward()
    assert learned.grad is not None
    step = 1e-5
    largest = float(learned.grad.abs().max())
    for group in range(groups):
        for d in range(count + 1):
            moved = torch.zeros_like(theta)
            moved[group, d] = step
            above = soft_objective(theta + moved, weight, ranks, slope, size)
            below = soft_objective(theta - moved, weight, ranks, slope, size)
            expected = (above - below) / (2 * step)
            assert float(learned.grad[group, d]) == pytest.approx(expected, rel=1e-3, abs=1e-4 * largest + 1e-6)


@fewer
@given(SIZES, st.integers(1, 40), st.integers(0, 10**6), st.data())
def test_the_mask_prunes_what_a_sort_puts_first(rows: int, cols: int, seed: int, data: st.DataObject) -> None:
    scores = (random(rows, cols, seed=seed).abs() * data.draw(st.sampled_from([1.0, 3.0, 1000.0]))).round().float()
    counts = [data.draw(st.integers(0, cols)) for _ in range(rows)]
    weight = torch.ones(rows, cols)
    masked = kernels.mask(weight, kernels.ranks(scores), torch.tensor(counts), torch.empty_like(weight))
    for row, line in enumerate(scores.tolist()):
        first = sorted(range(cols), key=lambda col: (line[col], col))[: counts[row]]
        assert {col for col in range(cols) if masked[row, col] == 0} == set(first)


@fewer
@given(SIZES, st.integers(1, 40), st.integers(0, 10**6), st.sampled_from([0.25, 0.5, 4.0]))
def test_permuted_columns_and_scaled_rows_change_nothing(rows: int, cols: int, seed: int, factor: float) -> None:
    """Distinct scores: the mask moves with the columns, the mixtures' gradient stays; a row's size does not matter."""
    weight, gradient = random(rows, cols, seed=seed).float(), random(rows, cols, seed=seed + 1).float()
    counts = torch.randint(0, cols + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    ranks = kernels.ranks(weight.abs())
    masked = kernels.mask(weight, ranks, counts, torch.empty_like(weight))
    sums = kernels.candidate_sums(gradient, weight, ranks, 10)

    order = torch.randperm(cols, generator=torch.Generator().manual_seed(seed))
    moved = weight[:, order].contiguous()
    moved_ranks = kernels.ranks(moved.abs())
    assert torch.equal(kernels.mask(moved, moved_ranks, counts, torch.empty_like(moved)), masked[:, order])
    again = kernels.candidate_sums(gradient[:, order].contiguous(), moved, moved_ranks, 10)
    assert torch.allclose(again, sums, atol=1e-5 * float((gradient * weight).abs().sum(1).max()))

    sizes = factor ** torch.arange(rows).unsqueeze(1)
    scaled = weight * sizes
    scaled_ranks = kernels.ranks(scaled.abs())
    assert torch.equal(scaled_ranks, ranks)
    assert torch.equal(kernels.mask(scaled, scaled_ranks, counts, torch.empty_like(scaled)), masked * sizes)
    assert torch.equal(kernels.candidate_sums(gradient / sizes, scaled, scaled_ranks, 10), sums)


def made_window(granularity: str, weights: dict[str, Tensor], budget: int) -> Any:
    return RankedWindow(toy_block.block(weights, budget), besa.Options(granularity=granularity, candidates=20))


@fewer
@given(st.integers(1, 7), SIZES, st.floats(0.02, 0.98), st.sampled_from([0.0, 0.4]), st.integers(0, 10**6))
def test_rows_with_equal_logits_are_pruned_as_their_linear_is(
    hidden: int, inner: int, share: float, zeros: float, seed: int
) -> None:
    weights = toy_block.source(hidden=hidden, inner=inner, zeros=zeros, seed=seed)
    budget = round(share * toy_block.size(weights))
    by_layer, by_row = made_window("layer", weights, budget), made_window("row", weights, budget)
    theta = random(3, 21, seed=seed).float()
    rows = torch.tensor([len(weight) for weight in weights.values()])
    assert len(by_layer.sizes) == 3
    assert len(by_row.sizes) == int(rows.sum())
    if not 0 < budget < toy_block.size(weights):
        return
    one = allocation.project(theta, by_layer.sizes, by_layer.candidates, by_layer.budget_share)
    many = allocation.project(theta.repeat_interleave(rows, 0), by_row.sizes, by_row.candidates, by_row.budget_share)
    assert torch.allclose(one.repeat_interleave(rows), many, atol=1e-9)
    (first,), (second,) = (
        deciding._masks(by_layer, by_layer.wished_counts(one)),
        deciding._masks(by_row, by_row.wished_counts(many)),
    )
    for name, mask in first.items():
        assert torch.equal(mask, second[name]), name
    assert toy_block.pruned(first) == max(budget, sum(int((weight == 0).sum()) for weight in weights.values()))


@fewer
@given(
    st.integers(2, 7),
    SIZES,
    st.floats(0.1, 0.9),
    st.sampled_from(["row", "layer", "2"]),
    st.sampled_from(["wanda", "magnitude"]),
    st.integers(0, 10**6),
)
def test_the_order_of_columns_and_the_size_of_rows_do_not_matter_to_the_masks(
    hidden: int, inner: int, share: float, granularity: str, importance: Any, seed: int
) -> None:
    """Of whole allocations with drawn logits: those of a block whose inputs come in another order, and of one whose
    rows of gate are scaled. There equal shares are rounded by the next weight's score, so rows get shares of their own.
    """
    weights = toy_block.source(hidden=hidden, inner=inner, seed=seed)
    budget = round(share * toy_block.size(weights))
    if not 0 < budget < toy_block.size(weights):
        return
    order = torch.randperm(hidden, generator=torch.Generator().manual_seed(seed))
    sizes = 2.0 ** torch.randint(-3, 4, (inner, 1), generator=torch.Generator().manual_seed(seed))
    moved = {**weights, "gate": weights["gate"][:, order], "up": weights["up"][:, order]}
    scaled = {**weights, "gate": weights["gate"] * sizes}
    options = besa.Options(granularity=granularity, importance=importance, candidates=20)
    logits = 3 * random(sum(map(len, weights.values())), 21, seed=seed).float()

    def masks(source: dict[str, Tensor], columns: Tensor, options: besa.Options) -> dict[str, Tensor]:
        made = toy_block.block(source, budget)
        _ = made.target  # of the inputs as they were: a residual in another order would not be the block's
        made.inputs = made.inputs[..., columns]
        window = RankedWindow(made, options)
        sparsities = allocation.project(
            logits[: len(window.sizes)], window.sizes, window.candidates, window.budget_share
        )
        return deciding._masks(window, window.wished_counts(sparsities))[0]

    same = torch.arange(hidden)
    first, second = masks(weights, same, options), masks(moved, order, options)
    assert torch.equal(second["gate"], first["gate"][:, order])
    assert torch.equal(second["up"], first["up"][:, order])
    assert torch.equal(second["down"], first["down"])
    own = besa.Options(granularity="row", importance=importance, candidates=20)
    assert torch.equal(masks(scaled, same, own)["gate"], masks(weights, same, own)["gate"])


@fewer
@given(
    st.integers(2, 7),
    SIZES,
    st.floats(0.1, 0.9),
    st.sampled_from(["row", "layer", "2"]),
    st.sampled_from(["magnitude", "wanda"]),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 10**6),
)
def test_the_budget_is_exact_where_scores_are_alike(
    hidden: int, inner: int, share: float, granularity: str, importance: Any, zeros: float, seed: int
) -> None:
    """All weights of one size: by magnitude a row is one tie, by Wanda's score its columns without input are."""
    drawn = toy_block.source(hidden=hidden, inner=inner, zeros=zeros, seed=seed)
    weights = {name: weight.sign() / 4 for name, weight in drawn.items()}
    made = toy_block.block(weights, round(share * toy_block.size(weights)))
    made.inputs[..., ::2] = 0.0  # dead columns
    window = RankedWindow(made, besa.Options(granularity=granularity, importance=importance, candidates=20))
    scores = window.score("gate")[weights["gate"] != 0]
    assert len(scores.unique()) <= (1 if importance == "magnitude" else hidden // 2 + 1)
    logits = 3 * random(len(window.sizes), 21, seed=seed).float()
    there = sum(int((weight == 0).sum()) for weight in weights.values())
    if there < made.budget < toy_block.size(weights):
        sparsities = allocation.project(logits, window.sizes, window.candidates, window.budget_share)
        (kept,) = deciding._masks(window, window.wished_counts(sparsities))
        assert toy_block.pruned(kept) == made.budget
        assert not any(bool((kept[name] & (weight == 0)).any()) for name, weight in weights.items())
