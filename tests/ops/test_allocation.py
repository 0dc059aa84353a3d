"""Mixtures reach every target, and the straight-through gradient is that of the keep probability."""

import math
from fractions import Fraction

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import few, fewer
from torch import Tensor

from besa_cli.ops import allocation, masks

SHAPES = [(1, 1), (1, 7), (6, 1), (3, 10), (4, 9), (2, 33), (7, 4)]
COUNTS = [1, 3, 10, 100]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def logits(draw: st.DrawFn, *, groups: int = 4) -> Tensor:
    """Random θ, from nearly uniform mixtures to nearly one candidate alone."""
    rows, count = draw(st.integers(1, groups)), draw(st.sampled_from(COUNTS))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0]))
    return scale * random(rows, count + 1, seed=draw(st.integers(0, 10**6)))


@pytest.mark.parametrize("count", COUNTS)
def test_candidates_are_the_multiples_of_one_over_d(count: int) -> None:
    found = allocation.candidates(count).tolist()
    assert found == pytest.approx([float(Fraction(d, count)) for d in range(count + 1)], abs=1e-7)
    assert (found[0], found[-1]) == (0.0, 1.0)


@few
@given(logits())
def test_mixture_rows_sum_to_one_and_keep_the_order_of_the_logits(theta: Tensor) -> None:
    beta = allocation.mixture(theta)
    for row, numbers in zip(beta.tolist(), theta.tolist(), strict=True):
        powers = [math.exp(number - max(numbers)) for number in numbers]
        assert row == pytest.approx([power / math.fsum(powers) for power in powers], rel=1e-4, abs=1e-7)
        assert math.fsum(row) == pytest.approx(1.0, abs=1e-5)


@few
@given(logits())
def test_expected_sparsity_is_the_weighted_sum_and_lies_between_the_candidates(theta: Tensor) -> None:
    beta, p = allocation.mixture(theta), allocation.candidates(theta.shape[1] - 1)
    alpha = allocation.expected_sparsity(beta, p)
    sums = [math.fsum(b * d / (len(row) - 1) for d, b in enumerate(row)) for row in beta.tolist()]
    assert alpha.tolist() == pytest.approx(sums, abs=1e-5)
    assert bool(((alpha >= 0) & (alpha <= 1 + 1e-6)).all())


