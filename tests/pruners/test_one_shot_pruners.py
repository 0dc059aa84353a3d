"""Magnitude, Wanda and SparseGPT on a toy block, each against its own loop."""

from fractions import Fraction
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracles, toy_block
from support.strategies import fewer
from torch import Tensor

from besa_cli.ops import importance
from besa_cli.pruners import magnitude, sparsegpt, wanda
from besa_cli.stream.block import Block, Decision

METHODS = [magnitude, wanda, sparsegpt]


def marked(scores: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight == 0, -torch.ones_like(scores), scores)


def split(made: Block) -> dict[str, int]:
    """The budget over the linears in proportion to their size, by exact fractions."""
    sizes = [weight.numel() for weight in made.weights.values()]
    zeros = [int((weight == 0).sum()) for weight in made.weights.values()]
    shares = [Fraction(made.budget * size, sum(sizes)) for size in sizes]
    return dict(zip(made.weights, oracles.rounded(shares, made.budget, zeros, sizes, [0] * len(sizes)), strict=True))


def run(method: ModuleType, made: Block, nm: tuple[int, int] | None = None) -> Decision:
    result: Decision = method.prune(made, method.Options(nm=nm))
    return result


@pytest.mark.parametrize("batch", [1, 3, 8, 100])
def test_statistics_are_summed_over_all_batches_and_shared_inputs_once(batch: int) -> None:
    made = toy_block.block(toy_block.source(), 0, batch=batch)
    inputs = toy_block.linear_inputs(made)
    squares, grams = made.observe(importance.squared_sums), made.observe(importance.gram)
    for name, x in inputs.items():
        assert torch.allclose(squares[name], x.square().sum(0), rtol=1e-4)
        assert torch.allclose(grams[name], x.T @ x, rtol=1e-4, atol=1e-4)
    assert squares["gate"] is squares["up"]


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.83, 1.0])
def test_magnitude_and_wanda_equal_the_loop(share: float, zeros: float) -> None:
    weights = toy_block.source(zeros=zeros)
    made = toy_block.block(weights, round(share * toy_block.size(weights)))
    norms = {name: x.norm(dim=0) for name, x in toy_block.linear_inputs(made).items()}
    counts = split(made)
    by_size, by_input = run(magnitude, made), run(wanda, made)
    for name, weight in weights.items():
        plain = oracles.row_wise(marked(weight.abs(), weight), counts[name])
        assert torch.equal(by_size.masks[name], plain)
        scaled = oracles.row_wise(marked(weight.abs() * norms[name], weight), counts[name])
        assert torch.equal(by_input.masks[name], scaled)
    assert not by_size.weights
    assert not by_input.weights


def test_wanda_sees_the_inputs_and_magnitude_does_not() -> None:
    weights = toy_block.source()
    made = toy_block.block(weights, toy_block.size(weights) // 2)
    assert not torch.equal(run(wanda, made).masks["up"], run(magnitude, made).masks["up"])


def test_magnitude_runs_no_pass_over_the_block() -> None:
    weights = toy_block.source()
    made = toy_block.block(weights, toy_block.size(weights) // 2)
    run(magnitude, made)
    assert made._window.calls == 0  # type: ignore[attr-defined]
    run(wanda, made)
    assert made._window.calls > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", METHODS)
@fewer
@given(st.data(), st.sampled_from([0.0, 0.3, 0.8]), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_every_method_meets_the_budget_to_the_weight(
    method: ModuleType, data: st.DataObject, zeros: float, dtype: torch.dtype
) -> None:
    hidden, inner = data.draw(st.integers(1, 7), label="hidden"), data.draw(st.integers(1, 9), label="inner")
    weights = toy_block.source(hidden=hidden, inner=inner, dtype=dtype, zeros=zeros)
    budget = data.draw(st.integers(0, toy_block.size(weights)), label="budget")
    result = run(method, toy_block.block(weights, budget, samples=4))
    zero = {name: weight == 0 for name, weight in weights.items()}
    assert toy_block.pruned(result.masks) == max(budget, sum(int(z.sum()) for z in zero.values()))
    assert not any(bool((mask & zero[name]).any()) for name, mask in result.masks.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("nm", [(1, 2), (2, 4), (3, 8), (4, 4)])
def test_every_method_keeps_n_of_m_whatever_the_budget(method: ModuleType, nm: tuple[int, int]) -> None:
    weights = toy_block.source()  # 10 and 14 columns: a ragged tail for windows of 4 and 8
    n, m = nm
    masks = run(method, toy_block.block(weights, 3), nm).masks
    for mask in masks.values():
        full = mask.shape[1] - mask.shape[1] % m
        for start in range(0, full, m):
            assert (~mask[:, start : start + m]).sum(1).tolist() == [n] * len(mask)
        assert bool(mask[:, full:].all())


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_sparsegpt_updates_on_the_gram_of_all_its_inputs(damping: float) -> None:
    weights = toy_block.source()
    made = toy_block.block(weights, toy_block.size(weights) // 2, samples=16)
    result = sparsegpt.prune(made, sparsegpt.Options(damping=damping))
    assert set(result.weights) == set(weights)
    for name, x in toy_block.linear_inputs(made).items():
        expected = oracles.surgeon(weights[name], x.T @ x, result.masks[name], damping)
        assert torch.allclose(result.weights[name].double(), expected, rtol=2e-3, atol=2e-3)
        assert int((~result.masks[name]).sum()) == split(made)[name]


def test_sparsegpt_reproduces_each_linear_better_than_the_same_mask_alone() -> None:
    weights = toy_block.source()
    made = toy_block.block(weights, toy_block.size(weights) // 2, samples=32)
    result = run(sparsegpt, made)
    for name, x in toy_block.linear_inputs(made).items():
        dense = x @ weights[name].T
        masked = x @ (weights[name] * result.masks[name]).T
        assert float((x @ result.weights[name].T - dense).norm()) < float((masked - dense).norm())
