"""The knapsack over blocks against an exhaustive search, and its curves against their definition."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import few

from besa_cli.ops import knapsack

Problem = tuple[list[int], list[float], list[list[int]], float]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Sizes, points, errors of any shape, and a total between the bounds."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    points = sorted(draw(st.sets(st.integers(0, 20), min_size=2, max_size=5)))
    count = len(points)
    errors = [draw(st.lists(st.integers(0, 30), min_size=count, max_size=count)) for _ in sizes]
    part = draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8, 1.0]))
    low, high = sum(sizes) * points[0] / 20, sum(sizes) * points[-1] / 20
    return sizes, [point / 20 for point in points], errors, low + part * (high - low)


def hull_at(points: list[float], curve: list[int], point: float) -> float:
    """The lower convex hull of a curve at a point: the least value of all its chords there."""
    chords = [
        curve[i] + (curve[j] - curve[i]) * (point - points[i]) / (points[j] - points[i])
        for i, j in product(range(len(points)), repeat=2)
        if points[i] <= point <= points[j] and i != j
    ]
    return min([*chords, *(value for at, value in zip(points, curve, strict=True) if at == point)])


def least(problem: Problem) -> float:
    """The least sum of errors, by search: all blocks on points, one of them wherever the total leaves it."""
    sizes, points, errors, total = problem
    found = []
    for free in range(len(sizes)):
        others = [block for block in range(len(sizes)) if block != free]
        for chosen in product(points, repeat=len(others)):
            spent = sum(sizes[block] * point for block, point in zip(others, chosen, strict=True))
            point = min(max((total - spent) / sizes[free], points[0]), points[-1])
            if abs(point * sizes[free] + spent - total) < 1e-9:
                sums = [hull_at(points, errors[block], at) for block, at in zip(others, chosen, strict=True)]
                found.append(sum(sums) + hull_at(points, errors[free], point))
    return min(found)


@few
@given(problems())
def test_no_other_shares_have_less_error(problem: Problem) -> None:
    sizes, points, errors, total = problem
    shares = knapsack.allocate(np.array(sizes, float), np.array(points), np.array(errors, float), total)
    assert float(shares.sum()) == pytest.approx(total)
    reached = [share / size for share, size in zip(shares.tolist(), sizes, strict=True)]
    assert all(points[0] - 1e-9 <= point <= points[-1] + 1e-9 for point in reached)
    clipped = [min(max(point, points[0]), points[-1]) for point in reached]
    own = sum(hull_at(points, curve, point) for curve, point in zip(errors, clipped, strict=True))
    assert own == pytest.approx(least(problem), abs=1e-6)


@few
@given(problems())
def test_the_hull_is_below_every_chord_and_goes_through_its_points(problem: Problem) -> None:
    _, points, errors, _ = problem
    for curve in errors:
        hull = knapsack.convex_hull(np.array(points), np.array(curve, float))
        assert (hull[0], hull[-1]) == (0, len(points) - 1)
        at_points = np.interp(points, [points[place] for place in hull], [curve[place] for place in hull])
        assert at_points == pytest.approx([hull_at(points, curve, point) for point in points])


@pytest.mark.parametrize(("total", "expected"), [(-1.0, [1.0, 2.0]), (99.0, [9.0, 18.0])])
def test_a_total_beyond_the_bounds_gives_the_bounds(total: float, expected: list[float]) -> None:
    sizes, points = np.array([10.0, 20.0]), np.array([0.1, 0.9])
    assert knapsack.allocate(sizes, points, np.array([[0.0, 1.0], [0.0, 3.0]]), total) == pytest.approx(expected)


def test_curves_are_log_linear_between_the_measured_points_and_beyond_them() -> None:
    measured, errors = np.array([0.2, 0.4, 0.8]), np.array([[1.0, 4.0, 64.0], [0.0, 0.0, 1.0]])
    points = np.array([0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.9])
    curves = knapsack.error_curves(measured, errors, points)
    assert curves[0] == pytest.approx([0.5, 1.0, 2.0, 4.0, 16.0, 64.0, 128.0])
    assert curves[1][1:4] == pytest.approx([0.0, 0.0, 0.0], abs=1e-20)
    assert curves[1][5] == pytest.approx(1.0)
