"""Codes packed into bytes, against whole numbers."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from support import strategies

from besa_cli.ops import packing


@strategies.few
@given(shape=strategies.shapes(), bits=st.integers(1, 8), seed=st.integers(0, 9))
def test_codes_are_one_number_a_row(shape: tuple[int, int], bits: int, seed: int) -> None:
    rows, cols = shape
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    data = packing.pack_codes(codes, bits)
    assert data.shape == (rows, -(-cols * bits // 8))
    for row in range(rows):
        number = int.from_bytes(bytes(data[row].tolist()), "little")
        assert number == sum(int(code) << (bits * col) for col, code in enumerate(codes[row]))
    assert torch.equal(packing.unpack_codes(data, bits, cols), codes)
