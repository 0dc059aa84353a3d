"""SparseGPT against the textbook's optimal brain surgeon, written with explicit inverses in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracles
from support.strategies import dead_columns, few, fewer, weights
from torch import Tensor

from besa_cli.errors import BesaError
from besa_cli.ops import importance, obs

DAMPING = 0.01


def problem(
    rows: int, cols: int, *, seed: int = 0, tokens: int = 64, dead: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of strongly correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator) + 2 * torch.ones(cols, cols)
    inputs = torch.randn(tokens, cols, generator=generator) @ mixing * torch.linspace(0.3, 3, cols)
    inputs[:, list(dead)] = 0.0
    return torch.randn(rows, cols, generator=generator), importance.gram(inputs)


def error(weight: Tensor, changed: Tensor, gram: Tensor) -> float:
    """‖(W − Ŵ) X‖² by the damped Gram matrix, which is what the method lowers."""
    difference = weight.double() - changed.double()
    return float((difference @ oracles.damped(gram, DAMPING) * difference).sum())


def lowest(scores: Tensor, count: int) -> Tensor:
    """Keep all but the `count` lowest scores of a matrix, by a sort in Python."""
    rows, cols = scores.shape
    places = sorted((float(scores[row, col]), row, col) for row in range(rows) for col in range(cols))
    keep = torch.ones(rows, cols, dtype=torch.bool)
    for _, row, col in places[:count]:
        keep[row, col] = False
    return keep


@pytest.mark.parametrize("damping", [0.01, 0.3])
@pytest.mark.parametrize("cols", [1, 2, 9])
def test_the_factor_squares_to_the_inverse_and_its_diagonal_to_those_of_the_columns_to_come(
    cols: int, damping: float
) -> None:
    _, gram = problem(1, cols, dead=(1,) if cols > 2 else ())
    factor = obs.inverse_factor(gram, damping)
    hessian = oracles.damped(gram, damping)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose((factor.T @ factor).double() @ hessian, torch.eye(cols, dtype=torch.float64), atol=2e-3)
    for col in range(cols):
        expected = float(torch.linalg.inv(hessian[col:, col:])[0, 0])
        assert float(factor[col, col]) ** 2 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("width", [1, 3, 4, 128])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 9), (5, 1), (4, 9), (3, 11)])
def test_survivors_are_updated_as_the_surgeon_does_for_the_same_mask(rows: int, cols: int, width: int) -> None:
    weight, gram = problem(rows, cols)
    updated, keep = obs.prune(weight, gram, rows * cols // 2, width=width, damping=DAMPING)
    expected = oracles.surgeon(weight, gram, keep, DAMPING)
    assert torch.allclose(updated.double(), expected, rtol=1e-3, atol=1e-3)
    assert bool((updated[~keep] == 0).all())


@pytest.mark.parametrize("seed", range(3))
def test_the_mask_of_a_group_holds_the_lowest_saliencies_of_the_weights_as_updated_so_far(seed: int) -> None:
    weight, gram = problem(3, 10, seed=seed)
    updated, keep = obs.prune(weight, gram, 15, width=5, damping=DAMPING)
    first = lowest(oracles.saliency(weight, gram, DAMPING)[:, :5], round(15 / 2))
    assert torch.equal(keep[:, :5], first)
    halfway = torch.cat([first, torch.ones(3, 5, dtype=torch.bool)], dim=1)
    moved = oracles.surgeon(weight, gram, halfway, DAMPING)
    second = lowest(oracles.saliency(moved, gram, DAMPING)[:, 5:], 15 - round(15 / 2))
    assert torch.equal(keep[:, 5:], second)
    assert torch.allclose(
        updated.double(), oracles.surgeon(moved, gram, torch.cat([first, second], 1), DAMPING), atol=1e-3
    )


def test_pruned_columns_left_of_all_others_give_the_least_squares_solution() -> None:
    weight, gram = problem(3, 8)
    weight[:, :3] *= 1e-2  # the lowest saliencies
    updated, keep = obs.prune(weight, gram, 9, damping=DAMPING)
    assert keep.tolist() == [[False] * 3 + [True] * 5] * 3
    hessian = oracles.damped(gram, DAMPING)
    best = weight[:, 3:].double() + weight[:, :3].double() @ torch.linalg.solve(hessian[3:, 3:], hessian[3:, :3]).T
    assert torch.allclose(updated[:, 3:].double(), best, rtol=1e-3, atol=1e-5)
    assert float((best - weight[:, 3:]).abs().max()) > 1e-4  # the update is not lost in the tolerance


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_the_update_lowers_the_error_of_the_same_mask(seed: int, pattern: tuple[int, int] | None) -> None:
    weight, gram = problem(6, 16, seed=seed)
    updated, keep = obs.prune(weight, gram, 48, n_of_m=pattern, width=8, damping=DAMPING)
    assert error(weight, updated, gram) < 0.9 * error(weight, weight.masked_fill(~keep, 0.0), gram)


@few
@given(st.data(), dead_columns(weights()), st.sampled_from([1, 2, 3, 128]))
def test_totals_are_exact_and_existing_zeros_stay_and_count(data: st.DataObject, weight: Tensor, width: int) -> None:
    rows, cols = weight.shape
    total = data.draw(st.integers(0, rows * cols), label="total")
    _, gram = problem(1, cols, seed=1)
    updated, keep = obs.prune(weight, gram, total, width=width)
    zeros = weight == 0
    assert int((~keep).sum()) == max(total, int(zeros.sum()))
    assert not bool((keep & zeros).any())
    assert bool((updated[~keep] == 0).all())


def test_zeros_that_gather_on_the_right_take_nothing_from_the_exact_total() -> None:
    weight = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    _, keep = obs.prune(weight, torch.eye(2), 2, width=1)
    assert keep.tolist() == [[True, False], [True, False]]
    _, keep = obs.prune(weight, torch.eye(2), 3, width=1)
    assert keep.tolist() == [[False, False], [True, False]]


@fewer
@given(dead_columns(weights()), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 4, 128]))
def test_every_full_window_has_n_zeros_and_the_tail_stays_dense(weight: Tensor, n: int, m: int, width: int) -> None:
    n, cols = min(n, m), weight.shape[1]
    _, gram = problem(1, cols, seed=1)
    updated, keep = obs.prune(weight, gram, 0, n_of_m=(n, m), width=width)
    zeros = weight == 0
    full = cols - cols % m
    for start in range(0, full, m):
        window = slice(start, start + m)
        assert torch.equal((~keep[:, window]).sum(1), zeros[:, window].sum(1).clamp_min(n))
    assert torch.equal(keep[:, full:], ~zeros[:, full:])
    assert bool((updated[~keep] == 0).all())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_weights_of_dead_columns_go_first_and_cost_the_others_nothing(scale: float) -> None:
    weight, gram = problem(3, 7, dead=(2, 5))
    updated, keep = obs.prune(weight, gram * scale, 6, damping=DAMPING)
    expected = torch.ones(3, 7, dtype=torch.bool)
    expected[:, [2, 5]] = False
    assert torch.equal(keep, expected)
    assert torch.allclose(updated, weight.masked_fill(~expected, 0.0), rtol=1e-6)


def test_no_input_at_all_still_gives_the_exact_total() -> None:
    weight, _ = problem(3, 7)
    updated, keep = obs.prune(weight, torch.zeros(7, 7), 10)
    assert int((~keep).sum()) == 10
    assert torch.equal(updated, weight.masked_fill(~keep, 0.0))


def test_fewer_tokens_than_columns_are_damped_to_a_finite_answer() -> None:
    weight, gram = problem(4, 12, tokens=3)
    updated, keep = obs.prune(weight, gram, 24)
    assert bool(updated.isfinite().all())
    assert int((~keep).sum()) == 24


@pytest.mark.parametrize("gram", [torch.tensor([[1.0, 5.0], [5.0, 1.0]]), -torch.eye(2), torch.full((2, 2), math.nan)])
def test_an_indefinite_gram_is_refused_with_a_remedy(gram: Tensor) -> None:
    with pytest.raises(BesaError, match="2 inputs is not positive definite") as caught:
        obs.prune(torch.ones(3, 2), gram, 3)
    assert "--damping" in caught.value.hint


def test_the_arguments_are_left_as_they_were() -> None:
    weight, gram = problem(3, 6, dead=(1,))
    before = weight.clone(), gram.clone()
    obs.prune(weight, gram, 9)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_are_worked_on_in_fp32(dtype: torch.dtype) -> None:
    weight, gram = problem(3, 6)
    low = weight.to(dtype)
    updated, keep = obs.prune(low, gram, 9)
    same, same_keep = obs.prune(low.float(), gram, 9)
    assert updated.dtype == torch.float32
    assert torch.equal(updated, same)
    assert torch.equal(keep, same_keep)
