"""Losses against loops, and what leaves them as they are."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.strategies import few
from torch import Tensor

from besa_cli.ops import losses

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: list[Loss] = [losses.token, losses.channel, losses.frobenius]


def relative(errors: list[tuple[float, float]]) -> float:
    return math.fsum((a - b) ** 2 for a, b in errors) / math.fsum(b**2 for _, b in errors)


def pairs(output: Tensor, target: Tensor) -> list[list[tuple[float, float]]]:
    """[token][channel] -> (output, target)."""
    hidden = target.shape[-1]
    flat = zip(output.reshape(-1, hidden).tolist(), target.reshape(-1, hidden).tolist(), strict=True)
    return [list(zip(token, wanted, strict=True)) for token, wanted in flat]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def by_loop(loss: Loss, output: Tensor, target: Tensor) -> float:
    tokens = pairs(output, target)
    if loss is losses.token:
        return mean([relative(token) for token in tokens])
    if loss is losses.channel:
        return mean([relative([token[channel] for token in tokens]) for channel in range(target.shape[-1])])
    return relative([pair for token in tokens for pair in token])


_numbers = st.floats(0.125, 8, width=32) | st.floats(-8, -0.125, width=32)


@st.composite
def outputs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    shape = draw(st.sampled_from([(1,), (5,), (3, 1), (1, 4), (2, 3, 5), (3, 2)]))
    arrays = hnp.arrays(np.float32, shape, elements=_numbers)
    return torch.from_numpy(draw(arrays)), torch.from_numpy(draw(arrays))


@pytest.mark.parametrize("loss", LOSSES)
@few
@given(outputs())
def test_losses_equal_the_loop(loss: Loss, pair: tuple[Tensor, Tensor]) -> None:
    output, target = pair
    assert float(loss(output, target)) == pytest.approx(by_loop(loss, output, target), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@few
@given(outputs(), st.sampled_from([-64.0, 0.001, 3.0, 1024.0]))
def test_losses_do_not_depend_on_the_scale_of_the_activations(
    loss: Loss, pair: tuple[Tensor, Tensor], factor: float
) -> None:
    output, target = pair
    assert float(loss(factor * output, factor * target)) == pytest.approx(
        float(loss(output, target)), rel=1e-4, abs=1e-9
    )


def rescaled(axis: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    output, target = torch.randn(2, 4, 3, 5, generator=generator)
    factors = torch.tensor([1e-3, 1.0, 50.0, 7.0, 0.3])
    return output, target, factors if axis == 2 else factors[:3].unsqueeze(1)


@pytest.mark.parametrize(("loss", "axis"), [(losses.token, 1), (losses.channel, 2)])
def test_each_token_or_channel_counts_by_its_own_scale(loss: Loss, axis: int) -> None:
    output, target, factors = rescaled(axis)
    one = slice(0, 1)  # one sample: a channel's or a token's scale is then the whole factor
    scaled = loss(output[one] * factors, target[one] * factors)
    assert float(scaled) == pytest.approx(float(loss(output[one], target[one])), rel=1e-5)
    common = losses.frobenius(output[one] * factors, target[one] * factors)
    assert float(common) != pytest.approx(float(losses.frobenius(output[one], target[one])), rel=1e-2)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_perfect_output_costs_nothing_and_zero_costs_one(loss: Loss) -> None:
    _, target, _ = rescaled(1)
    assert float(loss(target, target)) == 0.0
    assert float(loss(torch.zeros_like(target), target)) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_computed_in_fp32(loss: Loss, dtype: torch.dtype) -> None:
    output, target, _ = rescaled(1)
    low = (300 * output).to(dtype), (300 * target).to(dtype)  # squares beyond float16
    found = loss(*low)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(by_loop(loss, *low), rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_silent_target_gives_a_finite_loss(loss: Loss) -> None:
    target = torch.zeros(2, 3, 4)
    assert float(loss(target, target)) == 0.0
    assert math.isfinite(float(loss(target + 1e-3, target)))


@few
@given(outputs(), st.integers(0, 2**16))
def test_weighted_channels_equal_the_loop(pair: tuple[Tensor, Tensor], seed: int) -> None:
    output, target = pair
    weights = torch.rand(target.shape[-1], generator=torch.Generator().manual_seed(seed)) + 0.1
    expected = mean(
        [
            relative([(weight * a, weight * b) for (a, b), weight in zip(token, weights.tolist(), strict=True)])
            for token in pairs(output, target)
        ]
    )
    assert float(losses.token(output, target, channels=weights)) == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**-30, 1.0, 2.0**60])
def test_only_the_ratios_of_sensitivities_count(factor: float) -> None:
    sensitivity = torch.rand(7, generator=torch.Generator().manual_seed(1))
    weights = losses.channel_weights(sensitivity)
    assert float(weights.square().mean()) == pytest.approx(1.0, rel=1e-6)
    assert torch.equal(losses.channel_weights(sensitivity * factor), weights)
    torch.testing.assert_close(weights / weights[0], sensitivity / sensitivity[0])


def test_dead_channels_count_nothing_and_a_dead_block_counts_all_alike() -> None:
    output, target, _ = rescaled(1)
    weights = losses.channel_weights(torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0]))
    assert weights[0] == weights[2] == 0
    changed = output.clone()
    changed[..., [0, 2]] = 1e6
    assert float(losses.token(changed, target, channels=weights)) == float(
        losses.token(output, target, channels=weights)
    )
    assert torch.equal(losses.channel_weights(torch.zeros(5)), torch.ones(5))


@few
@given(st.floats(0, 1), st.floats(1e-3, 1))
def test_the_penalty_is_the_squared_relative_distance(sparsity: float, target: float) -> None:
    found = losses.sparsity_penalty(torch.tensor(sparsity, dtype=torch.float64), target)
    assert float(found) == pytest.approx((sparsity / target - 1) ** 2, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("loss", [losses.token, losses.channel, losses.frobenius])
@pytest.mark.parametrize("cuts", [[2], [0], [1, 1], [1, 3]])
def test_the_parts_of_several_processes_add_up(loss: Callable[..., Tensor], cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(4)
    output, target = torch.randn(2, 4, 3, 5, generator=generator)
    pairs = list(zip(output.tensor_split(cuts), target.tensor_split(cuts), strict=True))
    totals: list[Tensor] = []

    def kept(own: Tensor) -> Tensor:
        totals.append(own.clone())
        return own

    for part in pairs:  # what each process has of the sum over all tokens
        loss(*part, kept)
    parts = [loss(*part, lambda own: torch.stack(totals).sum(0)) for part in pairs]
    assert len(totals) == len(pairs)
    assert float(sum(parts)) == pytest.approx(float(loss(output, target)), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_divergence_is_that_of_a_loop(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    found, expected = (scale * torch.randn(2, 3, 7, generator=generator) for _ in range(2))
    total = 0.0
    for own, wanted in zip(found.flatten(0, 1).tolist(), expected.flatten(0, 1).tolist(), strict=True):
        q, p = ([math.exp(value) / math.fsum(map(math.exp, row)) for value in row] for row in (own, wanted))
        total += math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(losses.divergence(found, expected)) == pytest.approx(total, rel=1e-5)
    assert abs(float(losses.divergence(expected, expected))) < 1e-6


@pytest.mark.parametrize("together", [1, 20, 1000])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_comparison_of_predictions_is_that_of_a_loop(
    scale: float, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_VALUES", together)
    generator = torch.Generator().manual_seed(0)
    found, expected = (scale * torch.randn(2, 3, 7, generator=generator) for _ in range(2))
    divergences, same = losses.compare_predictions(found, expected)
    assert divergences.shape == same.shape == (2, 3)
    for place, (own, wanted) in enumerate(
        zip(found.flatten(0, 1).tolist(), expected.flatten(0, 1).tolist(), strict=True)
    ):
        q, p = ([math.exp(value) / math.fsum(map(math.exp, row)) for value in row] for row in (own, wanted))
        total = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert float(divergences.flatten()[place]) == pytest.approx(total, rel=1e-5, abs=1e-6)
        assert bool(same.flatten()[place]) == (own.index(max(own)) == wanted.index(max(wanted)))
    itself, alike = losses.compare_predictions(found, found)
    assert (itself == 0).all()
    assert alike.all()
    assert float(divergences.sum()) == pytest.approx(float(losses.divergence(found, expected)), rel=1e-6)


def test_tokens_that_the_target_excludes_do_not_count() -> None:
    never = -math.inf
    target = torch.tensor([1.0, 2.0, never])
    expected, _ = losses.compare_predictions(torch.tensor([2.0, 1.0]), target[:2])
    for third in (never, -40.0):
        divergence, same = losses.compare_predictions(torch.tensor([2.0, 1.0, third]), target)
        assert float(divergence) == pytest.approx(float(expected), rel=1e-6)
        assert not same
    impossible, _ = losses.compare_predictions(target, torch.tensor([1.0, 2.0, 3.0]))
    assert float(impossible) == math.inf
    undefined, _ = losses.compare_predictions(torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 2.0]))
    assert math.isnan(float(undefined))


@pytest.mark.parametrize("together", [1, 20, 1000])
def test_the_gradients_of_losses_of_logits_are_those_of_autograd(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_VALUES", together)
    generator = torch.Generator().manual_seed(0)
    logits, target = (3 * torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    logits.requires_grad_()
    labels = torch.multinomial(logits.detach().flatten(0, 1).softmax(-1), 1, generator=generator.manual_seed(1))
    pairs = [
        (
            losses.divergence(logits, target),
            F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True),
        ),
        (
            losses.own_labels(logits, generator.manual_seed(1)),
            F.cross_entropy(logits.flatten(0, 1), labels.squeeze(-1), reduction="sum"),
        ),
    ]
    for own, plain in pairs:
        (found,), (expected,) = (torch.autograd.grad(3 * loss, logits) for loss in (own, plain))
        torch.testing.assert_close(own, plain)
        torch.testing.assert_close(found, expected)
