"""Small machines and masks, and the same machines run cycle by cycle, weight by weight, with nothing but loops."""

from fractions import Fraction

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from besa_cli.sim.accelerator import Accelerator
from besa_cli.sim.workload import Mask


def machine(lanes: int = 4, height: int = 1, **numbers: int) -> Accelerator:
    """A small accelerator with a bus of one byte a cycle."""
    plain = {
        "clock_hz": 1,
        "bytes_per_second": 1,
        "input_bytes": 1 << 20,
        "output_bytes": 1 << 20,
        "weight_bits": 8,
        "activation_bits": 8,
        "sum_bits": 32,
        "scale_bits": 16,
        "scale_group": 128,
    }
    return Accelerator(title="small", lanes=lanes, pes_per_lane=height, **{**plain, **numbers})


machines = st.builds(machine, lanes=st.integers(1, 6), height=st.integers(1, 3))


def masks(max_rows: int = 9, max_cols: int = 13) -> st.SearchStrategy[Mask]:
    """Masks of any shape from 1 × 1 on, with columns and rows of all densities."""

    def of(shape: tuple[int, int]) -> st.SearchStrategy[Mask]:
        tenths = hnp.arrays(np.int64, shape[1], elements=st.integers(0, 10), fill=st.nothing())
        chances = hnp.arrays(np.int64, shape, elements=st.integers(0, 9), fill=st.nothing())
        return st.builds(lambda column, chance: chance < column, tenths, chances)

    return st.tuples(st.integers(1, max_rows), st.integers(1, max_cols)).flatmap(of)


def run_queue(work: list[object], at_once: int) -> int:
    """Cycles until a queue is empty from which `at_once` pieces are taken a cycle."""
    queue, taken = list(work), 0
    while queue:
        del queue[:at_once]
        taken += 1
    return taken


def queues(mask: Mask, threshold: float, batch: int) -> tuple[list[object], list[object]]:
    """Every multiplication of the denser engine, and every one of the sparser engine."""
    first: list[object] = []
    second: list[object] = []
    rows, cols = mask.shape
    for col in range(cols):
        column = [bool(mask[row, col]) for row in range(rows)]
        dense = column.count(True) > threshold * rows
        for row in range(rows):
            for vector in range(batch):
                if dense:
                    first.append((row, col, vector))
                elif column[row]:
                    second.append((row, col, vector))
    return first, second


def two_engines(work: tuple[list[object], list[object]], lanes: int, first: int, height: int) -> int:
    """Cycles until both queues are empty, `first` of the lanes on the first."""
    one, other, taken = list(work[0]), list(work[1]), 0
    while one or other:
        del one[: first * height]
        del other[: (lanes - first) * height]
        taken += 1
    return taken


def lock_step(mask: Mask, lanes: int, height: int) -> int:
    """Cycles of one vector: a row in each lane, all lanes wait for the last of their tile."""
    taken = 0
    for start in range(0, mask.shape[0], lanes):
        left = [[col for col in range(mask.shape[1]) if row[col]] for row in mask[start : start + lanes]]
        while any(left):
            for lane in left:
                del lane[:height]
            taken += 1
    return taken


def bus(count: int, bytes_per_second: int, clock_hz: int) -> int:
    """Cycles until a bus has delivered so many bytes."""
    delivered, taken = Fraction(0), 0
    while delivered < count:
        delivered += Fraction(bytes_per_second, clock_hz)
        taken += 1
    return taken
