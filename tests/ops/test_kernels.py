"""Every form of the inner loops against plain Python."""

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import few, marked_scores
from torch import Tensor

from besa_cli.errors import UsageError
from besa_cli.jobs import prune
from besa_cli.ops import kernels
from besa_cli.ops.kernels import native, plain

needs_native = pytest.mark.skipif(not native.available(), reason="the C++ loops were not built: no compiler")
FORMS = [pytest.param(plain, id="plain"), pytest.param(native, id="native", marks=needs_native)]
SHAPES = [(1, 1), (1, 7), (6, 1), (5, 300), (33, 100), (3, 1000)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def threads() -> "Iterator[Callable[[int], None]]":
    """Sets the number of threads until the test is over."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@few
@given(marked_scores(), st.sampled_from([plain, native]))
def test_ranks_are_the_places_in_a_stable_sort(matrix: Tensor, form: ModuleType) -> None:
    found = form.ranks(matrix)
    if found is None:
        assert not native.available()
        return
    for row, ranks in zip(matrix.tolist(), found.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda col: (row[col], col))
        assert [order[rank] for rank in ranks] == list(range(len(row)))


@pytest.mark.parametrize("form", FORMS)
def test_ranks_of_zeros_of_both_signs_infinities_and_tiny_numbers(form: ModuleType) -> None:
    row = [0.0, -0.0, 1e-45, -1.0, float("inf"), 0.0, 1e-38, -1.0, 3.0]
    assert form.ranks(torch.tensor([row])).tolist() == [[2, 3, 5, 0, 8, 4, 6, 1, 7]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("cols", "dtype"), [(32_767, torch.int16), (32_768, torch.int32), (40_000, torch.int32)])
def test_ranks_take_16_bits_where_they_suffice(cols: int, dtype: torch.dtype, form: ModuleType) -> None:
    weight = torch.arange(cols, 0, -1, dtype=torch.float32).unsqueeze(0)
    ranks = form.ranks(weight)
    assert ranks.dtype == dtype
    assert ranks[0].tolist() == list(range(cols - 1, -1, -1))
    for count in (0, 1, cols - 1, cols):
        kept = form.mask(weight, ranks, torch.tensor([count]), torch.empty_like(weight))
        assert int((kept == 0).sum()) == count
        assert torch.equal(kept[0, : cols - count], weight[0, : cols - count])
    sums = form.candidate_sums(torch.ones_like(weight), torch.ones_like(weight), ranks, 10)
    assert sums[0].tolist() == [-cut for cut in plain.cuts(10, cols)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("stored", "computed"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_mask_and_sums_are_those_of_a_loop(
    rows: int, cols: int, stored: torch.dtype, computed: torch.dtype, form: ModuleType
) -> None:
    weight, gradient = random(rows, cols, dtype=stored), random(rows, cols, seed=1, dtype=computed)
    ranks = plain.ranks(random(rows, cols, seed=2))
    counts = torch.randint(0, cols + 1, (rows,), generator=torch.Generator().manual_seed(3))
    masked = form.mask(weight, ranks, counts, torch.empty(rows, cols, dtype=computed))
    sums = form.candidate_sums(gradient, weight, ranks, 7)
    floored = form.candidate_sums(gradient, weight, ranks, 7, floored=True)
    if form is native and computed == torch.float16:
        assert masked is None  # left to the plain form
        assert sums is None
        assert floored is None
        return
    assert (masked.dtype, sums.dtype) == (computed, torch.float32)
    for row in range(rows):
        w, g, rank = weight[row].tolist(), gradient[row].tolist(), ranks[row].tolist()
        rounded = weight[row].to(computed).tolist()
        assert masked[row].tolist() == [0.0 if rank[c] < counts[row] else rounded[c] for c in range(cols)]
        for d, found in enumerate(sums[row].tolist()):
            terms = [g[c] * w[c] for c in range(cols) if rank[c] * 7 < d * cols]
            assert found == pytest.approx(-sum(terms), rel=1e-5, abs=1e-5 * sum(map(abs, terms)) + 1e-12)
        for d, found in enumerate(floored[row].tolist()):
            terms = [g[c] * w[c] for c in range(cols) if rank[c] < d * cols // 7]
            assert found == pytest.approx(-sum(terms), rel=1e-5, abs=1e-5 * sum(map(abs, terms)) + 1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 64, 270, 300])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (6, 1), (3, 300)])
def test_weights_on_a_grid_and_its_slopes_are_those_of_a_loop(
    rows: int, cols: int, width: int, stored: torch.dtype, form: ModuleType
) -> None:
    top, groups = 7, -(-cols // width)
    weight, gradient = random(rows, cols, dtype=stored), random(rows, cols, seed=1)
    scales = random(rows, groups, seed=2).abs() / 4 + 0.05
    zeros = random(rows, groups, seed=3).mul(9).round().clamp(0, top)
    found = form.on_grid(weight, scales, zeros, width, top)
    slopes = form.grid_slopes(gradient, weight, scales, zeros, width, top)
    for row in range(rows):
        for group in range(groups):
            h, z = scales[row, group], zeros[row, group]
            by_scale, by_zero, largest = 0.0, 0.0, 0.0
            for col in range(group * width, min((group + 1) * width, cols)):
                steps, slope = float(weight[row, col].float() / h), float(gradient[row, col])
                wished = round(steps) + float(z)
                code = min(max(wished, 0.0), float(top))
                assert found[row, col] == torch.tensor(code - float(z)) * h  # to the last bit
                by_scale += slope * (code - float(z) - (steps if code == wished else 0.0))
                by_zero -= slope * float(h) if code != wished else 0.0
                largest += abs(slope) * (1 + abs(code - float(z)))
            assert float(slopes[0][row, group]) == pytest.approx(by_scale, rel=1e-4, abs=1e-5 * largest)
            assert float(slopes[1][row, group]) == pytest.approx(by_zero, rel=1e-4, abs=1e-5 * largest)


@needs_native
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_every_finite_half_is_widened_and_rounded_as_torch_does(computed: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()].unsqueeze(0)
    ranks, none = plain.ranks(finite.float()), torch.zeros(1, dtype=torch.int32)
    found = native.mask(finite, ranks, none, torch.empty_like(finite, dtype=computed))
    assert found is not None
    number = torch.int32 if computed == torch.float32 else torch.int16
    assert torch.equal(found.view(number), finite.to(computed).view(number))


@needs_native
def test_the_native_loops_give_the_same_bits_with_any_number_of_threads(
    threads: "Callable[[int], None]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_THREAD_COST", 1)  # few weights are not worth a thread otherwise
    weight, gradient, scores = random(37, 129), random(37, 129, seed=1), random(37, 129, seed=2)
    counts, scales, zeros = torch.arange(37), random(37, 5, seed=3).abs() + 0.1, torch.full((37, 5), 7.0)
    found = []
    for number in (1, 2, 3, 50):
        threads(number)
        ranks = native.ranks(scores)
        assert ranks is not None
        masked = native.mask(weight, ranks, counts, torch.empty_like(weight))
        sums = native.candidate_sums(gradient, weight, ranks, 100)
        slopes = native.grid_slopes(gradient, weight, scales, zeros, 30, 15)
        on_grid = native.on_grid(weight, scales, zeros, 30, 15)
        assert masked is not None
        assert sums is not None
        assert slopes is not None
        assert on_grid is not None
        found.append((ranks, masked, sums, on_grid, *slopes))
    for others in found[1:]:
        assert all(torch.equal(first, other) for first, other in zip(found[0], others, strict=True))


def test_a_thread_is_started_only_where_there_is_enough_for_it(
    threads: "Callable[[int], None]", monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(native, "_function", lambda *names: lambda *given: told.append(given[-1].value))
    threads(4)
    for rows, cols in ((1, 8), (192, 576), (576, 576), (2048, 2048)):
        weight, ranks = random(rows, cols), torch.zeros(rows, cols, dtype=torch.int16)
        native.mask(weight, ranks, torch.zeros(rows), torch.empty_like(weight))
        native.candidate_sums(weight, weight, ranks, 10)
        native.ranks(weight)
    assert told == [1, 1, 1, 1, 1, 4, 1, 2, 4, 4, 4, 4]


@needs_native
def test_tensors_that_are_not_contiguous_are_left_to_the_plain_form() -> None:
    weight = random(6, 4).T
    assert native.ranks(weight) is None
    ones = torch.ones(4, 1)
    assert native.on_grid(weight, ones, ones, 6, 3) is None
    assert native.grid_slopes(weight, weight.contiguous(), ones, ones, 6, 3) is None
    assert torch.equal(kernels.on_grid(weight, ones, ones, 6, 3), plain.on_grid(weight, ones, ones, 6, 3))
    assert torch.equal(kernels.ranks(weight), plain.ranks(weight.contiguous()))


def test_the_environment_can_ask_for_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("BESA_KERNELS", "plain")
    assert kernels.name(cpu, torch.float32) == "plain"
    for choice in ("fast", ""):
        monkeypatch.setenv("BESA_KERNELS", choice)
        assert kernels.name(cpu, torch.float32) == ("native" if native.available() else "plain")
    monkeypatch.setenv("BESA_KERNELS", "native")
    with pytest.raises(UsageError, match="BESA_KERNELS=native is neither fast nor plain"):
        kernels.name(cpu, torch.float32)
    with pytest.raises(UsageError, match="BESA_KERNELS=native is neither fast nor plain"):
        prune.request(options={})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_said_to_serve_is_what_serves(dtype: torch.dtype) -> None:
    weight, ranks = random(3, 5), plain.ranks(random(3, 5))
    out = torch.empty(3, 5, dtype=dtype)
    counts = torch.tensor([1, 2, 3])
    served = [
        native.mask(weight, ranks, counts, out) is not None,
        native.candidate_sums(out, weight.to(dtype), ranks, 10) is not None,
    ]
    assert served == [kernels.name(torch.device("cpu"), dtype) == "native"] * 2
