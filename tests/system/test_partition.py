"""Samples shared out over ranks: everyone's share even, nothing lost, nothing twice."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from support.strategies import few

from besa_cli.system import partition

counts = st.integers(1, 60)
sizes = st.integers(1, 9)


@few
@given(counts, sizes)
def test_every_sample_belongs_to_one_rank_and_neighbours_together(samples: int, size: int) -> None:
    owned = [list(partition.samples_of_rank(samples, rank, size)) for rank in range(size)]
    assert [sample for part in owned for sample in part] == list(range(samples))
    lengths = [len(part) for part in owned]
    assert max(lengths) - min(lengths) <= 1
    owners = partition.owner_of_sample(samples, size)
    assert all(sample in owned[owner] for sample, owner in enumerate(owners))
    assert len(owners) == samples


@few
@given(st.data(), sizes)
def test_the_work_of_a_step_is_even_and_moves_no_sample_without_need(data: st.DataObject, size: int) -> None:
    owners = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=40))
    workers = partition.assign_samples(owners, size)
    assert len(workers) == len(owners)
    load, most = Counter(workers), -(-len(owners) // size)
    assert max(load.values()) == most
    if len(owners) % size == 0:
        assert set(load.values()) == {most}
    moved = sum(owner != worker for owner, worker in zip(owners, workers, strict=True))
    assert moved == sum(max(count - most, 0) for count in Counter(owners).values())


def test_a_step_of_one_sample_stays_with_its_owner() -> None:
    assert partition.assign_samples([2], 4) == [2]


def test_what_is_too_many_for_its_owner_goes_to_the_idle() -> None:
    assert partition.assign_samples([0, 0, 0, 1], 2) == [0, 0, 1, 1]
    assert partition.assign_samples([3, 3, 3, 3], 4) == [3, 0, 1, 2]
