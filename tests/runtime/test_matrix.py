"""Packed matrices, in tiles and as stored: what they hold, what they take, and products with many vectors."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from besa_cli.ops import packing
from besa_cli.ops.kernels import native_tiles
from besa_cli.runtime import matrix


@pytest.fixture(params=("torch", *native_tiles.supported()[-1:]))
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("BESA_INSTRUCTIONS", request.param)
    return str(request.param)


def half(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(rows, cols, generator=generator).argsort(1) < cols // 2
    return torch.randn(rows, cols, generator=generator).masked_fill(~keep, 0.0).to(dtype)


def packed(dense: Tensor) -> matrix.PackedMatrix:
    mask = packing.stored_mask(dense)
    return matrix.pack(mask, dense[mask])


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (33, 70), (16, 128), (100, 4100), (900, 3000)])
def test_the_dense_matrix_comes_back(rows: int, cols: int, level: str) -> None:
    dense = half(rows, cols)
    assert torch.equal(packed(dense).expand(), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vectors", [0, 1, native_tiles.MOST, native_tiles.MOST + 1, 70])
def test_products_with_any_number_of_vectors(vectors: int, dtype: torch.dtype, level: str) -> None:
    dense = half(900, 3000, torch.float16 if dtype == torch.float16 else torch.bfloat16)
    inputs = torch.randn(vectors, 3000, generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs = packed(dense).multiply(inputs)
    exact = inputs.double() @ dense.double().T
    assert outputs.shape == (vectors, 900)
    assert outputs.dtype == dtype
    sizes = inputs.double().abs() @ dense.double().abs().T
    assert bool(((outputs.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + sizes * 2.0**-20).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vectors", [1, 7, 64])
def test_the_error_is_no_larger_than_that_of_the_dense_product(vectors: int, dtype: torch.dtype, level: str) -> None:
    dense = half(900, 3000, dtype)
    inputs = torch.randn(vectors, 3000, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = inputs.double() @ dense.double().T
    own, of_torch = (
        float((found.double() - exact).square().mean())
        for found in (packed(dense).multiply(inputs), torch.nn.functional.linear(inputs, dense))
    )
    assert own <= 1.02 * of_torch  # both round their sums once; where one is a bit nearer is chance


def test_half_of_the_weights_take_nine_bits_each(level: str) -> None:
    dense = half(512, 4096)
    bits = 8 * packed(dense).data.nbytes / dense.numel()
    assert 9 <= bits < 9.01


def test_without_a_library_torch_does_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BESA_INSTRUCTIONS", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(native_tiles, "LIBRARY", tmp_path / "absent.so")
        native_tiles.supported.cache_clear()
        assert native_tiles.level() == "torch"
        assert "were not built" in native_tiles.reason()
        dense = half(33, 70)
        assert isinstance(packed(dense), matrix.MaskedMatrix)
        assert torch.equal(packed(dense).expand(), dense)
    native_tiles.supported.cache_clear()
