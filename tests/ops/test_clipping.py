"""Learned clipping against the same formula with torch's own gradients."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import fewer, weights
from torch import Tensor

from besa_cli.ops import affine, clipping
from besa_cli.ops.affine import Grid
from besa_cli.ops.clipping import Clipped

GRIDS = st.builds(
    Grid, bits=st.sampled_from(affine.BITS), group_size=st.none() | st.integers(1, 6), symmetric=st.booleans()
)


def through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value`."""
    return value + (rounded - value).detach()


def plain(weight: Tensor, logits: Tensor, grid: Grid) -> Tensor:
    """One group at a time, every rounding straight-through."""
    size = grid.group_size or weight.shape[1]
    rows = []
    for row in range(weight.shape[0]):
        parts = []
        for group in range(logits.shape[1]):
            w = weight[row, group * size : (group + 1) * size]
            low, high = w.min().clamp_max(0), w.max().clamp_min(0)
            if grid.symmetric:
                high = torch.maximum(high, -low)
                low = -high
            ends = logits[row, group].sigmoid()
            low, high = ends[0] * low, ends[-1] * high
            step = (high - low) / grid.top
            h = through(step, step.detach().half().float().clamp_min(2.0**-24))
            if float(step.detach()) == 0:
                parts.append(w * 0 * ends.sum())
                continue
            z = torch.tensor(float(grid.middle))
            if not grid.symmetric:
                z = through(-low / h, (-low / h).detach().round().clamp(0, grid.top))
            q = (through(w / h, (w / h).detach().round()) + z).clamp(0, grid.top)
            parts.append((q - z) * h)
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@fewer
@given(weight=weights(), grid=GRIDS, seed=st.integers(0, 99))
def test_values_and_gradients_are_those_of_the_formula(weight: Tensor, grid: Grid, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    clipped = Clipped(weight, grid)
    start = clipping.widest(weight, grid)
    logits = torch.randn(start.shape, generator=generator)
    direction = torch.randn(weight.shape, generator=generator)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found, expected = clipped.weights(mine), plain(weight, theirs, grid)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)


@fewer
@given(weight=weights(), grid=GRIDS, seed=st.integers(0, 99))
def test_what_was_learned_with_is_what_is_stored(weight: Tensor, grid: Grid, seed: int) -> None:
    clipped = Clipped(weight, grid)
    logits = 2 * torch.randn(clipping.widest(weight, grid).shape, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(clipped.weights(logits), affine.dequantize(clipped.quantized(logits)))
    assert bool((clipped.weights(logits)[weight == 0] == 0).all())


def test_a_grid_that_is_hardly_clipped_is_that_of_the_nearest() -> None:
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(2))
    clipped = Clipped(weight, Grid(bits=4, group_size=4, symmetric=False))
    far = torch.full_like(clipping.widest(weight, clipped.grid), 40.0)
    assert torch.equal(clipped.weights(far), affine.dequantize(affine.nearest(weight, clipped.grid)))


@fewer
@given(weight=weights(), grid=GRIDS, seed=st.integers(0, 99))
def test_where_the_search_ends_nothing_that_it_tried_is_better(weight: Tensor, grid: Grid, seed: int) -> None:
    sums = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed))
    shape, size = clipping.widest(weight, grid).shape, grid.group_size or weight.shape[1]

    def errors(logits: Tensor) -> Tensor:
        off = (plain(weight, logits, grid) - weight).double().square() * sums
        return torch.stack([part.sum(1) for part in off.split(size, dim=1)], dim=1)

    found = Clipped(weight, grid).searched(sums)
    assert found.shape == shape
    tried = [errors(torch.full(shape, 4 - step / 4)) for step in range(24)]
    torch.testing.assert_close(errors(found), torch.stack(tried).amin(0), rtol=1e-4, atol=1e-9)


def test_the_search_gives_up_an_outlier_whose_input_is_small() -> None:
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(2))
    weight[:, 7] = 40.0
    sums = torch.ones(20)
    grid = Grid(bits=4, group_size=None, symmetric=True)
    heavy = Clipped(weight, grid).searched(sums).sigmoid()
    sums[7] = 0.0
    light = Clipped(weight, grid).searched(sums).sigmoid()
    assert bool((light < 0.2).all())
    assert bool((light < heavy).all())
