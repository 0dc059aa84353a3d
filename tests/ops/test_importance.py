"""Scores and statistics against sums written out."""

import math

import pytest
import torch
from hypothesis import given
from support.strategies import dead_columns, few, weights
from torch import Tensor

from besa_cli.ops import importance, obs

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (4, 1)])
def test_squared_sums_and_gram_are_sums_over_tokens(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = inputs(*shape, dtype=dtype)
    tokens = x.reshape(-1, shape[-1]).tolist()
    cols = range(shape[-1])
    squares = [math.fsum(token[col] ** 2 for token in tokens) for col in cols]
    products = [[math.fsum(token[a] * token[b] for token in tokens) for b in cols] for a in cols]
    sums, gram = importance.squared_sums(x), importance.gram(x)
    assert (sums.dtype, gram.dtype) == (torch.float32, torch.float32)
    assert sums.tolist() == pytest.approx(squares, rel=1e-5)
    for row, expected in zip(gram.tolist(), products, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_statistics_of_half_precision_inputs_do_not_overflow_or_stall() -> None:
    large = torch.full((1000, 2), 256.0, dtype=torch.float16)  # the square alone is beyond float16
    assert importance.squared_sums(large).tolist() == [256.0**2 * 1000] * 2
    assert importance.gram(large).tolist() == [[256.0**2 * 1000] * 2] * 2


@few
@given(dead_columns(weights()))
def test_magnitude_and_wanda_are_products(weight: Tensor) -> None:
    norms = torch.arange(weight.shape[1], dtype=torch.float32)  # column 0 never saw an input
    sizes, scores = importance.magnitude(weight), importance.wanda(weight, norms)
    for row, values in enumerate(weight.tolist()):
        assert sizes[row].tolist() == [abs(value) for value in values]
        assert scores[row].tolist() == pytest.approx([abs(value) * col for col, value in enumerate(values)], rel=1e-6)
    assert bool((scores >= 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_computed_in_fp32(dtype: torch.dtype) -> None:
    weight = inputs(3, 4, dtype=dtype)
    norms = torch.tensor([1e-6, 1.0, 3e5, 0.1])  # beyond float16 at both ends
    scores = importance.wanda(weight, norms)
    expected = [[abs(value) * norm for value, norm in zip(row, norms.tolist(), strict=True)] for row in weight.tolist()]
    assert scores.dtype == torch.float32
    for row, values in zip(scores.tolist(), expected, strict=True):
        assert row == pytest.approx(values, rel=1e-6)


@few
@given(weights())
def test_sparsegpts_score_is_the_squared_weight_over_the_inverses_diagonal(weight: Tensor) -> None:
    cols = weight.shape[1]
    x = inputs(3 * cols, cols)
    diagonal = obs.inverse_diagonal(importance.gram(x), 0.01)
    hessian = (x.T @ x).double()
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(cols))
    assert diagonal.tolist() == pytest.approx(inverse.diagonal().tolist(), rel=1e-3)
    scores = importance.sparsegpt(weight, diagonal)
    for row, line in zip(weight.tolist(), scores.tolist(), strict=True):
        expected = [number**2 / float(diagonal[col]) for col, number in enumerate(row)]
        assert line == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shared", [0.0, 99.99])
def test_sparsegpts_score_of_a_column_without_input_is_zero(shared: float) -> None:
    """Also where live columns have a small diagonal, or are nearly the same."""
    alive = 100.0 if shared else 0.01
    gram = torch.tensor([[alive, shared, 0.0], [shared, alive, 0.0], [0.0, 0.0, 0.0]])
    scores = importance.sparsegpt(torch.tensor([[0.1, -0.1, 9.0]]), obs.inverse_diagonal(gram, 0.01))
    assert float(scores[0, 2]) == 0.0
    assert bool((scores[0, :2] > 0).all())
