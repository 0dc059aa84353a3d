"""ViTCoD (HPCA 2023) on a linear: a denser and a sparser engine share the lanes of one array and run in parallel.

Columns that keep more than a given share of their rows are *denser*: the denser engine multiplies all their weights,
zeros included, and needs no index. The kept weights of the other columns go to the sparser engine, one per processing
element and cycle. The slower engine determines the time. Memory is not modeled (see `roofline`).
"""

from functools import partial

from besa_cli.sim.accelerator import Accelerator
from besa_cli.sim.columns import denser, searched
from besa_cli.sim.cost import Cost, SimulationSettings, Split
from besa_cli.sim.dense import cycles
from besa_cli.sim.workload import Workload


def simulate(workload: Workload, accelerator: Accelerator, settings: SimulationSettings) -> Cost:
    """Return the cost with the cycles of the slower engine; the lanes are shared in proportion to the work.

    Cycles of the denser engine: ⌈rows · G · batch / (w · H)⌉; of the sparser: ⌈kept outside · batch / ((W − w) · H)⌉,
    with G denser columns, and w of the W lanes of H processing elements each.
    """
    split_at = partial(_split, workload, accelerator, settings.batch)
    split = searched(split_at, workload.kept, settings.threshold) if settings.search else split_at(settings.threshold)
    return Cost(
        dense_cycles=cycles(workload.weights * settings.batch, accelerator.pes),
        cycles=split.slower,
        useful=workload.kept * settings.batch,
        pes=accelerator.pes,
        split=split,
    )


def _split(workload: Workload, accelerator: Accelerator, batch: int, threshold: float) -> Split:
    front = denser(workload.kept_by_column, workload.rows, threshold)
    columns, inside = int(front.sum()), int(workload.kept_by_column[front].sum())
    lanes, (denser_cycles, sparser_cycles) = shared(
        (workload.rows * columns * batch, (workload.kept - inside) * batch), accelerator
    )
    return Split(
        columns=columns, kept=inside, lanes=(lanes,), denser_cycles=denser_cycles, sparser_cycles=sparser_cycles
    )


def shared(work: tuple[int, int], accelerator: Accelerator) -> tuple[int, tuple[int, int]]:
    """Share the lanes; returns the lanes of the denser engine, and the cycles of the denser and the sparser one.

    The proportional share is rounded down or up, whichever makes the slower engine faster. An engine with work has at
    least one lane; on an array of one lane the engines run one after the other.

    Parameters
    ----------
    work : (int, int)
        Multiplications of the denser and of the sparser engine.
    """
    first, second = work
    width, height = accelerator.lanes, accelerator.pes_per_lane
    if not first or not second:
        return (width if first else 0), (cycles(first, width * height), cycles(second, width * height))
    if width == 1:
        total = cycles(first + second, height)
        return 1, (total, total)

    def cycles_with(lanes: int) -> tuple[int, int]:
        return cycles(first, lanes * height), cycles(second, (width - lanes) * height)

    share = width * first // (first + second)
    best = min(
        (min(max(lanes, 1), width - 1) for lanes in (share, share + 1)), key=lambda lanes: max(cycles_with(lanes))
    )
    return best, cycles_with(best)
