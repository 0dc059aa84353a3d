"""Hypothesis strategies for weights, scores and masks of awkward shapes, and the settings of tests that draw them."""

from fractions import Fraction

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
fewer = settings(few, max_examples=15)


def shapes(*, max_rows: int = 5, max_cols: int = 11) -> st.SearchStrategy[tuple[int, int]]:
    """(rows, cols): one row, one column, or anything with rows != cols."""
    rows, cols = st.integers(1, max_rows), st.integers(1, max_cols)
    one_row, one_column = st.tuples(st.just(1), cols), st.tuples(rows, st.just(1))
    return one_row | one_column | st.tuples(rows, cols).filter(lambda shape: shape[0] != shape[1])


def _matrices(elements: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    return shapes().flatmap(lambda shape: _array(np.float32, shape, elements)).map(torch.from_numpy)


def _array(
    dtype: type[np.generic], shape: tuple[int, int], elements: st.SearchStrategy[float]
) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(dtype, shape, elements=elements, fill=st.nothing())  # every element drawn on its own


def weights() -> st.SearchStrategy[Tensor]:
    """fp32 weights of shape (rows, cols): quarters, so that ties and zeros (of both signs) abound, or any numbers."""
    quarters = st.integers(-8, 8).map(lambda number: number / 4)
    return _matrices(quarters | st.just(-0.0)) | _matrices(st.floats(-8, 8, width=32, allow_subnormal=False))


@st.composite
def dead_columns(draw: st.DrawFn, matrices: st.SearchStrategy[Tensor]) -> Tensor:
    """The same matrices, with some columns and some rows all zero."""
    matrix = draw(matrices).clone()
    rows, cols = matrix.shape
    matrix[:, draw(st.lists(st.integers(0, cols - 1), max_size=2))] = 0.0
    matrix[draw(st.lists(st.integers(0, rows - 1), max_size=1))] = 0.0
    return matrix


def tied_scores() -> st.SearchStrategy[Tensor]:
    """Non-negative scores with many ties."""
    return _matrices(st.integers(0, 6).map(lambda number: number / 4))


@st.composite
def distinct_scores(draw: st.DrawFn) -> Tensor:
    """Non-negative scores of which no two are equal in the whole matrix."""
    rows, cols = draw(shapes())
    order = draw(st.permutations(range(rows * cols)))
    return torch.tensor(order, dtype=torch.float32).reshape(rows, cols)


def scores() -> st.SearchStrategy[Tensor]:
    """Non-negative scores, tied or not; −1 in none of them."""
    return tied_scores() | distinct_scores() | dead_columns(tied_scores())


@st.composite
def marked_scores(draw: st.DrawFn) -> Tensor:
    """Scores in which −1 marks weights that are zero already."""
    matrix = draw(scores())
    rows, cols = matrix.shape
    tenths = draw(st.lists(st.sampled_from([0, 2, 8, 10]), min_size=rows, max_size=rows))  # uneven from row to row
    chances = torch.from_numpy(draw(_array(np.int64, (rows, cols), st.integers(0, 9))))
    return matrix.masked_fill(chances < torch.tensor(tenths).unsqueeze(1), -1.0)


def some_masks() -> st.SearchStrategy[Tensor]:
    """Boolean masks of shape (rows, cols)."""
    return shapes().flatmap(lambda shape: _array(np.bool_, shape, st.booleans())).map(torch.from_numpy)


@st.composite
def shares(draw: st.DrawFn) -> tuple[list[Fraction], int, list[int], list[int], list[int]]:
    """A rounding problem: shares in eighths, a total (also beyond the bounds), lower and upper bounds, ties."""
    count = draw(st.integers(1, 6))

    def several(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    lower = several(0, 6)
    upper = [low + more for low, more in zip(lower, several(0, 6), strict=True)]
    total = draw(st.integers(max(sum(lower) - 2, 0), sum(upper) + 2))
    return [Fraction(eighths, 8) for eighths in several(0, 80)], total, lower, upper, several(0, 2)
