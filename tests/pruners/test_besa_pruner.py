"""BESA on a toy block: the exact budget, better than even, the same again."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from strategies import fewer

from besa_cli.pruners import besa, wanda
from besa_cli.stream import Pruned

GRANULARITIES: list[besa.Granularity] = ["row", "layer"]
LOSSES: list[besa.Loss] = ["token", "channel", "frobenius"]


def same(first: Pruned, second: Pruned) -> bool:
    masks = all(torch.equal(first.masks[name], second.masks[name]) for name in first.masks)
    return masks and (first.error_before, first.learned_loss, first.kept_uniform) == (
        second.error_before,
        second.learned_loss,
        second.kept_uniform,
    )


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("sparsity", ["0", "0.0024", "0.01", "0.1", "0.37", "0.5", "0.75", "0.9", "0.99", "0.9976", "1"])
def test_the_budget_is_met_to_the_weight(sparsity: str, granularity: besa.Granularity) -> None:
    weights = toy.source()
    budget = round(Fraction(sparsity) * toy.size(weights))
    result = besa.prune(toy.block(weights, budget), besa.Options(granularity=granularity))
    assert toy.pruned(result.masks) == budget
    assert {name: mask.shape for name, mask in result.masks.items()} == {name: w.shape for name, w in weights.items()}
    assert all(mask.dtype == torch.bool for mask in result.masks.values())
    assert not result.weights  # surviving weights keep the source's bits


@fewer
@given(
    st.data(),
    st.sampled_from(GRANULARITIES),
    st.sampled_from([0.0, 0.3, 0.8]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_the_budget_is_met_in_every_dtype_with_zeros_there_already(
    data: st.DataObject, granularity: besa.Granularity, zeros: float, dtype: torch.dtype
) -> None:
    hidden, inner = data.draw(st.integers(1, 7), label="hidden"), data.draw(st.integers(1, 9), label="inner")
    weights = toy.source(hidden=hidden, inner=inner, dtype=dtype, zeros=zeros)
    budget = data.draw(st.integers(0, toy.size(weights)), label="budget")
    made = toy.block(weights, budget, samples=4)
    result = besa.prune(made, besa.Options(granularity=granularity, candidates=10))
    zero = {name: weight == 0 for name, weight in weights.items()}
    assert toy.pruned(result.masks) == max(budget, sum(int(z.sum()) for z in zero.values()))
    assert not any(bool((mask & zero[name]).any()) for name, mask in result.masks.items())
    assert all(weight.dtype == dtype for weight in made.weights.values())


def test_sparsity_zero_learns_nothing() -> None:
    made = toy.block(toy.source(), 0)
    result = besa.prune(made, besa.Options())
    assert all(bool(mask.all()) for mask in result.masks.values())
    assert (result.learned_loss, result.error_before, result.kept_uniform) == (None, None, False)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_layer_gives_the_rows_of_a_linear_one_sparsity_and_row_does_not(sparsity: float) -> None:
    weights = toy.source()
    budget = round(sparsity * toy.size(weights))
    shared = besa.prune(toy.block(weights, budget), besa.Options(granularity="layer", lr=0.5))
    spreads = {name: (~mask).sum(1).max() - (~mask).sum(1).min() for name, mask in shared.masks.items()}
    assert all(int(spread) <= 1 for spread in spreads.values())
    own = besa.prune(toy.block(weights, budget), besa.Options(granularity="row", lr=0.5))
    assert not own.kept_uniform
    assert max(int((~mask).sum(1).max() - (~mask).sum(1).min()) for mask in own.masks.values()) > 1


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_linears_of_unequal_worth_get_unequal_sparsities(granularity: besa.Granularity) -> None:
    weights = toy.source()
    weights["gate"] *= 1e-3  # the gate is then nearly the same for every input: silu(x) ~ x / 2, tiny, and all that counts
    weights["down"][:, :7] = 1e-6 * weights["down"][:, :7]  # and the first half of the inner channels leads nowhere
    budget = round(0.5 * toy.size(weights))
    result = besa.prune(toy.block(weights, budget, samples=16), besa.Options(granularity=granularity, lr=0.5, epochs=2))
    assert not result.kept_uniform
    if granularity == "row":
        counts = (~result.masks["up"]).sum(1)
        assert float(counts[:7].float().mean()) > float(counts[7:].float().mean()) + 1


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_was_learned_beats_uniform_or_uniform_is_kept(granularity: besa.Granularity, loss: besa.Loss) -> None:
    weights = toy.source()
    outcomes = set()
    for lr in (0.0, 0.5):
        made = toy.block(weights, toy.size(weights) // 2)
        result = besa.prune(made, besa.Options(granularity=granularity, loss=loss, lr=lr))
        uniform = wanda.prune(toy.block(weights, toy.size(weights) // 2), wanda.Options()).masks
        assert result.error_before == pytest.approx(toy.token_error(made, uniform), rel=1e-4)
        assert result.learned_loss is not None
        if result.kept_uniform:
            assert all(torch.equal(mask, uniform[name]) for name, mask in result.masks.items())
        elif loss == "token":
            assert toy.token_error(made, result.masks) < result.error_before
        outcomes.add(result.kept_uniform)
    assert outcomes == {True, False}  # no learning: no better than uniform; learning: better


def test_learning_lowers_the_error_of_the_toy_block_by_a_third() -> None:
    weights = toy.source()
    made = toy.block(weights, toy.size(weights) // 2, samples=32)
    result = besa.prune(made, besa.Options(lr=0.5, epochs=3))
    assert result.error_before is not None
    assert toy.token_error(made, result.masks) < 0.67 * result.error_before


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator_alone(granularity: besa.Granularity) -> None:
    weights = toy.source()
    options = besa.Options(granularity=granularity, lr=0.5)
    results, states = [], []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        made = toy.block(weights, toy.size(weights) // 2, seed=seed)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        results.append(besa.prune(made, options))
        states.append(torch.equal(before, torch.get_rng_state()))
    assert all(states)
    assert same(results[0], results[1])
    assert results[0].learned_loss != results[2].learned_loss  # another order of the samples


def test_the_blocks_own_weights_and_inputs_are_left_as_they_were() -> None:
    weights = toy.source()
    made = toy.block(weights, toy.size(weights) // 2)
    inputs = made.inputs.clone()
    besa.prune(made, besa.Options())
    assert torch.equal(made.inputs, inputs)
    for name, linear in made.linears.items():
        assert torch.equal(linear.weight, weights[name])
        assert torch.equal(made.weights[name], weights[name])
        assert linear.weight.grad is None


def test_steps_are_told_as_they_are_made() -> None:
    weights = toy.source()
    made = toy.block(weights, toy.size(weights) // 2, samples=7)
    told: list[tuple[int, int, str]] = []
    made.on_step = lambda done, total, phase: told.append((done, total, phase))
    besa.prune(made, besa.Options(epochs=2, batch_size=3))
    learning = [(done, total) for done, total, phase in told if phase == "learning"]
    assert learning == [(step, 6) for step in range(1, 7)]


def test_the_target_given_is_what_is_reproduced() -> None:
    weights = toy.source()
    half = toy.size(weights) // 2
    wanted = toy.block(weights, half).target + 0.5
    towards = besa.prune(toy.block(weights, half, target=wanted), besa.Options())
    own = besa.prune(toy.block(weights, half), besa.Options())
    uniform = wanda.prune(toy.block(weights, half), wanda.Options()).masks
    assert towards.error_before == pytest.approx(toy.token_error(toy.block(weights, half, target=wanted), uniform), rel=1e-4)
    assert towards.error_before != pytest.approx(own.error_before, rel=1e-2)


def test_a_heavier_penalty_keeps_the_learned_sparsity_nearer_to_the_goal() -> None:
    """Seen from outside: without a penalty the projection has to move far, so the masks differ; with it the goal is kept."""
    weights = toy.source()
    made = toy.block(weights, toy.size(weights) // 5, samples=16)
    expected: dict[float, list[float]] = {}
    for penalty in (0.0, 50.0):
        noted: list[float] = []
        original = besa.losses.sparsity_penalty

        def spy(sparsity: torch.Tensor, goal: float, noted: list[float] = noted) -> torch.Tensor:
            noted.append(abs(float(sparsity.detach()) - goal))
            return original(sparsity, goal)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(besa.losses, "sparsity_penalty", spy)
            besa.prune(made, besa.Options(penalty=penalty, lr=0.5, epochs=2))
        expected[penalty] = noted
    assert expected[0.0][0] == pytest.approx(0.0, abs=1e-5)  # both start at the goal
    assert expected[50.0][0] == pytest.approx(0.0, abs=1e-5)
    assert expected[50.0][-1] < 0.25 * expected[0.0][-1]


def test_rising_sparsity_never_lowers_the_error_of_the_uniform_start() -> None:
    weights = toy.source()
    results = [
        besa.prune(toy.block(weights, round(share * toy.size(weights))), besa.Options()) for share in (0.2, 0.5, 0.8)
    ]
    errors = [result.error_before for result in results if result.error_before is not None]
    assert len(errors) == 3
    assert all(low < high for low, high in pairwise(errors))
