"""How a sparse checkpoint stores a weight: the way there and back, and what is refused on the way back."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from support import strategies
from torch import Tensor

from besa_cli.checkpoint import sparse_format
from besa_cli.errors import BesaError
from besa_cli.ops import affine

NAME = "model.layers.0.mlp.up_proj.weight"


def parts_of(matrix: Tensor) -> dict[str, Tensor]:
    return sparse_format.encoded(NAME, matrix)


def half(rows: int = 6, cols: int = 21) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(rows, cols, generator=generator)
    return full.masked_fill(torch.rand(rows, cols, generator=generator) < 0.5, 0.0)


@strategies.few
@given(matrix=strategies.dead_columns(strategies.weights()))
def test_what_was_encoded_comes_back_and_is_never_larger(matrix: Tensor) -> None:
    stored = parts_of(matrix)
    assert sum(part.nbytes for part in stored.values()) <= matrix.nbytes
    back = sparse_format.decoded({**stored, "other.bias": torch.ones(3)}, "file")
    assert set(back) == {NAME, "other.bias"}
    assert back[NAME].dtype == matrix.dtype
    assert torch.equal(back[NAME].view(torch.int32), matrix.contiguous().view(torch.int32))


def test_bytes_are_a_bit_a_weight_and_the_values() -> None:
    matrix = half().to(torch.bfloat16)
    stored = {name.rpartition(".")[2]: part for name, part in parts_of(matrix).items()}
    kept = int((matrix != 0).sum())
    assert {name: part.nbytes for name, part in stored.items()} == {
        "weight_mask": 6 * 3,
        "weight_values": 2 * kept,
        "weight_shape": 16,
    }
    assert torch.equal(stored["weight_values"], matrix[matrix != 0])


@strategies.few
@given(matrix=strategies.dead_columns(strategies.weights()))
def test_the_bytes_are_known_beforehand(matrix: Tensor) -> None:
    matrix = matrix.abs()  # without negative zeros, which are stored
    rows, cols = matrix.shape
    expected = sum(part.nbytes for part in parts_of(matrix).values())
    assert sparse_format.encoded_bytes(rows, cols, int((matrix != 0).sum()), matrix.element_size()) == expected


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.bias", "lm_head"])
def test_what_is_no_matrix_of_weights_stays(name: str) -> None:
    tensor = torch.zeros(7) if name.endswith("norm.weight") else torch.zeros(7, 3)
    assert sparse_format.encoded(name, tensor) == {name: tensor}


def test_a_dense_matrix_stays_dense() -> None:
    assert list(parts_of(torch.ones(4, 9))) == [NAME]


def damaged(what: str) -> dict[str, Tensor]:
    stored = parts_of(half())
    mask, values, shape = (f"{NAME}_{part}" for part in ("mask", "values", "shape"))
    if what == "a bit":
        stored[mask] = stored[mask] ^ 1
    elif what == "a value":
        stored[values] = stored[values][1:]
    elif what == "a column":
        stored[shape] = stored[shape] + torch.tensor([0, 8])
    elif what == "sizes":
        stored[shape] = stored[shape][:1]
    elif what == "negative":
        stored[shape] = -stored[shape]
    else:
        del stored[f"{NAME}_{what}"]
    return stored


@pytest.mark.parametrize("what", ["a bit", "a value", "a column", "sizes", "negative", "mask", "values", "shape"])
def test_parts_that_do_not_belong_together_are_refused_by_name(what: str) -> None:
    with pytest.raises(BesaError, match=r"mlp\.up_proj\.weight.* in sparse-00002\.safetensors is damaged"):
        sparse_format.decoded(damaged(what), "sparse-00002.safetensors")


def quantized_parts() -> dict[str, Tensor]:
    grid = affine.Grid(bits=4, group_size=8, symmetric=False)
    on_grid = affine.nearest(half(4, 16), grid)
    return sparse_format.encoded_codes(NAME, affine.dequantize(on_grid), on_grid)


CODED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "codes of another dtype": ("codes", lambda part: part.long()),
    "codes too few": ("codes", lambda part: part[1:]),
    "codes as a scalar": ("codes", lambda part: part.sum().to(torch.uint8)),
    "a scale of NaN": ("scale", lambda part: part.fill_(float("nan"))),
    "a scale of 0": ("scale", lambda part: part.zero_()),
    "a scale below 0": ("scale", lambda part: -part),
    "scales in fp32": ("scale", lambda part: part.float()),
    "scales too few": ("scale", lambda part: part[:, :1]),
    "zero points beyond the grid": ("zero", lambda part: part.fill_(16)),
    "zero points of another dtype": ("zero", lambda part: part.long()),
    "a grid of 5 bits": ("grid", lambda part: torch.tensor([5, 8])),
    "a grid of floats": ("grid", lambda part: part.float()),
    "a grid of huge groups": ("grid", lambda part: torch.tensor([4, 1 << 40])),
    "a grid of nothing": ("grid", lambda part: torch.zeros(2, dtype=torch.int64)),
    "a grid of one": ("grid", lambda part: part[:1]),
    "values beside codes": ("values", lambda part: torch.ones(3)),
}


@pytest.mark.parametrize("what", CODED)
def test_wrong_codes_are_refused_by_name(what: str) -> None:
    name, how = CODED[what]
    stored = quantized_parts()
    assert torch.equal(
        sparse_format.decoded(stored, "file")[NAME], sparse_format.decoded(quantized_parts(), "file")[NAME]
    )
    stored[f"{NAME}_{name}"] = how(stored[f"{NAME}_{name}"])
    with pytest.raises(BesaError, match=r"mlp\.up_proj\.weight.* in file is damaged"):
        sparse_format.decoded(stored, "file")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_values_that_are_never_stored_are_refused(value: float) -> None:
    stored = parts_of(half())
    stored[f"{NAME}_values"][2] = value
    with pytest.raises(BesaError, match="holds zeros, NaN or infinity"):
        sparse_format.decoded(stored, "file")


def test_bits_beyond_the_last_column_are_refused() -> None:
    stored = parts_of(half(cols=21))
    stored[f"{NAME}_mask"][0, -1] |= 1 << 6
    with pytest.raises(BesaError, match="bits set beyond the last of 21 columns"):
        sparse_format.decoded(stored, "file")


def test_a_weight_both_whole_and_in_parts_is_refused() -> None:
    with pytest.raises(BesaError, match="both dense and in parts"):
        sparse_format.decoded({**parts_of(half()), NAME: half()}, "file")
