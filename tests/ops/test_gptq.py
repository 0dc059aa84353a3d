"""GPTQ against the surgeon's formula with explicit inverses in float64."""

import oracles
import pytest
import torch
from ops.test_obs import problem
from torch import Tensor

from besa_cli.ops import affine, gptq, obs
from besa_cli.ops.affine import Grid, Quantized

DAMPING = 0.01


def surgeon(weight: Tensor, gram: Tensor, keep: Tensor, grid: Grid) -> Tensor:
    """Codes from left to right; the columns to come take the least-squares correction for each error."""
    inverse_of = oracles.damped(gram, DAMPING)
    updated, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.long)
    group = grid.width(weight.shape[1])
    for col in range(weight.shape[1]):
        if col % group == 0:
            members = slice(col, col + group)
            made = affine.nearest((updated * keep)[:, members].float(), Grid(**{**vars(grid), "group_size": None}))
            h, z = made.scales.double()[:, 0], made.zeros.double()[:, 0]
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
def test_codes_are_the_surgeons(symmetric: bool, group_size: int | None, width: int) -> None:
    weight, gram = problem(4, 11)
    grid = Grid(bits=3, group_size=group_size, symmetric=symmetric)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.7
    found = gptq.quantize(weight * keep, keep, obs.inverse_factor(gram, DAMPING), grid, width=width)
    expected = surgeon(weight * keep, gram, keep, grid)
    assert torch.equal(found.codes.long(), expected)
    assert bool((affine.dequantize(found)[~keep] == 0).all())


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
