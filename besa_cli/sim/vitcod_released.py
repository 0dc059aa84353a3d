"""ViTCoD by the formula of BESA's released program, for comparison with the paper's Table 4, with its known mistakes.

The denser part is counted as cols · G instead of rows · G, which is correct only for square linears; it costs nothing
if its lanes round down to 0. `down` is cut into patches of as many columns as it has rows, processed one after the
other. The threshold is always searched (`columns.searched`). The program's relabelling, which merges column 200 with
another one, is not reproduced. See docs/simulate.md.
"""

from functools import partial

from besa_cli.sim.accelerator import Accelerator
from besa_cli.sim.columns import denser, searched
from besa_cli.sim.cost import Cost, SimulationSettings, Split
from besa_cli.sim.dense import cycles
from besa_cli.sim.workload import Counts, Workload


def simulate(workload: Workload, accelerator: Accelerator, settings: SimulationSettings) -> Cost:
    """Return the released program's cost; its dense cycles are those printed in the paper (`dense_cycles`)."""
    size = workload.rows if workload.role == "down" and workload.cols > workload.rows else max(workload.cols, 1)
    patches = [workload.kept_by_column[start : start + size] for start in range(0, workload.cols, size)]
    splits = [
        searched(
            partial(_split, patch, workload.rows, accelerator, settings.batch), int(patch.sum()), settings.threshold
        )
        for patch in patches
    ]
    return Cost(
        dense_cycles=dense_cycles(workload, accelerator, settings),
        cycles=sum(split.slower for split in splits),
        useful=workload.kept * settings.batch,
        pes=accelerator.pes,
        split=Split(
            columns=sum(split.columns for split in splits),
            kept=sum(split.kept for split in splits),
            lanes=tuple(lanes for split in splits for lanes in split.lanes),
            denser_cycles=sum(split.denser_cycles for split in splits),
            sparser_cycles=sum(split.sparser_cycles for split in splits),
        ),
    )


def dense_cycles(workload: Workload, accelerator: Accelerator, settings: SimulationSettings) -> int:
    """Return the dense cycles of the paper's Table 4: ⌈cols² · batch / PEs⌉, in patches for `down` and for rows > cols.

    For LLaMA-7B that is 4,096 for the square linears and 4096 + 4096 + 1936 = 10,128 for the others, where 11,008 is
    correct. The program computes 10,128 by cutting `down` into patches; for gate and up it computes 4,096, not the
    paper's 10,128: here they are counted as if transposed.
    """
    rows, cols = workload.rows, workload.cols
    patched = rows > cols or (workload.role == "down" and cols > rows)
    size, length = (min(rows, cols), max(rows, cols)) if patched else (cols, cols)
    widths = [min(size, length - start) for start in range(0, length, size)] if size else []
    return sum(cycles(width * width * settings.batch, accelerator.pes) for width in widths)


def _split(kept_by_column: Counts, rows: int, accelerator: Accelerator, batch: int, threshold: float) -> Split:
    front = denser(kept_by_column, rows, threshold)
    columns, inside, kept = int(front.sum()), int(kept_by_column[front].sum()), int(kept_by_column.sum())
    work = rows * columns
    share = work / (kept - inside + work) if kept - inside + work else 0.0
    lanes = int(accelerator.lanes * share)
    height = accelerator.pes_per_lane
    others = accelerator.lanes - lanes
    return Split(
        columns=columns,
        kept=inside,
        lanes=(lanes,),
        denser_cycles=cycles(len(kept_by_column) * columns * batch, lanes * height) if lanes else 0,
        sparser_cycles=cycles((kept - inside) * batch, others * height) if others else (kept - inside) * batch,
    )
