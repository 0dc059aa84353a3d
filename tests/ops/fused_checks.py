"""The checks of the Triton kernels. `test_fused_kernels.py` runs this file in processes of its own.

With ``TRITON_INTERPRET=1`` the kernels are interpreted, on the CPU; without it they are compiled for the GPU.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import toy_block
from torch import Tensor

from besa_cli.ops import allocation, kernels
from besa_cli.ops.kernels import fused, plain
from besa_cli.pruners import besa

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")

SHAPES = [(1, 1), (1, 7), (6, 1), (5, 300), (33, 100), (3, 1000), (2, 32_768)]
COUNTS = [1, 7, 100, 1000]
LARGE = {(33, 100): [7], (2, 32_768): [7, 1000]}  # the interpreter is slow
CASES = [(shape, count) for shape in SHAPES for count in LARGE.get(shape, COUNTS)]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def whole(rows: int, cols: int, *, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers from −8 to 8, with some columns and a row of zeros: every sum is exact in fp32, in any order."""
    numbers = torch.randint(-8, 9, (rows, cols), generator=torch.Generator().manual_seed(seed)).to(dtype)
    numbers[:, seed::5] = 0.0
    numbers[rows - 1 :: 4] *= cols > 1
    return numbers.to(DEVICE)


def some_counts(rows: int, cols: int) -> Tensor:
    """None, all, and numbers between."""
    counts = torch.randint(0, cols + 1, (rows,), generator=torch.Generator().manual_seed(3))
    counts[::3] = 0
    counts[1::3] = cols
    return counts.to(DEVICE)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Unlike `torch.equal` tells +0 from −0, and takes NaN for itself."""
    number = torch.int16 if found.dtype.itemsize == 2 else torch.int32
    return found.dtype == expected.dtype and torch.equal(found.view(number), expected.view(number))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_are_the_plain_ones_to_the_bit(shape: tuple[int, int]) -> None:
    ranks, counts = plain.ranks(normal(*shape, seed=2)), some_counts(*shape)
    for weight in (normal(*shape), whole(*shape, seed=1)):
        expected = plain.mask(weight, ranks, counts, torch.empty_like(weight))
        found = fused.mask(weight, ranks, counts, torch.full_like(weight, 9.0))
        assert found is not None
        assert same_bits(found, expected)


@pytest.mark.parametrize("computed", FLOATS, ids=NAMES.get)
@pytest.mark.parametrize("stored", FLOATS, ids=NAMES.get)
def test_masks_of_every_dtype_are_the_plain_ones(stored: torch.dtype, computed: torch.dtype) -> None:
    shape = (5, 300)
    ranks, counts = plain.ranks(normal(*shape, seed=2)), some_counts(*shape)
    weight = normal(*shape).bfloat16().to(stored) if stored != computed else normal(*shape).to(stored)
    expected = plain.mask(weight, ranks, counts, torch.empty(shape, dtype=computed, device=DEVICE))
    found = fused.mask(weight, ranks, counts, torch.empty(shape, dtype=computed, device=DEVICE))
    assert found is not None
    assert same_bits(found, expected)


def test_zeros_of_both_signs_infinities_and_nan_are_kept_as_they_are_or_pruned_to_zero() -> None:
    weight = torch.tensor([[-0.0, 0.0, float("inf"), float("nan"), -1e-45, 2.0]] * 3, device=DEVICE)
    ranks = torch.arange(6, dtype=torch.int16, device=DEVICE).repeat(3, 1)
    counts = torch.tensor([0, 4, 6], device=DEVICE)
    found = fused.mask(weight, ranks, counts, torch.empty_like(weight))
    assert found is not None
    assert same_bits(found, plain.mask(weight, ranks, counts, torch.empty_like(weight)))
    assert not found[2].signbit().any()


def test_only_the_tensor_given_is_written() -> None:
    room = torch.full((7, 300), 9.0, device=DEVICE)
    weight, ranks = normal(5, 300), plain.ranks(normal(5, 300, seed=2))
    found = fused.mask(weight, ranks, some_counts(5, 300), room[1:6])
    assert found is not None
    assert found.data_ptr() == room[1:6].data_ptr()
    assert (room[[0, 6]] == 9.0).all()


@pytest.mark.parametrize(("shape", "count"), CASES, ids=str)
def test_sums_of_whole_numbers_are_exact(shape: tuple[int, int], count: int) -> None:
    ranks = plain.ranks(normal(*shape, seed=2))
    assert ranks.dtype == (torch.int32 if shape[1] == 32_768 else torch.int16)
    gradient, weight = whole(*shape, seed=1), whole(*shape, seed=3)
    found = fused.candidate_sums(gradient, weight, ranks, count)
    assert found is not None
    assert found.dtype == torch.float32
    assert torch.equal(found, plain.candidate_sums(gradient, weight, ranks, count))
    floored = fused.candidate_sums(gradient, weight, ranks, count, floored=True)
    assert floored is not None
    assert torch.equal(floored, plain.candidate_sums(gradient, weight, ranks, count, floored=True))


@pytest.mark.parametrize("stored", FLOATS, ids=NAMES.get)
@pytest.mark.parametrize("computed", FLOATS, ids=NAMES.get)
def test_sums_of_every_dtype_are_exact(computed: torch.dtype, stored: torch.dtype) -> None:
    gradient, weight = whole(3, 300, seed=1, dtype=computed), whole(3, 300, seed=3, dtype=stored)
    ranks = plain.ranks(normal(3, 300, seed=2))
    found = fused.candidate_sums(gradient, weight, ranks, 7)
    assert found is not None
    assert torch.equal(found, plain.candidate_sums(gradient, weight, ranks, 7))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 32_768), torch.float32),
        ((5, 300), torch.float32),
        ((5, 300), torch.float16),
        ((5, 300), torch.bfloat16),
    ],
    ids=str,
)
def test_sums_of_any_numbers_are_those_of_doubles(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gradient, weight = normal(*shape, seed=1).to(dtype), normal(*shape).to(dtype)
    ranks = plain.ranks(normal(*shape, seed=2))
    found = fused.candidate_sums(gradient, weight, ranks, 100)
    assert found is not None
    ranked = torch.zeros(shape, dtype=torch.float64, device=DEVICE)
    ranked.scatter_(1, ranks.long(), gradient.double() * weight.double())
    for d in range(101):
        below = torch.arange(shape[1], device=DEVICE) * 100 < d * shape[1]
        terms = ranked[:, below]
        assert ((found[:, d] + terms.sum(1)).abs() <= 3e-7 * terms.abs().sum(1)).all()


def test_columns_with_equal_scores_and_dead_columns() -> None:
    ranks = plain.ranks(torch.zeros(3, 300, device=DEVICE))
    weight, gradient = normal(3, 300), normal(3, 300, seed=1)
    found = fused.candidate_sums(gradient, torch.zeros_like(weight), ranks, 100)
    assert found is not None
    assert not found.any()
    kept = fused.mask(weight, ranks, torch.tensor([0, 120, 300], device=DEVICE), torch.empty_like(weight))
    assert kept is not None
    assert [int((row == 0).sum()) for row in kept] == [0, 120, 300]
    assert torch.equal(kept[1, 120:], weight[1, 120:])


def test_a_number_that_is_not_finite_reaches_only_the_candidates_that_prune_it() -> None:
    ranks = torch.arange(10, dtype=torch.int16, device=DEVICE).unsqueeze(0)
    gradient = torch.ones(1, 10, device=DEVICE)
    gradient[0, 6] = float("inf")
    found = fused.candidate_sums(gradient, torch.ones_like(gradient), ranks, 5)
    assert found is not None
    assert found[0].tolist() == [0.0, -2.0, -4.0, -6.0, -float("inf"), -float("inf")]


def test_sums_are_the_same_to_the_bit_every_time_and_for_every_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gradient, ranks = normal(5, 300), normal(5, 300, seed=1), plain.ranks(normal(5, 300, seed=2))
    first = fused.candidate_sums(gradient, weight, ranks, 100)
    monkeypatch.setattr(fused, "_CHUNK", 650)  # two rows at a time, the last alone
    again = fused.candidate_sums(gradient, weight, ranks, 100)
    assert first is not None
    assert again is not None
    assert same_bits(again, first)


def test_what_the_kernels_do_not_serve_is_left_to_others() -> None:
    weight, counts = normal(4, 6), torch.ones(4, dtype=torch.int64, device=DEVICE)
    ranks = plain.ranks(weight)
    assert fused.mask(weight, ranks, counts, torch.empty_like(weight)) is not None
    turned, double = normal(6, 4).T, weight.double()
    for other in (turned, double):
        assert fused.mask(other, ranks, counts, torch.empty_like(weight)) is None
        assert fused.mask(weight, ranks, counts, other.clone()) is None
        assert fused.candidate_sums(other, weight, ranks, 7) is None
        assert fused.candidate_sums(weight, other, ranks, 7) is None
    assert fused.candidate_sums(weight, weight, ranks.long(), 7) is None
    assert fused.candidate_sums(weight, weight, ranks.T.contiguous().T, 7) is None


@pytest.mark.parametrize("floored", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5], ids=["row", "group", "layer"])
def test_the_straight_through_linear_takes_these_kernels_and_learns_as_with_the_plain_ones(
    size: int, floored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels.name(DEVICE, torch.float32) == "fused"
    groups = -(-5 // size)
    ranks, counts = plain.ranks(normal(5, 300, seed=2)), some_counts(groups, 300)
    found = []
    for choice in ("fast", "plain"):
        monkeypatch.setenv("BESA_KERNELS", choice)
        theta, weight = normal(groups, 11, seed=4).requires_grad_(), normal(5, 300).requires_grad_()
        room = torch.empty(5, 300, device=DEVICE)
        masked = allocation.straight_through(
            allocation.mixture(theta), weight, ranks, counts, size, room, floored=floored
        )
        (masked @ normal(300, 3, seed=5)).square().sum().backward()
        found.append((masked.detach().clone(), weight.grad, theta.grad))
    (masked, of_weight, of_theta), expected = found
    assert torch.equal(masked, expected[0])
    torch.testing.assert_close(of_weight, expected[1])
    torch.testing.assert_close(of_theta, expected[2])


def test_a_whole_block_is_pruned_as_with_the_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, calls = toy_block.source(hidden=24, inner=34), list[str]()
    for name in ("mask", "candidate_sums"):
        served = getattr(fused, name)

        def spy(*words: Any, name: str = name, served: Any = served, **more: Any) -> Any:
            found = served(*words, **more)
            calls.append(name if found is not None else "left to others")
            return found

        monkeypatch.setattr(fused, name, spy)
    results = []
    for choice in ("fast", "plain"):
        monkeypatch.setenv("BESA_KERNELS", choice)
        made = toy_block.block(weights, toy_block.size(weights) // 2)
        made.linears = {name: linear.to(DEVICE) for name, linear in made.linears.items()}
        made.weights = {name: weight.to(DEVICE) for name, weight in made.weights.items()}
        results.append(besa.prune(made, besa.Options(candidates=20)))
    assert set(calls) == {"mask", "candidate_sums"}
    assert calls.count("candidate_sums") == 8 * 3  # a step a sample, three linears
    first, second = results
    assert first.learned_loss == pytest.approx(second.learned_loss, rel=1e-4)
    differing = sum(int((first.masks[name] != second.masks[name]).sum()) for name in weights)
    assert differing <= 2  # what is pruned in another place: a rounding of the sums may move a weight


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """What is known of devices is forgotten before and after."""
    fused.available.cache_clear()
    yield
    fused.available.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_where_kernels_cannot_be_made_all_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(fused, "_launch", fail)
    weight = normal(4, 6)
    assert fused.candidate_sums(weight, weight, plain.ranks(weight), 7) is None
