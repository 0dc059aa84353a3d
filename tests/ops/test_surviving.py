"""Least squares over the kept weights, against dense solutions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from besa_cli.ops import importance, surviving

DAMPING = 0.01


def problem(rows: int, cols: int, density: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, a mask with an empty and a full row, and inputs with correlated columns."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * cols, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    weight, mask = torch.randn(rows, cols, generator=generator), torch.rand(rows, cols, generator=generator) < density
    mask[0], mask[-1] = False, True
    return weight, mask, inputs


def direct(weight: Tensor, mask: Tensor, inputs: Tensor) -> Tensor:
    """Solve each row's normal equations in fp64."""
    gram = importance.gram(inputs).double()
    system = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    found = torch.zeros(weight.shape, dtype=torch.float64)
    for row, kept in enumerate(mask):
        columns = kept.nonzero().squeeze(1)
        if len(columns):
            wanted = (system @ weight[row].double())[columns]
            found[row, columns] = torch.linalg.solve(system[columns][:, columns], wanted)
    return found


@pytest.mark.parametrize("density", [0.3, 0.5, 0.8])
def test_every_row_is_its_least_squares_solution(density: float) -> None:
    weight, mask, inputs = problem(7, 24, density, seed=0)
    found = surviving.solve(weight, mask, importance.gram(inputs), damping=DAMPING)
    torch.testing.assert_close(found.double(), direct(weight, mask, inputs), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found[-1], weight[-1])  # nothing is pruned
    assert not found[~mask].any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), steps=st.integers(0, 12))
def test_no_step_makes_the_output_worse(seed: int, steps: int) -> None:
    weight, mask, inputs = problem(5, 12, 0.5, seed)
    gram = importance.gram(inputs)
    shifted = gram.double() + DAMPING * float(gram.diagonal().mean()) * torch.eye(12, dtype=torch.float64)

    def errors(count: int) -> Tensor:
        moved = surviving.solve(weight, mask, gram, damping=DAMPING, steps=count).double() - weight.double()
        return ((moved @ shifted) * moved).sum(1)

    before, after = errors(steps), errors(steps + 1)
    assert (after <= before * (1 + 1e-4) + 1e-6).all()


def test_columns_without_input_and_rows_without_weights_stay_finite() -> None:
    weight, mask, inputs = problem(4, 8, 0.5, seed=1)
    inputs[:, 3] = 0.0
    weight[2] = 0.0
    found = surviving.solve(weight, mask, importance.gram(inputs), damping=DAMPING)
    assert found.isfinite().all()
    assert surviving.solve(weight, mask, torch.zeros(8, 8), damping=DAMPING).isfinite().all()
