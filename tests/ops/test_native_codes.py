"""Products of packed codes against fp64 products of the dense weights, at every level that this processor has."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import few
from torch import Tensor

from besa_cli.ops import affine
from besa_cli.ops.affine import Grid, Quantized
from besa_cli.ops.kernels import native_codes, native_tiles
from besa_cli.runtime import matrix

LEVELS = ("torch", *native_tiles.supported())
VALUES = (torch.bfloat16, torch.float16)
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # of the result, relative
SUMMING = 2.0**-20  # of fp32 sums, relative to the sum of absolute products
WIDTHS = (None, 32, 64, 96, 128, 192, 50)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("BESA_INSTRUCTIONS", request.param)
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random_codes(rows: int, cols: int, grid: Grid, sparsity: float, seed: int = 0) -> Quantized:
    """Codes of every kind, those at both ends of the grid among them, with scales of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    groups = (rows, grid.groups(cols))
    zeros = torch.full(groups, grid.middle)
    if not grid.symmetric:
        zeros = torch.randint(grid.top + 1, groups, generator=generator)
    codes = torch.randint(grid.top + 1, (rows, cols), generator=generator)
    ends = torch.rand(rows, cols, generator=generator)
    codes = codes.masked_fill(ends < 0.1, 0).masked_fill(ends > 0.9, grid.top)
    scales = (
        torch.rand(groups, generator=generator) * 2.0 ** torch.randint(-12, 2, groups, generator=generator)
    ).half()
    quantized = Quantized(
        codes=codes.byte(), scales=affine.representable(scales.float()), zeros=zeros.byte(), grid=grid
    )
    return affine.pruned(quantized, torch.rand(rows, cols, generator=generator) >= sparsity)


