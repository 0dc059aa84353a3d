"""Products of tiled matrices against fp64 products of the dense ones, at every level that this processor has."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import few
from torch import Tensor

from besa_cli.errors import UsageError
from besa_cli.ops import packing
from besa_cli.ops.kernels import native_tiles

LEVELS = native_tiles.supported()
pytestmark = pytest.mark.skipif(not LEVELS, reason="the C++ kernels were not built: no compiler")
VALUES = (torch.bfloat16, torch.float16)
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # of the result, relative
SUMMING = 2.0**-20  # of fp32 sums, relative to the sum of absolute products


def sparse(rows: int, cols: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(rows, cols, generator=generator)
    return full.masked_fill(torch.rand(rows, cols, generator=generator) < sparsity, 0.0).to(dtype)


def packed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The tiles of a matrix and where its blocks begin."""
    mask = packing.stored_mask(matrix)
    starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    blocks = native_tiles.block_starts(starts, matrix.shape[1])
    tiles = torch.zeros(native_tiles.packed_bytes(blocks), dtype=torch.uint8)
    native_tiles.pack(packing.pack_mask(mask), matrix[mask], starts, blocks, matrix.shape[1], tiles)
    return tiles, blocks


def assert_close(outputs: Tensor, inputs: Tensor, matrix: Tensor) -> None:
    exact = inputs.double() @ matrix.double().T
    sizes = inputs.double().abs() @ matrix.double().abs().T
    allowed = exact.abs() * ROUNDING[outputs.dtype] + sizes * SUMMING + torch.finfo(outputs.dtype).smallest_normal
    assert bool(((outputs.double() - exact).abs() <= allowed).all())


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("BESA_INSTRUCTIONS", request.param)
    return str(request.param)


@pytest.fixture
def threads() -> "Iterator[Callable[[int], None]]":
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


SHAPES = [(1, 1), (7, 3), (16, 64), (17, 65), (33, 700), (5, 4200), (40, 4097)]


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("value", VALUES)
def test_products_are_those_in_fp64_up_to_rounding(
    value: torch.dtype, rows: int, cols: int, sparsity: float, level: str
) -> None:
    matrix = sparse(rows, cols, sparsity, value)
    tiles, blocks = packed(matrix)
    for vectors in (1, 2, 3, 8, native_tiles.MOST):
        for dtype in (value, torch.float32):
            inputs = sparse(vectors, cols, 0.0, dtype, seed=1)
            outputs = native_tiles.multiply(tiles, blocks, inputs, rows, value)
            assert outputs.dtype == dtype
            assert_close(outputs, inputs, matrix)
    inputs = sparse(1, cols, 0.0, value, seed=2)
    assert_close(native_tiles.multiply_dense(matrix, inputs), inputs, matrix)


