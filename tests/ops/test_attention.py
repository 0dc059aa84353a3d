"""Attention by chunks against PyTorch's own in fp64, and its gradient against finite differences."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import calls
from support.strategies import few
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from besa_cli.ops import attention

Sizes = tuple[int, int, int, int, int, int]  # batch, groups, heads a group, tokens, widths of keys and of values


def drawn(sizes: Sizes, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values laid out as a model's projections leave them: tokens before heads."""
    batch, groups, each, seqlen, width, value_width = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = [(groups * each, width), (groups, width), (groups, value_width)]
    return [
        torch.randn(batch, seqlen, *shape, generator=generator, dtype=torch.float64).transpose(1, 2).to(dtype)
        for shape in shapes
    ]


def stock(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def with_gradients(function: Callable[..., Tensor], parts: list[Tensor], slope: Tensor, scale: float) -> list[Tensor]:
    """The output, and the gradients of queries, keys and values."""
    learned = [part.detach().clone().requires_grad_() for part in parts]
    output = function(*learned, scale)
    output.backward(slope)
    return [output.detach(), *(part.grad for part in learned if part.grad is not None)]


@few
@given(
    sizes=st.tuples(
        st.integers(1, 2),
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, 300),
        st.integers(1, 9),
        st.integers(1, 9),
    ),
    scale=st.floats(0.05, 3),
    seed=st.integers(0, 99),
)
def test_it_is_causal_attention(sizes: Sizes, scale: float, seed: int) -> None:
    parts = drawn(sizes, torch.float64, seed)
    slope = torch.randn(sizes[0], sizes[1] * sizes[2], sizes[3], sizes[5], dtype=torch.float64)
    expected = with_gradients(stock, parts, slope, scale)
    for one, other in zip(with_gradients(attention.causal, parts, slope, scale), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_what_is_kept_for_the_backward_pass_and_what_is_computed_again_give_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = drawn((1, 2, 2, 300, 8, 8), torch.float32)
    slope = torch.ones(1, 4, 300, 8)
    kept = with_gradients(attention.causal, parts, slope, 0.5)
    made = []
    noted = calls.noting(attention._Heads.probabilities, lambda *words: made.append(1))
    monkeypatch.setattr(attention._Heads, "probabilities", noted)
    monkeypatch.setattr(attention, "KEPT", 0)
    again = with_gradients(attention.causal, parts, slope, 0.5)
    assert len(made) == 4  # two chunks, forward and backward
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


def test_gradients_are_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_CHUNK", 3)
    parts = [part.requires_grad_() for part in drawn((2, 2, 2, 7, 3, 2), torch.float64)]
    assert torch.autograd.gradcheck(lambda query, key, value: attention.causal(query, key, value, 0.7), parts)


@pytest.mark.parametrize("seqlen", [1, 255, 256, 257, 700])
def test_bf16_is_as_near_as_rounded_scores_allow(seqlen: int) -> None:
    """Transformers' eager attention rounds its scores, too: what it gives is the measure."""
    sizes = (1, 2, 3, seqlen, 64, 64)
    parts = drawn(sizes, torch.bfloat16)
    query, key, value = parts
    exact = stock(query.double(), key.double(), value.double(), 0.125)
    scores = (query @ key.repeat_interleave(3, 1).transpose(2, 3)) * 0.125
    future = torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)
    eager = scores.masked_fill(future, -torch.inf).softmax(3, dtype=torch.float32).bfloat16()
    eager = eager @ value.repeat_interleave(3, 1)
    found = attention.causal(query, key, value, 0.125)
    assert found.dtype == torch.bfloat16
    assert relative(found, exact) <= 1.2 * relative(eager, exact)


def test_a_token_sees_nothing_of_those_after_it() -> None:
    query, key, value = drawn((1, 1, 2, 600, 4, 4), torch.float32)
    before = attention.causal(query, key, value, 0.5)
    key[:, :, 400:], value[:, :, 400:] = 1e4, -1e4
    after = attention.causal(query, key, value, 0.5)
    torch.testing.assert_close(before[:, :, :400], after[:, :, :400])
    assert not torch.isclose(before[:, :, 400:], after[:, :, 400:]).any()