@few
@given(st.integers(1, 4), st.sampled_from(COUNTS), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_every_target_is_where_the_learning_starts(groups: int, count: int, target: float) -> None:
    p = allocation.candidates(count)
    theta = allocation.initial_logits(groups, p, target)
    assert theta.shape == (groups, count + 1)
    assert bool(theta.isfinite().all())
    alpha = allocation.expected_sparsity(allocation.mixture(theta), p)
    assert alpha.tolist() == pytest.approx([target] * groups, rel=1e-4, abs=1e-6)


def test_the_start_is_the_mixture_of_greatest_entropy() -> None:
    p = allocation.candidates(10)
    start = allocation.mixture(allocation.initial_logits(1, p, 0.3))[0].double()
    entropy = -(start * start.log()).sum()
    for seed in range(20):  # a small step that changes neither the sum nor the mean lowers the entropy
        step = random(11, seed=seed, dtype=torch.float64)
        basis = torch.linalg.qr(torch.stack([torch.ones(11, dtype=torch.float64), p.double()], dim=1)).Q
        moved = start + 1e-3 * start.min() * (step - basis @ (basis.T @ step))
        assert float(moved.sum()) == pytest.approx(1.0, abs=1e-6)
        assert float(-(moved * moved.log()).sum()) < float(entropy)


@few
@given(logits(), st.integers(1, 12))
def test_prune_probability_is_equation_4_and_falls_with_the_rank(theta: Tensor, cols: int) -> None:
    beta = allocation.mixture(theta)
    found = allocation.prune_probability(beta, cols)
    assert torch.allclose(found.double(), oracles.prune_probability(beta, cols), atol=1e-6)
    assert bool((found.diff(dim=1) <= 1e-6).all())
    assert bool(((found >= 0) & (found <= 1 + 1e-6)).all())


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("cols", [1, 2, 7, 10, 99, 100, 101, 257])
def test_cuts_count_the_ranks_below_each_candidate(count: int, cols: int) -> None:
    expected = [sum(Fraction(d, count) * cols > rank for rank in range(cols)) for d in range(count + 1)]
    assert allocation.cuts(count, cols) == expected


class Case:
    """A weight with ranks, a mixture, counts, and a loss that is not linear in the masked weight."""

    def __init__(self, rows: int, cols: int, groups: int, count: int, seed: int = 0) -> None:
        self.weight = random(rows, cols, seed=seed)
        self.order = masks.order(self.weight.abs() * random(cols, seed=seed + 1).abs())
        self.ranks = masks.ranks(self.order)
        self.theta = random(groups, count + 1, seed=seed + 2)
        self.inputs, self.wanted = random(cols, 3, seed=seed + 3), random(rows, 3, seed=seed + 4)
        alpha = allocation.expected_sparsity(allocation.mixture(self.theta), allocation.candidates(count))
        self.counts = (alpha * cols).round().long().expand(rows)
        self.keep = torch.ones(rows, cols, dtype=torch.bool)
        for row in range(rows):
            self.keep[row, self.order[row, : int(self.counts[row])].long()] = False

    def loss(self, weight: Tensor) -> Tensor:
        return (weight @ self.inputs.to(weight.dtype) - self.wanted.to(weight.dtype)).square().sum()

    def found(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        beta = allocation.mixture(theta.requires_grad_())
        masked = allocation.straight_through(beta, self.weight, self.order, self.ranks, self.counts)
        (gradient,) = torch.autograd.grad(self.loss(masked), beta)
        return masked.detach(), gradient

    def dense(self) -> tuple[Tensor, Tensor]:
        """The same through W ∘ (hard + (1 − P) − (1 − P).detach()), by autograd in float64."""
        rows, cols = self.weight.shape
        beta = allocation.mixture(self.theta.double()).requires_grad_()
        count = beta.shape[1] - 1
        terms = [(Fraction(d, count) * cols > rank, d, rank) for rank in range(cols) for d in range(count + 1)]
        above = torch.zeros(count + 1, cols, dtype=torch.float64)
        for reaches, d, rank in terms:
            above[d, rank] = float(reaches)
        keep_by_rank = 1 - (beta @ above).expand(rows, cols)
        soft = keep_by_rank.gather(1, self.ranks.long())
        weight = self.weight.double()
        masked = weight * (self.keep.double() + (soft - soft.detach()))
        (gradient,) = torch.autograd.grad(self.loss(masked), beta)
        return masked.detach(), gradient


@pytest.mark.parametrize("shared", [False, True], ids=["row", "layer"])
@pytest.mark.parametrize("count", [3, 10, 100])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_straight_through_is_the_hard_mask_with_the_probabilitys_gradient(
    rows: int, cols: int, count: int, shared: bool
) -> None:
    case = Case(rows, cols, 1 if shared else rows, count)
    masked, gradient = case.found(case.theta)
    expected_masked, expected_gradient = case.dense()
    assert torch.equal(masked, case.weight.masked_fill(~case.keep, 0.0))
    assert torch.equal(masked.double(), expected_masked)
    assert torch.allclose(
        gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5 * float(expected_gradient.abs().max())
    )


@fewer
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 10**6))
def test_the_shared_gradient_is_the_sum_over_rows_of_the_separate_ones(rows: int, cols: int, seed: int) -> None:
    case = Case(rows, cols, 1, 10, seed)
    masked, shared = case.found(case.theta.clone())
    masked_alone, separate = case.found(case.theta.detach().expand(rows, -1).clone())
    assert torch.equal(masked, masked_alone)
    assert separate.shape == (rows, 11)
    assert torch.allclose(
        shared, separate.sum(0, keepdim=True), rtol=1e-4, atol=1e-5 * float(shared.abs().max()) + 1e-9
    )


