"""Counts are exact, for every prefix, every bound and every tie."""

from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import oracles
from support.strategies import few, shares

from besa_cli.ops import budget

Problem = tuple[list[Fraction], int, list[int], list[int], list[int]]


@few
@given(
    st.integers(0, 999_999),
    st.sampled_from([1, 10, 1_000, 1_000_000]),
    st.lists(st.integers(1, 500_000_000), min_size=1, max_size=6),
)
def test_every_prefix_is_the_rounded_share_of_a_decimal_sparsity(digits: int, unit: int, sizes: list[int]) -> None:
    decimal = Decimal(digits % unit) / unit
    counts = budget.window_counts(float(decimal), sizes)
    for end in range(1, len(sizes) + 1):
        expected = (decimal * sum(sizes[:end])).quantize(Decimal(1), rounding=ROUND_HALF_EVEN)
        assert sum(counts[:end]) == int(expected)
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))


def test_the_sparsity_is_the_number_that_was_typed_not_its_binary_neighbour() -> None:
    assert Fraction(0.7) * 5 < Fraction(7, 2)  # the binary number rounds down, to 3
    assert budget.window_counts(0.7, [5]) == [4]
    assert budget.window_counts(1e-05, [100_000, 100_000]) == [1, 1]


@pytest.mark.parametrize("sizes", [[7, 5, 3], [1] * 9])
def test_sparsity_zero_prunes_nothing(sizes: list[int]) -> None:
    assert budget.window_counts(0.0, sizes) == [0] * len(sizes)


@few
@given(shares())
def test_fill_shifts_to_the_total_within_the_bounds(problem: Problem) -> None:
    wished, total, lower, upper, _ = problem
    found = budget.fill(
        np.array(wished, dtype=float), float(total), np.array(lower, dtype=float), np.array(upper, dtype=float)
    )
    expected = oracles.levelled(wished, total, lower, upper)
    assert found == pytest.approx([float(share) for share in expected], abs=1e-9)
    assert float(found.sum()) == pytest.approx(min(max(total, sum(lower)), sum(upper)), abs=1e-9)


def test_fill_of_nothing_is_nothing() -> None:
    nothing = np.zeros(0)
    assert budget.fill(nothing, 0.0, nothing, nothing).shape == (0,)


@few
@given(shares())
def test_rounding_follows_floor_remainder_tie_and_index(problem: Problem) -> None:
    wished, total, lower, upper, ties = problem
    found = budget.round_to_total(
        np.array(wished, dtype=float), total, np.array(lower), np.array(upper), np.array(ties, dtype=float)
    )
    assert found.tolist() == oracles.rounded(wished, total, lower, upper, ties)


@few
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 10**6))
def test_totals_are_exact_for_arbitrary_real_shares(count: int, most: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    lower = generator.integers(0, most, count)
    upper = lower + generator.integers(0, most, count)
    wished = generator.uniform(-1, 2 * most, count)
    total = int(generator.integers(lower.sum(), upper.sum() + 1))
    found = budget.round_to_total(wished, total, lower, upper)
    assert found.sum() == total
    assert (found >= lower).all()
    assert (found <= upper).all()
    levels = budget.fill(wished, float(total), lower.astype(float), upper.astype(float))
    assert np.abs(found - levels).max() < 1 + 1e-5


def test_noise_in_the_last_digit_is_no_remainder() -> None:
    thirds = np.full(3, 0.1 * 3 * 10)  # 3.0000000000000004
    assert budget.round_to_total(thirds, 9, np.zeros(3, dtype=int), np.full(3, 9)).tolist() == [3, 3, 3]
    below = np.full(3, 3 - 1e-12)
    assert budget.round_to_total(below, 9, np.zeros(3, dtype=int), np.full(3, 9)).tolist() == [3, 3, 3]


def test_shares_of_a_billion_weights_stay_exact() -> None:
    sizes = np.array([45_088_768, 16_777_216, 45_088_768, 7, 1])
    total = round(Fraction("0.123457") * int(sizes.sum()))
    found = budget.round_to_total(total * (sizes / sizes.sum()), total, np.zeros(5, dtype=int), sizes)
    assert found.sum() == total
    assert np.abs(found - total * sizes / sizes.sum()).max() < 1
