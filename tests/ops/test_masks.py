"""From scores to masks: ranks, exact counts, nesting, symmetries, n:m."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracles
from support.strategies import (
    dead_columns,
    distinct_scores,
    few,
    marked_scores,
    scores,
    some_masks,
    tied_scores,
    weights,
)
from torch import Tensor

from besa_cli.ops import importance, kernels, masks


def a_total(data: st.DataObject, matrix: Tensor) -> int:
    return data.draw(st.integers(0, matrix.numel()), label="total")


@few
@given(some_masks())
def test_mask_from_ranks_finds_a_mask_again_from_ranks_that_put_its_pruned_columns_first(keep: Tensor) -> None:
    assert torch.equal(masks.mask_from_ranks(kernels.ranks(keep.float()), (~keep).sum(1)), keep)


@few
@given(st.data(), marked_scores())
def test_row_wise_equals_the_loop(data: st.DataObject, matrix: Tensor) -> None:
    total = a_total(data, matrix)
    assert torch.equal(masks.row_wise(matrix, total), oracles.row_wise(matrix, total))


@few
@given(st.data(), scores())
def test_row_wise_prunes_the_exact_count_evenly_and_the_smallest_of_each_row(
    data: st.DataObject, matrix: Tensor
) -> None:
    total = a_total(data, matrix)
    keep = masks.row_wise(matrix, total)
    counts = (~keep).sum(1)
    assert int(counts.sum()) == total
    assert set(counts.tolist()) <= {total // len(matrix), -(-total // len(matrix))}
    pruned_most = matrix.masked_fill(keep, -torch.inf).amax(1)
    kept_least = matrix.masked_fill(~keep, torch.inf).amin(1)
    assert bool((pruned_most <= kept_least).all())


@few
@given(st.data(), marked_scores())
def test_masks_of_rising_sparsity_are_nested(data: st.DataObject, matrix: Tensor) -> None:
    low, high = sorted((a_total(data, matrix), a_total(data, matrix)))
    assert not bool((~masks.row_wise(matrix, low) & masks.row_wise(matrix, high)).any())


@few
@given(st.data(), tied_scores())
def test_scaling_rows_leaves_the_mask(data: st.DataObject, matrix: Tensor) -> None:
    rows, cols = matrix.shape
    total = rows * data.draw(st.integers(0, cols), label="pruned in each row")
    factors = data.draw(st.lists(st.floats(0.01, 100), min_size=rows, max_size=rows), label="factors")
    scaled = matrix * torch.tensor(factors).unsqueeze(1)
    assert torch.equal(masks.row_wise(scaled, total), masks.row_wise(matrix, total))


@few
@given(st.data(), distinct_scores())
def test_permuting_columns_permutes_the_mask(data: st.DataObject, matrix: Tensor) -> None:
    total = a_total(data, matrix)
    permutation = data.draw(st.permutations(range(matrix.shape[1])), label="permutation")
    assert torch.equal(masks.row_wise(matrix[:, permutation], total), masks.row_wise(matrix, total)[:, permutation])


@few
@given(st.data(), dead_columns(weights()))
def test_existing_zeros_go_first_and_count(data: st.DataObject, weight: Tensor) -> None:
    rows, cols = weight.shape
    total = rows * data.draw(st.integers(0, cols), label="pruned in each row")
    keep = masks.row_wise(masks.mark_zeros_(importance.magnitude(weight), weight), total)
    zeros = weight == 0
    assert not bool((keep & zeros).any())
    assert int((~keep).sum()) == max(total, int(zeros.sum()))
    if bool((zeros.sum(1) <= total // rows).all()):
        assert (~keep).sum(1).tolist() == [total // rows] * rows


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_zeros_of_either_sign_are_counted_in_every_dtype_and_nothing_else(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.0, -0.0, 1.0, float("nan")], [0.5, -2.0, 0.0, 1.5]])
    assert masks.count_zeros(values.to(dtype)) == 3
    assert masks.count_zeros(torch.tensor([True, False, False])) == 2


def test_zeros_come_before_weights_whose_score_is_zero_too() -> None:
    weight = torch.tensor([[3.0, 0.0, 2.0, -0.0]])
    norms = torch.tensor([0.0, 1.0, 1.0, 1.0])  # column 0 never saw an input
    marked = masks.mark_zeros_(importance.wanda(weight, norms), weight)
    assert marked.tolist() == [[0.0, -1.0, 2.0, -1.0]]
    assert masks.row_wise(marked, 2).tolist() == [[True, False, True, False]]
    assert masks.row_wise(marked, 3).tolist() == [[False, False, True, False]]


def test_rows_with_more_zeros_than_their_share_keep_them_and_the_others_give_way() -> None:
    matrix = torch.tensor([[-1.0] * 4, [2.0, 1.0, 9.0, 8.0], [5.0, 6.0, 0.0, 9.0]])
    # four are zero; the other two rows share three, 1.5 each: the extra one goes by the second score, 2 < 5
    keep = masks.row_wise(matrix, 7)
    assert (~keep).sum(1).tolist() == [4, 2, 1]
    assert keep[1:].tolist() == [[False, False, True, True], [True, True, False, True]]


@few
@given(marked_scores(), st.integers(0, 5), st.integers(1, 5))
def test_n_of_m_equals_the_loop(matrix: Tensor, n: int, m: int) -> None:
    n = min(n, m)
    assert torch.equal(masks.n_of_m(matrix, n, m), oracles.n_of_m(matrix, n, m))


@few
@given(scores(), st.integers(1, 5), st.integers(1, 5))
def test_every_full_window_has_exactly_n_and_the_ragged_tail_stays_dense(matrix: Tensor, n: int, m: int) -> None:
    n, cols = min(n, m), matrix.shape[1]
    keep = masks.n_of_m(matrix, n, m)
    full = cols // m
    counts = [(~keep[:, window * m : (window + 1) * m]).sum(1) for window in range(full)]
    assert all(bool((count == n).all()) for count in counts)
    assert bool(keep[:, full * m :].all())
    assert int((~keep).sum()) == matrix.shape[0] * full * n


@few
@given(marked_scores(), st.integers(1, 5), st.integers(1, 5))
def test_existing_zeros_count_among_the_n_and_stay_beyond_them(matrix: Tensor, n: int, m: int) -> None:
    n = min(n, m)
    keep = masks.n_of_m(matrix, n, m)
    assert not bool((keep & (matrix < 0)).any())
    for start in range(0, matrix.shape[1] - m + 1, m):
        window = slice(start, start + m)
        zeros = (matrix[:, window] < 0).sum(1)
        assert torch.equal((~keep[:, window]).sum(1), zeros.clamp_min(n))
