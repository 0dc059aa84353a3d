"""BESA on a toy block: the exact budget, better than even, the same again."""

from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import toy_block
from support.strategies import fewer
from torch import Tensor

from besa_cli.choices import Importance, Loss, Optimizer
from besa_cli.errors import UsageError
from besa_cli.ops import losses
from besa_cli.pruners import besa, wanda
from besa_cli.pruners.besa import learning
from besa_cli.pruners.besa.options import authors
from besa_cli.pruners.besa.window import RankedWindow
from besa_cli.stream.block import Block, Decision

GRANULARITIES = ["row", "layer", "3"]


def same(first: Decision, second: Decision) -> bool:
    masks = all(torch.equal(first.masks[name], second.masks[name]) for name in first.masks)
    return masks and (first.error_before, first.learned_loss, first.kept_uniform) == (
        second.error_before,
        second.learned_loss,
        second.kept_uniform,
    )


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("sparsity", ["0", "0.0024", "0.01", "0.1", "0.37", "0.5", "0.75", "0.9", "0.9976", "1"])
def test_the_budget_is_met_to_the_weight(sparsity: str, granularity: str) -> None:
    weights = toy_block.source()
    budget = round(Fraction(sparsity) * toy_block.size(weights))
    result = besa.prune(toy_block.block(weights, budget), besa.Options(granularity=granularity))
    assert toy_block.pruned(result.masks) == budget
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
    data: st.DataObject, granularity: str, zeros: float, dtype: torch.dtype
) -> None:
    hidden, inner = data.draw(st.integers(1, 7), label="hidden"), data.draw(st.integers(1, 9), label="inner")
    weights = toy_block.source(hidden=hidden, inner=inner, dtype=dtype, zeros=zeros)
    budget = data.draw(st.integers(0, toy_block.size(weights)), label="budget")
    made = toy_block.block(weights, budget, samples=4)
    result = besa.prune(made, besa.Options(granularity=granularity, candidates=10))
    zero = {name: weight == 0 for name, weight in weights.items()}
    assert toy_block.pruned(result.masks) == max(budget, sum(int(z.sum()) for z in zero.values()))
    assert not any(bool((mask & zero[name]).any()) for name, mask in result.masks.items())
    assert all(weight.dtype == dtype for weight in made.weights.values())


def test_sparsity_zero_learns_nothing() -> None:
    made = toy_block.block(toy_block.source(), 0)
    result = besa.prune(made, besa.Options())
    assert all(bool(mask.all()) for mask in result.masks.values())
    assert (result.learned_loss, result.error_before, result.kept_uniform) == (None, None, False)


def learner(made_for: str = "row", **changed: Any) -> besa.Options:
    return besa.Options(**{"granularity": made_for, "epochs": 8, "batch_size": 4, **changed})


def large(share: float = 0.5) -> Block:
    """A block on which there is something to learn."""
    weights = toy_block.source(hidden=16, inner=24)
    return toy_block.block(weights, round(share * toy_block.size(weights)), samples=16)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_layer_gives_the_rows_of_a_linear_one_sparsity_and_row_does_not(sparsity: float) -> None:
    shared = besa.prune(large(sparsity), learner("layer"))
    assert not shared.kept_uniform
    counts = {name: (~mask).sum(1) for name, mask in shared.masks.items()}
    assert all(int(count.max() - count.min()) <= 1 for count in counts.values())
    assert len({round(float((~mask).float().mean()), 2) for mask in shared.masks.values()}) > 1
    own = besa.prune(large(sparsity), learner("row"))
    assert not own.kept_uniform
    assert max(int((~mask).sum(1).max() - (~mask).sum(1).min()) for mask in own.masks.values()) > 1


