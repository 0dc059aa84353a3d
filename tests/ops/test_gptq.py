"""GPTQ against the surgeon's formula with explicit inverses in float64."""

import pytest
import torch
from ops.test_obs import problem
from support import oracles
from torch import Tensor

from besa_cli.ops import affine, gptq, obs
from besa_cli.ops.affine import Grid, Quantized

DAMPING = 0.01


def laid(kept: Tensor, costs: Tensor, grid: Grid, search: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points of one group, a row after the other; searched among sigmoid(4), sigmoid(3.75), …"""
    if not search:
        made = affine.nearest(kept.float(), grid)
        return made.scales.double()[:, 0], made.zeros.double()[:, 0]
    scales, zeros = [], []
    for row in kept.float():
        tried = []
        for place in range(24):
            strength = torch.sigmoid(torch.tensor(4.0 - place / 4))
            low, high = strength * row.min().clamp_max(0), strength * row.max().clamp_min(0)
            if grid.symmetric:
                high = torch.maximum(-low, high)
                low = -high
            h = ((high - low) / grid.top).half().float().clamp_min(2.0**-24)
            z = torch.tensor(float(grid.middle)) if grid.symmetric else (-low / h).round().clamp(0, grid.top)
            nearest = (((row / h).round() + z).clamp(0, grid.top) - z) * h
            tried.append((float(((nearest - row).double().square() * costs).sum()), place, h, z))
        _, _, h, z = min(tried, key=lambda each: each[:2])
        scales.append(h.double())
        zeros.append(z.double())
    return torch.stack(scales), torch.stack(zeros)


def surgeon(weight: Tensor, gram: Tensor, keep: Tensor, grid: Grid, search: bool = False) -> Tensor:
    """Codes from left to right; the columns to come take the least-squares correction for each error."""
    inverse_of = oracles.damped(gram, DAMPING)
    updated, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.long)
    group = grid.width(weight.shape[1])
    for col in range(weight.shape[1]):
        if col % group == 0:
            members = slice(col, col + group)
            inverses = [torch.linalg.inv(inverse_of[place:, place:])[0, 0] for place in range(weight.shape[1])[members]]
            lonely = Grid(bits=grid.bits, group_size=None, symmetric=grid.symmetric)
            h, z = laid((updated * keep)[:, members], 1 / torch.stack(inverses), lonely, search)
        wished = updated[:, col] * keep[:, col]
        code = ((wished / h).round() + z).clamp(0, grid.top)
        error = updated[:, col] - (code - z) * h
        inverse = torch.linalg.inv(inverse_of[col:, col:])
        updated[:, col:] -= error.unsqueeze(1) * inverse[0] / inverse[0, 0]
        codes[:, col] = code.long()
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 4, 5])
@pytest.mark.parametrize("width", [2, 4, 128])
@pytest.mark.parametrize("search", [True, False])
def test_codes_are_the_surgeons(search: bool, symmetric: bool, group_size: int | None, width: int) -> None:
    weight, gram = problem(4, 11)
    grid = Grid(bits=3, group_size=group_size, symmetric=symmetric)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.7
    found = gptq.quantize(weight * keep, keep, obs.inverse_factor(gram, DAMPING), grid, search=search, width=width)
    expected = surgeon(weight * keep, gram, keep, grid, search)
    assert torch.equal(found.codes.long(), expected)
    assert bool((affine.dequantize(found)[~keep] == 0).all())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("group_size", [64, None])
def test_a_searched_grid_is_better_than_one_between_the_extremes(
    group_size: int | None, sparse: bool, seed: int
) -> None:
    weight, gram = problem(32, 192, seed=seed, tokens=600)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < (0.5 if sparse else 2.0)
    factor, grid = obs.inverse_factor(gram, DAMPING), Grid(bits=3, group_size=group_size, symmetric=True)

    def error(search: bool) -> float:
        found = affine.dequantize(gptq.quantize(weight * keep, keep, factor, grid, search=search))
        difference = (found - weight * keep).double()
        return float((difference @ oracles.damped(gram, DAMPING) * difference).sum())

    assert error(True) < 0.9 * error(False)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sparse", [False, True])
def test_the_output_is_nearer_than_with_the_nearest_codes(seed: int, sparse: bool) -> None:
    weight, gram = problem(8, 24, seed=seed, tokens=200)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < (0.5 if sparse else 2.0)
    grid = Grid(bits=3, group_size=8, symmetric=True)

    def error(quantized: Quantized) -> float:
        difference = (affine.dequantize(quantized) - weight * keep).double()
        return float((difference @ oracles.damped(gram, DAMPING) * difference).sum())

    found = gptq.quantize(weight * keep, keep, obs.inverse_factor(gram, DAMPING), grid)
    assert error(found) < 0.7 * error(affine.nearest(weight * keep, grid))