def by_definition(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """The weights by the rule of the format, a column at a time."""
    rows, cols = quantized.codes.shape
    width = quantized.grid.group_size or cols
    weights = torch.empty(rows, cols)
    for col in range(cols):
        scale, zero = quantized.scales[:, col // width].float(), quantized.zeros[:, col // width].float()
        weights[:, col] = (quantized.codes[:, col].float() - zero) * scale
    return weights.to(dtype)


def assert_close(outputs: Tensor, inputs: Tensor, dense: Tensor) -> None:
    exact = inputs.double() @ dense.double().T
    sizes = inputs.double().abs() @ dense.double().abs().T
    allowed = exact.abs() * ROUNDING[outputs.dtype] + sizes * SUMMING + torch.finfo(outputs.dtype).smallest_normal
    assert bool(((outputs.double() - exact).abs() <= allowed).all())


def assert_multiplies(packed: matrix.PackedMatrix, dense: Tensor, vectors: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for dtype in (dense.dtype, torch.float32):
        inputs = torch.randn(vectors, dense.shape[1], generator=generator).to(dtype)
        outputs = packed.multiply(inputs)
        assert outputs.dtype == dtype
        assert_close(outputs, inputs, dense)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", affine.BITS)
def test_weights_are_those_of_the_format_and_products_those_in_fp64(
    bits: int, symmetric: bool, sparsity: float, level: str
) -> None:
    for (rows, cols), width in (((33, 700), 128), ((17, 65), 32), ((5, 260), None), ((1, 1), None)):
        codes = random_codes(rows, cols, Grid(bits=bits, group_size=width, symmetric=symmetric), sparsity)
        dense = by_definition(codes, torch.bfloat16)
        packed = matrix.pack_codes(codes, torch.bfloat16)
        assert torch.equal(packed.expand(), dense)
        for vectors in (1, 2, 8, 40):
            assert_multiplies(packed, dense, vectors)


@few
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 300),
    seed=st.integers(0, 1000),
    bits=st.sampled_from(affine.BITS),
    width=st.sampled_from(WIDTHS),
    symmetric=st.booleans(),
    value=st.sampled_from(VALUES),
    name=st.sampled_from(LEVELS),
    data=st.data(),
)
def test_any_shape_and_group_with_empty_and_full_rows_comes_back_and_multiplies(
    rows: int,
    cols: int,
    seed: int,
    bits: int,
    width: int | None,
    symmetric: bool,
    value: torch.dtype,
    name: str,
    data: st.DataObject,
) -> None:
    grid = Grid(bits=bits, group_size=width, symmetric=symmetric)
    codes = random_codes(rows, cols, grid, data.draw(st.sampled_from([0.0, 0.5, 0.95])), seed)
    kinds = data.draw(st.lists(st.sampled_from(["empty", "full", "any"]), min_size=rows, max_size=rows))
    zeros = affine.per_column(codes.zeros, grid, cols)
    for row, kind in enumerate(kinds):
        if kind != "any":
            codes.codes[row] = zeros[row] if kind == "empty" else (zeros[row].int() + 1) % (grid.top + 1)
    dense = by_definition(codes, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BESA_INSTRUCTIONS", name)
        packed = matrix.pack_codes(codes, value)
        assert torch.equal(packed.expand(), dense)
        assert_multiplies(packed, dense, data.draw(st.integers(1, 9)))


@pytest.mark.skipif(len(LEVELS) == 1, reason="the C++ kernels were not built: no compiler")
@pytest.mark.parametrize("bits", [4, 8])
def test_all_scales_in_fp16_give_the_rounded_weights(bits: int, level: str) -> None:
    scales = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)  # every positive number, the smallest too
    scales = scales[:: 37 if bits == 8 else 5].unsqueeze(1)
    grid = Grid(bits=bits, group_size=None)
    every = torch.arange(grid.top + 1, dtype=torch.uint8).expand(len(scales), -1)
    zeros = torch.full(scales.shape, grid.middle, dtype=torch.uint8)
    codes = Quantized(codes=every, scales=scales, zeros=zeros, grid=grid)
    packed, dense = matrix.pack_codes(codes, torch.bfloat16), by_definition(codes, torch.bfloat16)
    assert torch.equal(packed.expand(), dense)
    for place in (0, 1, grid.middle - 1, grid.top):  # alone, a weight is the product, in the kernel for one vector, too
        vector = torch.zeros(1, grid.top + 1, dtype=torch.bfloat16)
        vector[0, place] = 1.0
        assert torch.equal(packed.multiply(vector)[0], dense[:, place])


def test_any_number_of_threads_gives_the_same_bits(level: str, threads: Callable[[int], None]) -> None:
    codes = random_codes(500, 1000, Grid(bits=4, group_size=128), 0.5)
    inputs = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = []
    for number in (1, 2, 3):
        threads(number)
        packed = matrix.pack_codes(codes, torch.bfloat16)
        few_vectors = [packed.multiply(inputs[:vectors]) for vectors in (1, 3)] if level != "torch" else []
        found.append([packed.data, packed.expand(), *few_vectors])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif(len(LEVELS) == 1, reason="the C++ kernels were not built: no compiler")
@pytest.mark.parametrize(
    ("bits", "sparsity", "expected"),
    [(4, 0.5, 3.125), (8, 0.5, 5.125), (4, 0.0, 4.125), (8, 0.0, 8.125), (2, 0.5, 3.125)],
)
def test_bits_per_weight(bits: int, sparsity: float, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales at 16 bits for 128 weights; the two streams of 4 bits are not quite equally long."""
    monkeypatch.delenv("BESA_INSTRUCTIONS", raising=False)
    codes = random_codes(512, 4096, Grid(bits=bits, group_size=128), sparsity)
    kept = codes.codes != 1 << (bits - 1)
    if sparsity:
        exact = kept.float().mean().item()
        expected += (exact - sparsity) * max(bits, 4)
    stored = 8 * matrix.pack_codes(codes, torch.bfloat16).data.nbytes / kept.numel()
    assert expected - 0.01 <= stored <= expected + 0.08


@pytest.mark.skipif(len(LEVELS) == 1, reason="the C++ kernels were not built: no compiler")
def test_groups_that_the_kernels_do_not_know_are_packed_by_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BESA_INSTRUCTIONS", raising=False)
    for width, kind in ((50, matrix.TiledMatrix), (100, matrix.CodedMatrix), (64, matrix.CodedMatrix)):
        codes = random_codes(20, 100, Grid(bits=4, group_size=width), 0.5)
        assert isinstance(matrix.pack_codes(codes, torch.bfloat16), kind)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_infinite_inputs_reach_the_result_as_in_the_dense_product(bad: float, level: str) -> None:
    codes = random_codes(20, 70, Grid(bits=4, group_size=32), 0.5)
    dense = by_definition(codes, torch.bfloat16)
    inputs = torch.ones(1, 70, dtype=torch.bfloat16)
    inputs[0, 5] = bad
    outputs = matrix.pack_codes(codes, torch.bfloat16).multiply(inputs)
    expected = inputs.float() @ dense.float().T
    assert torch.equal(outputs.isnan(), expected.isnan())


def test_scales_lie_by_blocks_of_rows() -> None:
    scales = torch.arange(1.0, 37.0).view(18, 2).half()
    ordered = native_codes.by_blocks(scales)
    assert ordered.shape == (2, 2, 16)
    assert ordered[0, 1].tolist() == scales[:16, 1].tolist()
    assert ordered[1, 0].tolist() == [*scales[16:, 0].tolist(), *[1.0] * 14]
