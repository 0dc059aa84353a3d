"""Masks as bits, against loops over every weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import strategies
from torch import Tensor

from besa_cli.ops import packing

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)


@strategies.few
@given(mask=strategies.some_masks())
def test_bit_c_of_a_row_is_in_byte_c_div_8_from_the_lowest(mask: Tensor) -> None:
    rows, cols = mask.shape
    bits = packing.pack_mask(mask)
    assert bits.shape == (rows, (cols + 7) // 8)
    for row in range(rows):
        number = int.from_bytes(bytes(bits[row].tolist()), "little")
        assert number == sum(1 << col for col in range(cols) if mask[row, col])
    assert torch.equal(packing.unpack_mask(bits, cols), mask)


@strategies.few
@given(matrix=strategies.dead_columns(strategies.weights()), dtype=st.sampled_from(DTYPES))
def test_values_come_back_bit_for_bit(matrix: Tensor, dtype: torch.dtype) -> None:
    matrix = matrix.to(dtype)
    mask = packing.stored_mask(matrix)
    expected = [value for row in matrix.tolist() for value in row if str(value) not in ("0.0", "0")]
    assert matrix[mask].tolist() == expected
    back = packing.expand(mask, matrix[mask])
    assert torch.equal(back.view(torch.uint8), matrix.view(torch.uint8))


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (2, 17), (5, 64)])
def test_empty_and_full_matrices(shape: tuple[int, int]) -> None:
    assert not packing.pack_mask(packing.stored_mask(torch.zeros(shape))).any()
    full = packing.pack_mask(packing.stored_mask(torch.full(shape, -1.5)))
    assert sum(int(byte).bit_count() for byte in full.flatten()) == shape[0] * shape[1]
