"""ViTCoD (HPCA 2023) on a linear: a denser and a sparser engine share the lanes of one array and work side by side.

Columns that keep more than a share of their rows are *denser*: the denser engine computes them whole, zeros included,
and needs no index. What is kept in the other columns goes to the sparser engine, one weight a processing element and
cycle. The slower engine sets the time. Memory is not counted (`roofline` does that).
"""

from functools import partial

from besa_cli.sim.accelerator import Accelerator
from besa_cli.sim.columns import denser, searched
from besa_cli.sim.cost import Cost, SimulationSettings, Split
from besa_cli.sim.dense import cycles
from besa_cli.sim.workload import Workload


def simulate(workload: Workload, accelerator: Accelerator, settings: SimulationSettings) -> Cost:
    """Cycles of the slower engine, with the lanes shared in proportion to the work.

    denser: ⌈rows · G · batch / (w · H)⌉, sparser: ⌈kept outside · batch / ((W − w) · H)⌉, with G denser columns and w
    of the W lanes of H processing elements each.
    """
    split = partial(_split, workload, accelerator, settings.batch)
    found = searched(split, workload.kept, settings.threshold) if settings.search else split(settings.threshold)
    return Cost(
        dense_cycles=cycles(workload.weights * settings.batch, accelerator.pes),
        cycles=found.slower,
        useful=workload.kept * settings.batch,
        pes=accelerator.pes,
        split=found,
    )


def _split(workload: Workload, accelerator: Accelerator, batch: int, threshold: float) -> Split:
    front = denser(workload.kept_by_column, workload.rows, threshold)
    columns, inside = int(front.sum()), int(workload.kept_by_column[front].sum())
    lanes, taken = shared((workload.rows * columns * batch, (workload.kept - inside) * batch), accelerator)
    return Split(columns=columns, kept=inside, lanes=(lanes,), denser_cycles=taken[0], sparser_cycles=taken[1])


def shared(work: tuple[int, int], accelerator: Accelerator) -> tuple[int, tuple[int, int]]:
    """The lanes of the denser engine, and the cycles of the denser and the sparser one.

    The lanes are a whole number next to the proportional share, whichever makes the slower engine faster. An engine
    that has work has a lane; on an array of one lane the engines take turns.

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
        together = cycles(first + second, height)
        return 1, (together, together)

    def taken(lanes: int) -> tuple[int, int]:
        return cycles(first, lanes * height), cycles(second, (width - lanes) * height)

    share = width * first // (first + second)
    best = min((min(max(lanes, 1), width - 1) for lanes in (share, share + 1)), key=lambda lanes: max(taken(lanes)))
    return best, taken(best)