@pytest.mark.parametrize(("loss", "over"), [("token", (-1,)), ("channel", (0,)), ("frobenius", (0, 1))])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_was_learned_beats_the_uniform_masks(granularity: str, loss: Loss, over: tuple[int, ...]) -> None:
    made = large()
    uniform = wanda.prune(large(), wanda.Options()).masks
    result = besa.prune(made, learner(granularity, loss=loss))
    assert not result.kept_uniform
    assert toy_block.error(made, result.masks, over) < 0.95 * toy_block.error(made, uniform, over)
    assert result.error_before == pytest.approx(toy_block.error(made, uniform), rel=1e-4)  # by token in any case


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_loss_by_sensitivity_is_what_is_compared_and_reported(granularity: str) -> None:
    weights, sensitivity = toy_block.source(hidden=16, inner=24), torch.linspace(0.1, 1, 16)
    uniform = wanda.prune(large(), wanda.Options()).masks

    def error(masks: Mapping[str, Tensor]) -> float:
        outputs = torch.stack(toy_block.outputs(made, masks))
        return float(losses.token(outputs, made.target, channels=losses.channel_weights(sensitivity)))

    made = toy_block.block(weights, toy_block.size(weights) // 2, samples=16, sensitivity=sensitivity)
    result = besa.prune(made, learner(granularity))
    assert result.error_before == pytest.approx(error(uniform), rel=1e-4)
    assert result.error_after == pytest.approx(error(result.masks), rel=1e-4)
    assert not result.kept_uniform
    assert error(result.masks) < error(uniform)
    alike = toy_block.block(weights, made.budget, samples=16, sensitivity=torch.full((16,), 2.0**-40))
    masks = besa.prune(alike, learner(granularity)).masks
    by_token = besa.prune(large(), learner(granularity, loss="token")).masks
    assert all(torch.equal(masks[name], mask) for name, mask in by_token.items())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("lr", [0.0, 30.0])  # no learning, and learning that runs away
def test_the_uniform_masks_are_kept_where_learning_did_not_help(granularity: str, lr: float) -> None:
    made = large()
    uniform = wanda.prune(large(), wanda.Options()).masks
    result = besa.prune(made, learner(granularity, lr=lr))
    if lr == 0:
        assert result.kept_uniform
    if result.kept_uniform:
        assert all(torch.equal(mask, uniform[name]) for name, mask in result.masks.items())
    assert toy_block.error(made, result.masks) <= toy_block.error(made, uniform)
    assert toy_block.pruned(result.masks) == made.budget


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator_alone(granularity: str) -> None:
    weights = toy_block.source()
    options = besa.Options(granularity=granularity, lr=0.5)
    results, states = [], []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        made = toy_block.block(weights, toy_block.size(weights) // 2, seed=seed)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        results.append(besa.prune(made, options))
        states.append(torch.equal(before, torch.get_rng_state()))
    assert all(states)
    assert same(results[0], results[1])
    assert results[0].learned_loss != results[2].learned_loss  # another order of the samples


def test_the_blocks_own_weights_and_inputs_are_left_as_they_were() -> None:
    weights = toy_block.source()
    made = toy_block.block(weights, toy_block.size(weights) // 2)
    inputs = made.inputs.clone()
    besa.prune(made, besa.Options())
    assert torch.equal(made.inputs, inputs)
    for name, linear in made.linears.items():
        assert torch.equal(linear.weight, weights[name])
        assert torch.equal(made.weights[name], weights[name])
        assert linear.weight.grad is None


def test_steps_are_told_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = toy_block.source()
    made = toy_block.block(weights, toy_block.size(weights) // 2, samples=7)
    told: list[tuple[int, int, str]] = []
    monkeypatch.setattr(made, "on_step", lambda done, total, phase: told.append((done, total, phase)))
    besa.prune(made, besa.Options(epochs=2, batch_size=3))
    learning = [(done, total) for done, total, phase in told if phase == "learning"]
    assert learning == [(step, 6) for step in range(1, 7)]


def test_the_target_given_is_what_is_reproduced() -> None:
    weights = toy_block.source()
    half = toy_block.size(weights) // 2
    wanted = toy_block.block(weights, half).target + 0.5
    towards = besa.prune(toy_block.block(weights, half, target=wanted), besa.Options())
    own = besa.prune(toy_block.block(weights, half), besa.Options())
    uniform = wanda.prune(toy_block.block(weights, half), wanda.Options()).masks
    assert towards.error_before == pytest.approx(
        toy_block.error(toy_block.block(weights, half, target=wanted), uniform), rel=1e-4
    )
    assert towards.error_before != pytest.approx(own.error_before, rel=1e-2)


def sparsities_while_learning(options: besa.Options) -> list[float]:
    """How far the expected sparsity is from the goal, in each step."""
    weights = toy_block.source()
    made = toy_block.block(weights, toy_block.size(weights) // 5, samples=16)
    noted: list[float] = []
    original = learning._soft_weights

    def spy(window: RankedWindow, *others: Any) -> Any:
        found, mixture = original(window, *others)
        assert mixture is not None
        pruned = (mixture.detach().double() @ window.candidates.double() * window.sizes).sum()
        noted.append(abs(float(pruned / window.sizes.sum()) - window.budget_share))
        return found, mixture

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "_soft_weights", spy)
        besa.prune(made, options)
    return noted


def test_a_heavier_penalty_keeps_the_learned_sparsity_nearer_to_the_goal() -> None:
    free, heavy = (sparsities_while_learning(besa.Options(penalty=each, lr=0.5, epochs=2)) for each in (0.0, 50.0))
    assert free[0] == pytest.approx(0.0, abs=1e-5)  # both start at the goal
    assert heavy[0] == pytest.approx(0.0, abs=1e-5)
    assert heavy[-1] < 0.25 * free[-1]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_without_a_penalty_every_step_keeps_to_the_budget(granularity: str) -> None:
    free = sparsities_while_learning(besa.Options(granularity=granularity, penalty=0.0, epochs=2))
    held = sparsities_while_learning(besa.Options(granularity=granularity, epochs=2))
    assert len(held) == len(free) == 32
    assert max(held) < 1e-3 < 0.05 * max(free)


def test_rising_sparsity_never_lowers_the_error_of_the_uniform_start() -> None:
    weights = toy_block.source()
    results = [
        besa.prune(toy_block.block(weights, round(share * toy_block.size(weights))), besa.Options())
        for share in (0.2, 0.5, 0.8)
    ]
    errors = [result.error_before for result in results if result.error_before is not None]
    assert len(errors) == 3
    assert all(low < high for low, high in pairwise(errors))


@pytest.mark.parametrize(
    ("importance", "optimizer"),
    [("wanda", "adamw"), ("magnitude", "adamw"), ("sparsegpt", "adamw"), ("wanda", "prodigy")],
)
def test_every_importance_and_optimizer_learns_and_meets_the_budget(
    importance: Importance, optimizer: Optimizer
) -> None:
    made = large()
    settings: dict[str, Any] = {"lr": None, "epochs": 10} if optimizer == "prodigy" else {}
    result = besa.prune(made, learner(importance=importance, optimizer=optimizer, **settings))
    assert toy_block.pruned(result.masks) == made.budget
    assert not result.kept_uniform
    assert toy_block.error(made, result.masks) == pytest.approx(result.error_after, rel=1e-4)
    for name, inputs in toy_block.linear_inputs(
        made
    ).items():  # within each row the weights that go have the lowest scores
        weight, inputs = made.weights[name].double(), inputs.double()
        products = inputs.T @ inputs
        damped = products + 0.01 * products.diagonal().mean() * torch.eye(len(products))
        scores = {
            "magnitude": weight.abs(),
            "wanda": weight.abs() * inputs.norm(dim=0),
            "sparsegpt": weight.square() / torch.linalg.inv(damped).diagonal(),
        }[importance]
        mask = result.masks[name]
        gone, kept = scores.masked_fill(mask, 0.0), scores.masked_fill(~mask, float("inf"))
        assert bool((gone.max(1).values <= kept.min(1).values * (1 + 1e-5)).all()), name


def test_groups_of_rows_share_their_count() -> None:
    made = large()
    masks = besa.prune(made, learner("4")).masks
    for name, mask in masks.items():
        counts = (~mask).sum(1).tolist()
        for start in range(0, len(counts), 4):
            group = counts[start : start + 4]
            assert max(group) - min(group) <= 1, name
    whole = {name: (~mask).sum(1) for name, mask in masks.items()}
    assert any(int(counts.max() - counts.min()) > 1 for counts in whole.values())


@pytest.mark.parametrize("sparsity", [0.4, 0.5, 0.6])
def test_the_authors_preset_prunes_the_floor_of_what_it_learned_and_nothing_else(sparsity: float) -> None:
    made = large(sparsity)
    result = besa.prune(made, besa.BesaOptions(**authors(), preset="authors", epochs=8))
    assert not result.exact
    assert not result.kept_uniform
    assert result.error_before is None
    for mask in result.masks.values():
        shares = (~mask).sum(1) / mask.shape[1]
        assert bool((shares <= 0.624).all())  # what softmax(sigmoid(θ)) can reach
        assert bool((shares >= 0.376 - 1 / mask.shape[1]).all())
    size = sum(mask.numel() for mask in result.masks.values())
    assert toy_block.pruned(result.masks) / size == pytest.approx(sparsity, abs=0.08)


@pytest.mark.parametrize("granularity", ["0", "-1", "2.5", "rows", ""])
def test_a_granularity_that_is_none_is_refused(granularity: str) -> None:
    with pytest.raises(UsageError, match="neither row nor layer nor a number"):
        besa.Options(granularity=granularity)
