"""Codes packed into bytes, against whole numbers; groups, against loops."""

import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

from besa_cli.ops import packing


@strategies.few
@given(shape=strategies.shapes(), bits=st.integers(1, 8), seed=st.integers(0, 9))
def test_codes_are_one_number_a_row(shape: tuple[int, int], bits: int, seed: int) -> None:
    rows, cols = shape
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    data = packing.packed(codes, bits)
    assert data.shape == (rows, -(-cols * bits // 8))
    for row in range(rows):
        number = int.from_bytes(bytes(data[row].tolist()), "little")
        assert number == sum(int(code) << (bits * col) for col, code in enumerate(codes[row]))
    assert torch.equal(packing.unpacked(data, bits, cols), codes)


@strategies.few
@given(shape=strategies.shapes(), width=st.integers(1, 12))
def test_each_column_gets_its_groups_value(shape: tuple[int, int], width: int) -> None:
    rows, cols = shape
    values = torch.arange(rows * -(-cols // width)).reshape(rows, -1)
    found = packing.spread(values, width, cols)
    assert [[int(values[row, col // width]) for col in range(cols)] for row in range(rows)] == found.tolist()


def test_weights_are_code_minus_zero_point_times_scale() -> None:
    codes, zeros = torch.tensor([[0, 7, 15]], dtype=torch.uint8), torch.tensor([[8, 7, 0]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 3.0, 2.0]], dtype=torch.float16)
    assert packing.weights(codes, scales, zeros).tolist() == [[-4.0, 0.0, 30.0]]
