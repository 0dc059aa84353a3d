"""Scores of whole experts, and which of them stay, against plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from besa_cli.ops import experts


def test_the_sum_of_contributions_is_that_of_their_lengths() -> None:
    contributions = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-5.0, 12.0]])
    assert float(experts.contribution_sum(contributions)) == 5 + 0 + 13


def test_no_tokens_contribute_nothing() -> None:
    assert float(experts.contribution_sum(torch.empty(0, 7))) == 0


def test_a_score_is_a_mean_over_tokens_and_zero_without_any() -> None:
    sums, tokens = torch.tensor([6.0, 0.0, 1.5], dtype=torch.float64), torch.tensor([4, 0, 1])
    assert experts.scores(sums, tokens).tolist() == [1.5, 0.0, 1.5]


@pytest.mark.parametrize(
    ("share", "of", "removed"), [(0.25, 8, 2), (0.1, 10, 1), (0.3, 8, 2), (0.05, 8, 0), (0.7, 10, 7)]
)
def test_a_share_is_a_whole_number_of_experts(share: float, of: int, removed: int) -> None:
    assert experts.removed_count(share, of) == removed


@given(
    groups=st.integers(1, 4),
    size=st.integers(1, 5),
    seed=st.integers(0, 999),
    stay=st.integers(1, 5),
    values=st.integers(1, 4),
)
def test_of_each_group_the_best_stay(groups: int, size: int, seed: int, stay: int, values: int) -> None:
    """No expert that is removed scores higher than one of its group that stays; of equal ones the first stay."""
    stay = min(stay, size)
    drawn = torch.randint(values, (groups, size), generator=torch.Generator().manual_seed(seed))
    scores = drawn.flatten().double().tolist()
    kept = experts.remaining(scores, stay * groups, groups)
    assert kept == sorted(set(kept))
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        chosen = [number for number in members if number in kept]
        gone = [number for number in members if number not in kept]
        assert len(chosen) == stay
        worst = min((scores[number], -number) for number in chosen)
        assert all((scores[number], -number) < worst for number in gone)


def test_groups_that_do_not_divide_the_experts_are_an_error() -> None:
    with pytest.raises(ValueError, match="5 of 6 experts cannot stay in 2 equal groups"):
        experts.remaining([1.0] * 6, 5, 2)


def test_a_score_in_half_precision_is_not_summed_there() -> None:
    contributions = torch.full((4096, 3), 8.0, dtype=torch.float16)
    assert math.isclose(float(experts.contribution_sum(contributions)), 4096 * 8 * math.sqrt(3), rel_tol=1e-6)
