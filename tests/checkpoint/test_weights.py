"""Reading checkpoints: the check of every value, and the digest of the whole."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.strategies import fewer

from besa_cli.checkpoint import weights
from besa_cli.errors import BesaError

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
]


def stored(place: Path, tensor: torch.Tensor) -> weights.Weights:
    save_file({"of.weight": tensor}, place / "model.safetensors")
    return weights.Weights(place)


@fewer
@given(
    size=st.integers(1, 200),
    at=st.integers(0, 199),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    dtype=st.sampled_from(DTYPES[:4]),
)
def test_one_value_that_is_no_number_is_found_wherever_it_is(
    size: int, at: int, value: float, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensor = torch.arange(size).sub(size // 2).to(dtype)
    place = tmp_path_factory.mktemp("model")
    assert weights.check(stored(place, tensor))
    tensor[at % size] = value
    with pytest.raises(BesaError, match=r"^of\.weight in .* holds 1 values that are NaN or infinite"):
        weights.check(stored(place, tensor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (), (3, 0), (5, 7)], ids=str)
def test_every_shape_and_dtype_is_read(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    assert len(weights.check(stored(tmp_path, torch.ones(shape).to(dtype)))) == 64


def test_eight_bit_numbers_are_checked_too(tmp_path: Path) -> None:
    tensor = torch.ones(4, 5).to(torch.float8_e4m3fn)
    tensor[2, 3] = float("nan")
    with pytest.raises(BesaError, match="holds 1 values"):
        weights.check(stored(tmp_path, tensor))


def test_powers_of_two_of_eight_bits_may_be_large(tmp_path: Path) -> None:
    large = torch.full((4, 5), 2.0**25).to(torch.float8_e8m0fnu)
    assert weights.check(stored(tmp_path, large))


def test_numbers_beyond_fp32_are_numbers(tmp_path: Path) -> None:
    tensor = torch.tensor([1e300, float("inf"), -1e300], dtype=torch.float64)
    with pytest.raises(BesaError, match="holds 1 values"):
        weights.check(stored(tmp_path, tensor))


def test_extremes_that_are_numbers_are_no_infinity(tmp_path: Path) -> None:
    assert weights.check(stored(tmp_path, torch.tensor([torch.finfo(torch.float16).max, -65504.0]).half()))
