"""Rows' sparsities under one budget: exact counts, and gradients against naive sums."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from besa_cli.ops import kernels, row_rates


@given(st.integers(0, 2**31), st.integers(1, 40), st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_the_counts_meet_the_budget_exactly_and_stay_in_bounds(seed: int, rows: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    cols = torch.randint(1, 50, (rows,), generator=generator)
    zeros = (torch.rand(rows, generator=generator) * cols * 0.3).long().numpy()
    theta = torch.randn(rows, generator=generator) * 3
    total = round(share * int(cols.sum()))
    theta += row_rates.shift(theta, cols, total)
    found = row_rates.counts(theta, cols, zeros, total)
    assert int(found.sum()) == max(total, int(zeros.sum()))
    assert (found.numpy() >= zeros).all()
    assert (found <= cols).all()


def test_the_shift_meets_the_budget_in_real_numbers() -> None:
    theta, cols = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([10, 20, 30])
    moved = theta.double() + row_rates.shift(theta, cols, 33)
    assert float(torch.sigmoid(moved) @ cols.double()) == pytest.approx(33, abs=1e-9)


def test_the_logits_give_the_counts_back() -> None:
    counts, cols = torch.tensor([0, 7, 10, 19]), torch.tensor([10, 10, 10, 20])
    theta = row_rates.logits(counts, cols)
    assert row_rates.counts(theta, cols, np.zeros(4, dtype=np.int64), int(counts.sum())).tolist() == counts.tolist()


@pytest.mark.parametrize("cols", [7, 100, 237])
def test_the_gradient_is_the_mean_over_ranks_near_the_last_pruned(cols: int) -> None:
    torch.manual_seed(cols)
    weight, gradient = torch.randn(9, cols), torch.randn(9, cols)
    ranks = kernels.ranks(torch.rand(9, cols))
    pruned = torch.linspace(0, cols, 9).long()
    found = row_rates.gradient(gradient, weight, ranks, pruned)
    for row in range(9):
        bucket = int(pruned[row]) * 100 // cols
        low, high = max(bucket - 2, 0), min(bucket + 3, 100)
        inside = [
            j for j in range(cols) if 100 * int(ranks[row, j]) >= low * cols and 100 * int(ranks[row, j]) < high * cols
        ]
        mean = sum(float(gradient[row, j] * weight[row, j]) for j in inside) / max(len(inside), 1)
        assert float(found[row]) == pytest.approx(-mean, abs=1e-5)