def test_a_matrix_that_is_summed_in_pieces_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(7, 9, 7, 10)
    _, whole = case.found(case.theta.clone())
    monkeypatch.setattr(allocation, "_CHUNK", 20)  # two rows at a time, and one that is left
    _, pieces = case.found(case.theta.clone())
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_keep_their_bits_and_an_fp32_gradient(dtype: torch.dtype) -> None:
    case = Case(4, 9, 4, 10)
    case.weight = case.weight.to(dtype)
    masked, gradient = case.found(case.theta)
    assert masked.dtype == dtype
    assert torch.equal(masked, case.weight.masked_fill(~case.keep, 0.0))
    assert gradient.dtype == torch.float32
    _, expected = case.dense()
    assert torch.allclose(gradient.double(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_no_gradient_reaches_the_weight() -> None:
    case = Case(3, 5, 3, 10)
    case.weight.requires_grad_()
    beta = allocation.mixture(case.theta.requires_grad_())
    allocation.straight_through(beta, case.weight, case.order, case.ranks, case.counts).square().sum().backward()
    assert case.weight.grad is None
    assert case.theta.grad is not None
    assert bool(case.theta.grad.any())


def test_more_pruning_of_weights_that_serve_costs_loss() -> None:
    """The sign: where all weights lower the loss, the gradient pushes every mixture to smaller candidates."""
    weight = torch.ones(2, 8)
    order = masks.order(weight)
    theta = torch.zeros(2, 11, requires_grad=True)
    beta = allocation.mixture(theta)
    masked = allocation.straight_through(beta, weight, order, masks.ranks(order), torch.tensor([4, 4]))
    (weight - masked).sum().backward()
    assert theta.grad is not None
    sparser = (theta.detach() - theta.grad).softmax(1) @ allocation.candidates(10)
    assert bool((sparser < 0.5 - 1e-3).all())


@few
@given(st.data(), st.floats(0.001, 0.999))
def test_projection_hits_the_target_within_bounds(data: st.DataObject, target: float) -> None:
    count = data.draw(st.sampled_from([3, 10, 100]), label="D")
    groups = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4), label="groups")
    sizes = [float(data.draw(st.integers(1, 10_000), label="weights in a group")) for _ in groups]
    seed, scale = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([0.0, 0.5, 10.0]))
    thetas = [scale * random(rows, count + 1, seed=seed + place) for place, rows in enumerate(groups)]
    found = allocation.project(thetas, sizes, allocation.candidates(count), target)
    assert [alpha.shape for alpha in found] == [(rows,) for rows in groups]
    assert all(bool(((alpha >= 0) & (alpha <= 1)).all()) for alpha in found)
    pruned = math.fsum(size * float(number) for size, alpha in zip(sizes, found, strict=True) for number in alpha)
    weights = math.fsum(size * rows for size, rows in zip(sizes, groups, strict=True))
    assert pruned / weights == pytest.approx(target, rel=1e-6, abs=1e-7)


def test_a_projection_onto_the_sparsity_that_is_there_changes_nothing() -> None:
    p = allocation.candidates(100)
    thetas = [random(3, 101, seed=1), random(1, 101, seed=2)]
    alphas = [allocation.expected_sparsity(allocation.mixture(theta), p).double() for theta in thetas]
    here = float((alphas[0].sum() * 5 + alphas[1].sum() * 60) / (3 * 5 + 60))
    found = allocation.project(thetas, [5.0, 60.0], p, here)
    for alpha, expected in zip(found, alphas, strict=True):
        assert torch.allclose(alpha, expected, atol=1e-6)


@fewer
@given(st.floats(0.02, 0.98), st.floats(-60, 60), st.floats(0, 60), st.integers(0, 10**6))
def test_projection_keeps_the_order_of_a_group_that_leans_to_higher_sparsities(
    target: float, start: float, lean: float, seed: int
) -> None:
    """Where one mixture's likelihood ratio to another rises with the candidate, no common tilt can turn them around."""
    p = allocation.candidates(50)
    base = random(1, 51, seed=seed) + start * p
    steps = random(51, seed=seed + 1).abs()
    leaning = base + lean * steps.cumsum(0) / steps.sum()
    first, second = allocation.project([base, leaning], [3.0, 2.0], p, target)
    assert float(second) >= float(first) - 1e-9
    same, twin = allocation.project([base, base.clone()], [3.0, 2.0], p, target)
    assert float(same) == float(twin) == pytest.approx(target, abs=1e-7)
