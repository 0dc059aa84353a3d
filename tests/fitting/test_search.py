"""The search against all candidates tried one by one."""

import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from besa_cli.fitting.search import Aim, Quality, Search, Targets
from besa_cli.fitting.space import Candidate, Shapes, Space, sparsities
from besa_cli.ops.affine import Grid

SHAPES = Shapes(linears=((64, 48), (48, 64)), value_bits=16, rest=500)
BITS = (None, 8, 4, 3)
SPACE = Space(
    shapes=SHAPES,
    sparsities=sparsities(0.1),
    grids={bits: None if bits is None else Grid(bits=bits, group_size=16) for bits in BITS},
)
DENSE = 20.0


@st.composite
def divergences(draw: st.DrawFn) -> dict[Candidate, float]:
    """A divergence for each candidate that rises along each line; the dense model has none."""
    found = {}
    for bits, line in SPACE.lines.items():
        value = 0.0 if bits is None else draw(st.floats(0.001, 0.3))
        for candidate in line:
            if candidate.sparsity:
                value += draw(st.floats(0.001, 0.5))
            found[candidate] = value
    return found


@st.composite
def targets(draw: st.DrawFn) -> Targets:
    sizes = [SPACE.bytes(candidate) for candidate in SPACE.candidates]
    return Targets(
        max_ppl=draw(st.none() | st.floats(DENSE, 10 * DENSE)),
        max_kl=draw(st.none() | st.floats(0.001, 2)),
        size=draw(st.none() | st.integers(min(sizes), max(sizes))),
        bits_per_weight=draw(st.none() | st.floats(3, 16)),
    )


def quality(divergence: float) -> Quality:
    return Quality(DENSE * math.exp(0.9 * divergence), divergence)


def searched(
    truth: Mapping[Candidate, float], wanted: Targets, aim: Aim, probed: Mapping[Candidate, float]
) -> tuple[Search, list[Candidate]]:
    """The search at its end, and what it measured; a candidate that is measured twice fails."""
    measured: dict[Candidate, Quality] = {}
    while True:
        search = Search(SPACE, wanted, aim, probed=probed, dense=DENSE, measured=measured)
        candidate = search.next()
        if candidate is None:
            return search, list(measured)
        assert candidate not in measured
        assert wanted.fit_in(SPACE, candidate)
        measured[candidate] = quality(truth[candidate])


def best(truth: Mapping[Candidate, float], wanted: Targets, aim: Aim) -> Candidate | None:
    """The answer by trying everything."""
    costs = {
        "smallest": lambda candidate: (SPACE.bytes(candidate), -candidate.sparsity),
        "sparsest": lambda candidate: (-candidate.sparsity, SPACE.bytes(candidate)),
        "best": lambda candidate: (truth[candidate], SPACE.bytes(candidate)),
    }
    met = [
        candidate
        for candidate in SPACE.candidates
        if wanted.fit_in(SPACE, candidate) and wanted.met_by(quality(truth[candidate]))
    ]
    return min(met, key=costs[aim], default=None)


@settings(max_examples=200, deadline=None)
@given(divergences(), targets(), st.sampled_from(["smallest", "sparsest", "best"]), st.floats(0.75, 1.3))
def test_with_a_probe_in_proportion_the_answer_is_the_best_of_all(
    truth: dict[Candidate, float], wanted: Targets, aim: Aim, factor: float
) -> None:
    search, _ = searched(truth, wanted, aim, {candidate: factor * value for candidate, value in truth.items()})
    assert search.answer == best(truth, wanted, aim)


@settings(deadline=None)
@given(divergences(), divergences(), targets(), st.sampled_from(["smallest", "sparsest", "best"]))
def test_whatever_the_probe_says_the_answer_meets_the_targets_and_its_neighbour_does_not(
    truth: dict[Candidate, float], probed: dict[Candidate, float], wanted: Targets, aim: Aim
) -> None:
    search, measured = searched(truth, wanted, aim, probed)
    answer = search.answer
    if answer is None:
        assert search.nearest is None or not search.meets(search.nearest)
        return
    assert wanted.met_by(quality(truth[answer]))
    assert wanted.fit_in(SPACE, answer)
    line = SPACE.lines[answer.bits]
    after = line[line.index(answer) + 1 :][:1]
    if aim != "best" and after and (answer != Candidate(0.0) or None not in search.left_out):
        assert after[0] in measured
        assert not wanted.met_by(quality(truth[after[0]]))
    if aim == "best":
        before = line[: line.index(answer)][-1:]
        assert not before or not wanted.fit_in(SPACE, before[0])


@settings(deadline=None)
@given(divergences(), targets(), st.sampled_from(["smallest", "sparsest"]))
def test_with_a_good_probe_a_line_takes_three_measurements_at_most(
    truth: dict[Candidate, float], wanted: Targets, aim: Aim
) -> None:
    _, measured = searched(truth, wanted, aim, truth)
    for bits in BITS:
        assert sum(candidate.bits == bits for candidate in measured) <= 3


def test_where_all_lines_are_hopeless_one_is_measured_that_says_how_far_they_are() -> None:
    truth = {candidate: 5.0 + candidate.sparsity for candidate in SPACE.candidates}
    space = Space(shapes=SHAPES, sparsities=SPACE.sparsities, grids={4: SPACE.grids[4], 3: SPACE.grids[3]})
    wanted = Targets(max_kl=0.1)
    search = Search(space, wanted, "smallest", probed=truth, dense=DENSE, measured={})
    first = search.next()
    assert first == Candidate(0.0, 4)
    search = Search(space, wanted, "smallest", probed=truth, dense=DENSE, measured={first: quality(5.0)})
    assert search.next() is None
    assert search.answer is None
    assert search.nearest == first
    assert search.left_out == {3: Candidate(0.0, 3)}


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.3])
def test_what_lies_between_probed_candidates_is_predicted_from_both(sparsity: float) -> None:
    probed = {
        candidate: math.exp(candidate.sparsity) for line in SPACE.lines.values() for candidate in (line[0], line[-1])
    }
    search = Search(SPACE, Targets(max_kl=1), "smallest", probed=probed, dense=DENSE, measured={})
    assert search.predicted(Candidate(sparsity)) == pytest.approx(math.exp(sparsity))
