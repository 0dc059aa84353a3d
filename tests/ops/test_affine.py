"""Grids against plain loops with fp16 numbers of numpy, and against gguf's own unpacking."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import dead_columns, few, weights
from torch import Tensor

from besa_cli.errors import BesaError, UsageError
from besa_cli.ops import affine
from besa_cli.ops.affine import Grid

GRIDS = st.builds(
    Grid,
    bits=st.sampled_from(affine.BITS),
    group_size=st.none() | st.integers(1, 13),
    symmetric=st.booleans(),
)


def plain(weight: Tensor, grid: Grid) -> list[list[tuple[float, float, list[int]]]]:
    """For each row and group its scale, zero point and codes: the formula, one weight after the other, in fp64."""
    top = 2**grid.bits - 1
    rows = []
    for row in weight.tolist():
        size = grid.group_size or len(row)
        found = []
        for start in range(0, len(row), size):
            group = row[start : start + size]
            low, high = min(0.0, *group), max(0.0, *group)
            if grid.symmetric:
                low, high = -max(-low, high), max(-low, high)
            step = float(np.float16(np.float32((np.float32(high) - np.float32(low)) / np.float32(top))))
            scale = 1.0 if low == high else max(step, 2.0**-24)
            zero = 2 ** (grid.bits - 1) if grid.symmetric else min(max(round(-low / scale), 0), top)
            codes = [min(max(round(value / scale) + zero, 0), top) for value in group]
            found.append((scale, zero, codes))
        rows.append(found)
    return rows


@few
@given(weight=dead_columns(weights()), grid=GRIDS)
def test_codes_scales_and_zero_points_are_those_of_the_loop(weight: Tensor, grid: Grid) -> None:
    made = affine.nearest(weight, grid)
    groups = plain(weight, grid)
    assert made.scales.dtype == torch.float16
    assert made.scales.tolist() == [[scale for scale, _, _ in row] for row in groups]
    assert made.zeros.tolist() == [[zero for _, zero, _ in row] for row in groups]
    codes = torch.tensor([[code for _, _, codes in row for code in codes] for row in groups])
    apart = (made.codes.int() - codes).abs()
    if int(apart.max()):  # a quotient that is half a whole number in fp32 need not be one in fp64
        h = affine.per_column(made.scales.double(), grid, weight.shape[1])
        steps = weight.double() / h
        half = ((steps - steps.floor()) - 0.5).abs() < 1e-4 * (1 + steps.abs())
        assert int(apart.max()) == 1
        assert bool(half[apart == 1].all())


@few
@given(weight=dead_columns(weights()), grid=GRIDS)
def test_a_zero_stays_a_zero_and_no_weight_is_further_away_than_half_a_step(weight: Tensor, grid: Grid) -> None:
    made = affine.nearest(weight, grid)
    found = affine.dequantize(made)
    assert bool((found[weight == 0] == 0).all())
    h = affine.per_column(made.scales.float(), grid, weight.shape[1])
    # fp16 moves the ends of the grid by a share of 2⁻¹¹ (and scales below 6e-5 by more), the zero point by half a step
    ends = (1.0 if not grid.symmetric else 0.5) * h + (grid.top * h * 2.0**-11).clamp_min(2.0**-24 * grid.top)
    assert bool(((found - weight).abs() <= ends).all())


@few
@given(
    weight=dead_columns(weights()), grid=GRIDS, dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
)
def test_every_code_is_recovered_from_the_stored_weight(weight: Tensor, grid: Grid, dtype: torch.dtype) -> None:
    made = affine.survive_dtype(affine.nearest(weight, grid), dtype)
    assert torch.equal(recovered(affine.dequantize(made).to(dtype), made), made.codes.double())


def recovered(stored: Tensor, made: affine.Quantized) -> Tensor:
    """The codes of stored weights by the formula, in fp64."""
    h, z = (affine.per_column(each.double(), made.grid, stored.shape[1]) for each in (made.scales, made.zeros))
    return ((stored.double() / h).round() + z).clamp(0, made.grid.top)


@pytest.mark.parametrize("zero", [0, 90, 255])
def test_every_code_of_every_scale_is_recovered_in_bf16(zero: int) -> None:
    grid = Grid(bits=8, group_size=None, symmetric=False)
    scales = (1.0 + torch.arange(1024) / 1024).half()[:, None]  # every fp16 number from 1 to 2; other powers are alike
    codes = torch.arange(256, dtype=torch.uint8).expand(1024, -1).contiguous()
    zeros = torch.full((1024, 1), zero, dtype=torch.uint8)
    every = affine.Quantized(codes=codes, scales=scales, zeros=zeros, grid=grid)
    lost = recovered(affine.dequantize(every).to(torch.bfloat16), every) != codes
    beyond = (codes.int() - zero).abs() > 128
    assert bool(lost[beyond].any())
    assert not bool(lost[~beyond].any())
    made = affine.survive_dtype(every, torch.bfloat16)
    assert torch.equal(recovered(affine.dequantize(made).to(torch.bfloat16), made), made.codes.double())
    assert torch.equal(made.codes[~lost], codes[~lost])
    assert int((made.codes.int() - codes.int()).abs().max()) <= 2
    assert affine.survive_dtype(every, torch.float16) is every


@few
@given(weight=dead_columns(weights()), grid=GRIDS)
def test_what_is_stored_is_read_again(weight: Tensor, grid: Grid) -> None:
    made = affine.nearest(weight, grid)
    kept = affine.to_tensors(made, "up_proj")
    assert set(kept) == {"up_proj.codes", "up_proj.scales"} | (set() if grid.symmetric else {"up_proj.zeros"})
    again = affine.from_tensors(kept, "up_proj", grid)
    assert torch.equal(again.zeros, made.zeros)
    assert torch.equal(affine.dequantize(again), affine.dequantize(made))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_symmetric_codes_of_four_bits_are_those_of_gguf(group_size: int) -> None:
    from gguf import GGMLQuantizationType, quants

    weight = torch.randn(6, 192, generator=torch.Generator().manual_seed(0))
    made = affine.nearest(weight, Grid(bits=4, group_size=group_size, symmetric=True))
    scales = affine.per_column(made.scales, made.grid, 192)[:, ::32].reshape(-1, 1).numpy()
    codes = made.codes.reshape(-1, 32).numpy()
    packed = np.concatenate([scales.view(np.uint8), codes[:, :16] | codes[:, 16:] << 4], axis=1)
    unpacked = quants.dequantize(packed.reshape(6, -1), GGMLQuantizationType.Q4_0)
    assert np.array_equal(unpacked, affine.dequantize(made).numpy())


@few
@given(weight=weights(), grid=GRIDS, seed=st.integers(0, 9))
def test_what_is_pruned_has_the_zero_point_as_its_code(weight: Tensor, grid: Grid, seed: int) -> None:
    made = affine.nearest(weight, grid)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    found = affine.dequantize(affine.pruned(made, keep))
    assert torch.equal(found, torch.where(keep, affine.dequantize(made), 0.0))


def test_bits_of_a_packed_linear() -> None:
    dense = Grid(bits=4, group_size=128, symmetric=True)
    assert affine.bits_needed(2, 256, 512, dense) == 4 * 512 + 2 * 2 * 16  # 4.125 a weight
    assert affine.bits_needed(2, 256, 256, dense) == 4 * 256 + 512 + 2 * 2 * 16  # 3.125
    assert affine.bits_needed(2, 200, 400, dense) == 4 * 400 + 2 * 2 * 16  # a shorter last group has a scale, too
    assert affine.bits_needed(3, 8, 24, Grid(bits=2, group_size=None, symmetric=False)) == 2 * 24 + 3 * (16 + 2)


def test_weights_beyond_fp16_are_refused_and_tiny_ones_kept_finite() -> None:
    grid = Grid(bits=2, group_size=None, symmetric=True)
    with pytest.raises(BesaError, match=r"as large as 1e\+06 need a scale beyond fp16"):
        affine.nearest(torch.tensor([[1e6, 1.0]]), grid)
    tiny = affine.nearest(torch.tensor([[1e-12, -3e-12]]), grid)
    assert tiny.scales.item() == 2.0**-24
    assert tiny.codes.tolist() == [[2, 2]]


@pytest.mark.parametrize(
    ("bits", "group", "says"),
    [
        (5, "128", "--bits 5 is not one of 2, 3, 4, 8"),
        (4, "0", "--group-size '0' is neither channel nor a number"),
        (4, "row", "--group-size 'row' is neither channel nor a number"),
        (4, "-1", "--group-size '-1' is neither channel nor a number"),
    ],
)
def test_grids_that_there_are_not(bits: int, group: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        affine.grid(bits, group, symmetric=True)
    assert affine.grid(4, "channel", symmetric=False).groups(99) == 1