@few
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 200),
    seed=st.integers(0, 1000),
    value=st.sampled_from(VALUES),
    name=st.sampled_from(LEVELS or ("plain",)),
    data=st.data(),
)
def test_any_shape_with_empty_and_full_rows_comes_back_and_multiplies(
    rows: int, cols: int, seed: int, value: torch.dtype, name: str, data: st.DataObject
) -> None:
    matrix = sparse(rows, cols, data.draw(st.sampled_from([0.1, 0.5, 0.95])), value, seed)
    kinds = data.draw(st.lists(st.sampled_from(["empty", "full", "any"]), min_size=rows, max_size=rows))
    for row, kind in enumerate(kinds):
        if kind != "any":
            matrix[row] = 0.0 if kind == "empty" else torch.linspace(1, 2, cols)
    tiles, blocks = packed(matrix)
    inputs = sparse(data.draw(st.integers(1, 9)), cols, 0.0, value, seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BESA_INSTRUCTIONS", name)
        back = torch.full((rows, cols), 7.0, dtype=value)
        native_tiles.expand(tiles, blocks, rows, 0, back)
        assert torch.equal(back, matrix)
        assert_close(native_tiles.multiply(tiles, blocks, inputs, rows, value), inputs, matrix)


def test_some_rows_are_expanded_alone(level: str) -> None:
    matrix = sparse(70, 130, 0.5, torch.bfloat16)
    tiles, blocks = packed(matrix)
    for first, last in ((0, 16), (16, 48), (48, 70), (64, 70)):
        part = torch.empty(last - first, 130, dtype=torch.bfloat16)
        native_tiles.expand(tiles, blocks, 70, first // native_tiles.ROWS, part)
        assert torch.equal(part, matrix[first:last])


@pytest.mark.parametrize("value", VALUES)
def test_any_number_of_threads_gives_the_same_bits(
    value: torch.dtype, level: str, threads: Callable[[int], None]
) -> None:
    matrix = sparse(500, 1000, 0.5, value)
    inputs = sparse(3, 1000, 0.0, value, seed=1)
    found = []
    for number in (1, 2, 3):
        threads(number)
        tiles, blocks = packed(matrix)
        few_vectors = [native_tiles.multiply(tiles, blocks, inputs[:n], 500, value) for n in (1, 3)]
        back = torch.empty_like(matrix)
        native_tiles.expand(tiles, blocks, 500, 0, back)
        found.append([tiles, *few_vectors, native_tiles.multiply_dense(matrix, inputs[:1]), back])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_batch_gives_each_vector_what_it_gets_beside_others(level: str) -> None:
    matrix = sparse(40, 300, 0.5, torch.float16)
    tiles, blocks = packed(matrix)
    inputs = sparse(7, 300, 0.0, torch.float16, seed=1)
    together = native_tiles.multiply(tiles, blocks, inputs, 40, torch.float16)
    swapped = native_tiles.multiply(tiles, blocks, inputs.flip(0), 40, torch.float16)
    assert_close(together, inputs, matrix)
    assert_close(swapped.flip(0), inputs, matrix)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_infinite_inputs_reach_the_result_as_in_the_dense_product(bad: float, value: torch.dtype, level: str) -> None:
    matrix = sparse(20, 70, 0.5, value)
    tiles, blocks = packed(matrix)
    inputs = torch.ones(1, 70, dtype=value)
    inputs[0, 5] = bad
    outputs = native_tiles.multiply(tiles, blocks, inputs, 20, value)
    dense = inputs.float() @ matrix.float().T
    assert torch.equal(outputs.isnan(), dense.isnan())
    assert torch.equal(outputs.isinf(), dense.isinf())


@pytest.mark.parametrize("value", VALUES)
def test_results_beyond_the_dtype_are_infinite_and_small_ones_are_rounded_as_torch_does(
    value: torch.dtype, level: str
) -> None:
    numbers = [65_503.0, 65_519.0, 65_520.0, 1e38, 3.39e38, 2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-26, 1.0009765625]
    matrix = torch.ones(1, 1, dtype=value)
    tiles, blocks = packed(matrix)
    for number in (*numbers, *(-number for number in numbers)):
        exact = torch.tensor([[number]])
        wide = native_tiles.multiply(tiles, blocks, exact, 1, value)
        assert torch.equal(wide, exact)
        half = torch.tensor([[number, number]]).to(value)
        pair = sparse(1, 2, 0.0, value).fill_(0.5)
        summed = native_tiles.multiply(*packed(pair), half, 1, value)
        assert torch.equal(summed, (half.float() @ pair.float().T).to(value))


def test_the_environment_chooses_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BESA_INSTRUCTIONS", raising=False)
    assert native_tiles.level() == LEVELS[-1]
    assert LEVELS[0] == "plain"
    for name in (*LEVELS, "torch"):
        monkeypatch.setenv("BESA_INSTRUCTIONS", name)
        assert native_tiles.level() == name
    monkeypatch.setenv("BESA_INSTRUCTIONS", "mmx")
    with pytest.raises(UsageError, match=r"BESA_INSTRUCTIONS=mmx is not one of torch, plain"):
        native_tiles.level()
