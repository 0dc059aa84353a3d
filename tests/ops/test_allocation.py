"""Mixtures reach every target, and the straight-through gradient is that of the keep probability."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import few, fewer
from torch import Tensor

from besa_cli.ops import allocation, kernels
from besa_cli.ops.kernels import plain

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
def test_no_mixture_behind_a_sigmoid_leaves_its_reach(theta: Tensor) -> None:
    count = theta.shape[1] - 1
    low, high = allocation.smoothed_range(count)
    alpha = allocation.expected_sparsity(allocation.mixture(theta.sigmoid()), allocation.candidates(count))
    assert bool((alpha >= low - 1e-6).all())
    assert bool((alpha <= high + 1e-6).all())


@pytest.mark.parametrize("count", COUNTS)
def test_the_reach_of_mixtures_behind_a_sigmoid_is_attained(count: int) -> None:
    steps = [torch.where(torch.arange(count + 1) >= start, 50.0, -50.0) for start in range(count + 2)]
    theta = torch.stack(steps + [-step for step in steps])
    alpha = allocation.expected_sparsity(allocation.mixture(theta.sigmoid()), allocation.candidates(count))
    assert (float(alpha.min()), float(alpha.max())) == pytest.approx(allocation.smoothed_range(count), abs=1e-6)
    if count == 100:
        assert allocation.smoothed_range(count) == pytest.approx((0.376, 0.624), abs=5e-4)  # as the paper's code


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
    start = allocation.mixture(allocation.initial_logits(1, p, 0.3, 0.4))[0].double()
    entropy = -(start * start.log()).sum()
    for seed in range(20):  # a small step that changes neither sum nor mean nor variance lowers the entropy
        step = random(11, seed=seed, dtype=torch.float64)
        powers = torch.stack([p.double() ** power for power in range(3)], dim=1)
        basis = torch.linalg.qr(powers).Q
        moved = start + 1e-3 * start.min() * (step - basis @ (basis.T @ step))
        assert float(moved.sum()) == pytest.approx(1.0, abs=1e-6)
        assert float(-(moved * moved.log()).sum()) < float(entropy)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("cols", [1, 2, 7, 10, 99, 100, 101, 257])
def test_cuts_count_the_ranks_below_each_candidate(count: int, cols: int) -> None:
    expected = [sum(Fraction(d, count) * cols > rank for rank in range(cols)) for d in range(count + 1)]
    assert list(plain.cuts(count, cols)) == expected


class Case:
    """A weight with ranks, a mixture for each group of `size` rows, and a loss not linear in the masked weight."""

    def __init__(self, rows: int, cols: int, size: int, count: int, seed: int = 0) -> None:
        self.weight, self.size = random(rows, cols, seed=seed), size
        self.ranks = kernels.ranks(self.weight.abs() * random(cols, seed=seed + 1).abs())
        self.group = [row // size for row in range(rows)]
        self.theta = random(self.group[-1] + 1, count + 1, seed=seed + 2)
        self.inputs, self.wanted = random(cols, 3, seed=seed + 3), random(rows, 3, seed=seed + 4)
        alpha = allocation.expected_sparsity(allocation.mixture(self.theta), allocation.candidates(count))
        self.counts = (alpha * cols).round().to(torch.int32)
        self.keep = self.ranks >= self.counts[self.group].unsqueeze(1)

    def loss(self, weight: Tensor) -> Tensor:
        return (weight @ self.inputs.to(weight.dtype) - self.wanted.to(weight.dtype)).square().sum()

    def found(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        beta = allocation.mixture(theta.requires_grad_())
        masked = allocation.straight_through(beta, self.weight, self.ranks, self.counts, self.size)
        (gradient,) = torch.autograd.grad(self.loss(masked), beta)
        return masked.detach(), gradient

    def dense(self) -> tuple[Tensor, Tensor]:
        """The same through W ∘ (hard + (1 − P) − (1 − P).detach()), by autograd in float64."""
        cols = self.weight.shape[1]
        beta = allocation.mixture(self.theta.double()).requires_grad_()
        count = beta.shape[1] - 1
        terms = [(Fraction(d, count) * cols > rank, d, rank) for rank in range(cols) for d in range(count + 1)]
        above = torch.zeros(count + 1, cols, dtype=torch.float64)
        for reaches, d, rank in terms:
            above[d, rank] = float(reaches)
        keep_by_rank = (1 - beta @ above)[self.group]
        soft = keep_by_rank.gather(1, self.ranks.long())
        weight = self.weight.double()
        masked = weight * (self.keep.double() + (soft - soft.detach()))
        (gradient,) = torch.autograd.grad(self.loss(masked), beta)
        return masked.detach(), gradient


@pytest.mark.parametrize("form", ["fast", "plain"])
@pytest.mark.parametrize("size", [1, 2, 100], ids=["row", "rows", "layer"])
@pytest.mark.parametrize("count", [3, 10, 100])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_straight_through_is_the_hard_mask_with_the_probabilitys_gradient(
    rows: int, cols: int, count: int, size: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESA_KERNELS", form)
    if form == "fast" and kernels.name(torch.device("cpu"), torch.float32) == "plain":
        pytest.skip("the library was not built: there is no compiler")
    case = Case(rows, cols, min(size, rows), count)
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
    case = Case(rows, cols, rows, 10, seed)
    masked, shared = case.found(case.theta.clone())
    case.size, case.counts = 1, case.counts.expand(rows)
    masked_alone, separate = case.found(case.theta.detach().expand(rows, -1).clone())
    assert torch.equal(masked, masked_alone)
    assert separate.shape == (rows, 11)
    assert torch.allclose(
        shared, separate.sum(0, keepdim=True), rtol=1e-4, atol=1e-5 * float(shared.abs().max()) + 1e-9
    )


def test_a_matrix_that_is_summed_in_pieces_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESA_KERNELS", "plain")
    case = Case(7, 9, 1, 10)
    _, whole = case.found(case.theta.clone())
    monkeypatch.setattr(plain, "_CHUNK", 20)  # two rows at a time, and one that is left
    _, pieces = case.found(case.theta.clone())
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_keep_their_bits_and_an_fp32_gradient(dtype: torch.dtype) -> None:
    case = Case(4, 9, 1, 10)
    case.weight = case.weight.to(dtype)
    masked, gradient = case.found(case.theta)
    assert masked.dtype == dtype
    assert torch.equal(masked, case.weight.masked_fill(~case.keep, 0.0))
    assert gradient.dtype == torch.float32
    _, expected = case.dense()
    assert torch.allclose(gradient.double(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_more_pruning_of_weights_that_serve_costs_loss() -> None:
    """The sign: where all weights lower the loss, the gradient pushes every mixture to smaller candidates."""
    weight = torch.ones(2, 8)
    theta = torch.zeros(2, 11, requires_grad=True)
    beta = allocation.mixture(theta)
    masked = allocation.straight_through(beta, weight, kernels.ranks(weight), torch.tensor([4, 4]))
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
    theta = scale * random(sum(groups), count + 1, seed=seed)
    weights = torch.tensor(sizes).repeat_interleave(torch.tensor(groups))
    found = allocation.project(theta, weights, allocation.candidates(count), target)
    assert found.shape == weights.shape
    assert bool(((found >= 0) & (found <= 1)).all())
    pruned = math.fsum(size * alpha for size, alpha in zip(weights.tolist(), found.tolist(), strict=True))
    assert pruned / math.fsum(weights.tolist()) == pytest.approx(target, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("target", [1e-4, 0.5, 1 - 1e-4])
def test_mixtures_that_have_run_to_the_ends_can_still_be_tilted(target: float) -> None:
    theta = 300 * random(6, 101, seed=3) + 2000 * torch.tensor([-1.0, 1, -1, 1, -1, 1]).outer(
        allocation.candidates(100)
    )
    found = allocation.project(theta, torch.ones(6), allocation.candidates(100), target)
    assert float(found.mean()) == pytest.approx(target, rel=1e-6)


def test_a_projection_onto_the_sparsity_that_is_there_changes_nothing() -> None:
    p, theta = allocation.candidates(100), random(4, 101, seed=1)
    alpha = allocation.expected_sparsity(allocation.mixture(theta), p).double()
    weights = torch.tensor([5.0, 5, 5, 60])
    here = float(alpha @ weights.double() / weights.sum())
    assert torch.allclose(allocation.project(theta, weights, p, here), alpha, atol=1e-6)


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
    sizes = torch.tensor([3.0, 2.0])
    first, second = allocation.project(torch.cat([base, leaning]), sizes, p, target).tolist()
    assert second >= first - 1e-9
    same, twin = allocation.project(torch.cat([base, base]), sizes, p, target).tolist()
    assert same == pytest.approx(twin, abs=1e-12)  # where rows of a matrix product lie may change their last bit
    assert twin == pytest.approx(target, abs=1e-7)


def on_target(theta: Tensor, sizes: Tensor, p: Tensor, target: float) -> Tensor:
    """θ after the tilt that projects it."""
    return theta + allocation._solve_tilt(theta, sizes, p, target) * p


@fewer
@given(st.floats(0.1, 0.9), st.sampled_from([1, 3, 10]), st.integers(0, 10**6))
def test_the_tangent_gradient_is_that_of_the_projected_objective(target: float, count: int, seed: int) -> None:
    """Finite differences of an objective of the mixtures after projection, which moves all of them."""
    p, sizes = allocation.candidates(count).double(), torch.tensor([3.0, 2.0, 7.0], dtype=torch.float64)
    wanted = random(3, count + 1, seed=seed + 1, dtype=torch.float64)
    theta = on_target(random(3, count + 1, seed=seed, dtype=torch.float64), sizes, p, target).requires_grad_()

    def objective(logits: Tensor) -> Tensor:
        return (allocation.mixture(logits) - wanted).square().sum()

    objective(theta).backward()
    assert theta.grad is not None
    gradient = theta.grad
    theta = theta.detach()
    found = allocation.project_gradient(gradient, allocation.mixture(theta), sizes, p)
    step = 1e-5
    for place in [(group, candidate) for group in range(3) for candidate in (0, count)]:
        move = torch.zeros_like(theta)
        move[place] = step
        above, below = (objective(on_target(theta + each, sizes, p, target)) for each in (move, -move))
        assert float(found[place]) == pytest.approx(float(above - below) / (2 * step), rel=1e-4, abs=1e-6)
    assert float((found @ p).sum()) == pytest.approx(0.0, abs=1e-9)  # a common tilt gains nothing


@few
@given(logits(), st.integers(0, 10**6))
def test_the_tangent_gradient_of_rows_that_share_logits_is_that_of_their_group(theta: Tensor, seed: int) -> None:
    p, rows = allocation.candidates(theta.shape[1] - 1).double(), 3
    theta, sizes = theta.double(), 1 + torch.rand(len(theta), dtype=torch.float64)
    gradient = random(*theta.shape, seed=seed, dtype=torch.float64)
    one = allocation.project_gradient(gradient, allocation.mixture(theta), sizes, p)
    each = [x.repeat_interleave(rows, 0) / rows for x in (gradient, sizes)]
    many = allocation.project_gradient(each[0], allocation.mixture(theta.repeat_interleave(rows, 0)), each[1], p)
    torch.testing.assert_close(allocation.sum_groups(many, rows), one, rtol=1e-6, atol=1e-9)


def restored(theta: Tensor, sizes: Tensor, p: Tensor, target: float) -> Tensor:
    return theta + allocation.newton_tilt(theta, sizes, p, target) * p


@few
@given(st.floats(0.05, 0.95), st.sampled_from(COUNTS), st.integers(0, 10**6))
def test_what_a_step_has_lost_of_the_target_is_restored(target: float, count: int, seed: int) -> None:
    p, sizes = allocation.candidates(count), torch.tensor([3.0, 2.0, 7.0])
    theta = allocation.initial_logits(3, p, target)
    moved = theta + 0.1 * random(*theta.shape, seed=seed).sign() + 0.1 * p  # a step of AdamW, leaning one way
    lost, _ = allocation.mean_and_slope(allocation.mixture(moved), sizes, p)
    back, _ = allocation.mean_and_slope(allocation.mixture(restored(moved, sizes, p, target)), sizes, p)
    assert abs(float(back) - target) <= max(0.2 * abs(float(lost) - target), 1e-6)
    for _ in range(20):
        moved = restored(moved, sizes, p, target)
    alphas = allocation.expected_sparsity(allocation.mixture(moved), p).double()
    torch.testing.assert_close(alphas, allocation.project(moved, sizes, p, target), rtol=1e-4, atol=1e-5)


def test_mixtures_that_have_run_into_one_candidate_each_stay_finite() -> None:
    p, sizes = allocation.candidates(10), torch.ones(2)
    theta = torch.zeros(2, 11)
    theta[0, 0] = theta[1, 9] = 500.0
    back = restored(theta, sizes, p, 0.5)
    assert float((back - theta).abs().max()) <= len(p)
    mean, _ = allocation.mean_and_slope(allocation.mixture(back), sizes, p)
    assert abs(float(mean) - 0.5) <= 0.05 + 1e-6  # as near as it was
    assert bool(allocation.project_gradient(random(2, 11), allocation.mixture(theta), sizes, p).isfinite().all())


@few
@given(st.integers(1, 9), st.integers(1, 11))
def test_groups_are_consecutive_rows_and_the_last_may_be_smaller(rows: int, size: int) -> None:
    values = random(rows, 2, seed=rows)
    sums = allocation.sum_groups(values, size)
    expected = [values[start : start + size].sum(0).tolist() for start in range(0, rows, size)]
    assert sums.tolist() == [pytest.approx(line, abs=1e-6) for line in expected]
    back = allocation.repeat_rows(torch.arange(len(sums)), size, rows)
    assert back.tolist() == [row // size for row in range(rows)]


@pytest.mark.parametrize("size", [1, 2])
def test_a_learned_weight_gets_the_gradient_of_what_is_kept_of_it(size: int) -> None:
    weight = random(5, 8).requires_grad_()
    ranks = kernels.ranks(weight.detach().abs())
    counts = torch.tensor([2, 0, 8, 5, 1])[: -(-5 // size)]
    beta = allocation.mixture(random(len(counts), 11, seed=1)).requires_grad_()
    direction = random(5, 8, seed=2)
    (allocation.straight_through(beta, weight, ranks, counts, size) * direction).sum().backward()
    rows = [int(counts[row // size]) for row in range(5)]
    kept = torch.stack([ranks[row] >= count for row, count in enumerate(rows)])
    assert weight.grad is not None
    assert torch.equal(weight.grad, direction * kept)
    assert beta.grad is not None
    assert bool(beta.grad.abs().sum() > 0)
