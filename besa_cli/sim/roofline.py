"""Roofline: the larger of compute time, with rows in lock step, and memory time.

*Compute.* The array processes tiles of as many rows as it has lanes, one row per lane; a lane multiplies as many kept
weights per cycle as it has processing elements. Zeros are skipped; lanes that finish early wait for the longest row of
the tile. The input vectors of the batch are processed one after the other.

*Memory.* Weights are stored as the kept values and a mask of one bit per weight, or densely if that is smaller, with a
scale for every group of columns if they have fewer than 16 bits. Inputs and outputs are transferred as well. If a batch
does not fit in the buffers, either weights or inputs are read several times, whichever is fewer bytes.
"""

from dataclasses import replace

import numpy as np

from besa_cli.sim.accelerator import Accelerator
from besa_cli.sim.cost import Cost, Roof, SimulationSettings
from besa_cli.sim.workload import Counts, Workload


def simulate(workload: Workload, accelerator: Accelerator, settings: SimulationSettings) -> Cost:
    """Return the cost under the larger bound; the dense cycles are those of the dense linear's larger bound."""
    sparse = _roof(workload, accelerator, settings)
    rows, cols = workload.rows, workload.cols
    full = Workload(kept_by_row=np.full(rows, cols), kept_by_column=np.full(cols, rows), role=workload.role)
    dense = _roof(full, accelerator, settings)
    return Cost(
        dense_cycles=max(dense.compute_cycles, dense.memory_cycles),
        cycles=max(sparse.compute_cycles, sparse.memory_cycles),
        useful=workload.kept * settings.batch,
        pes=accelerator.pes,
        roof=replace(sparse, dense_bytes=dense.bytes),
    )


def compute_cycles(kept_by_row: Counts, accelerator: Accelerator) -> int:
    """Return the cycles of one input vector: ⌈kept / PEs per lane⌉ of the longest row, summed over tiles of rows."""
    if not len(kept_by_row):
        return 0
    row_cycles = -(-kept_by_row // accelerator.pes_per_lane)
    tiles = np.arange(0, len(row_cycles), accelerator.lanes)
    return int(np.maximum.reduceat(row_cycles, tiles).sum())


def _roof(workload: Workload, accelerator: Accelerator, settings: SimulationSettings) -> Roof:
    bits = settings.weight_bits or accelerator.weight_bits
    activation_bits = max(bits, accelerator.activation_bits)
    values, mask = _stored(workload, bits)
    groups = workload.rows * -(-workload.cols // accelerator.scale_group) if bits < 16 else 0
    scales = _bytes(groups * accelerator.scale_bits)
    vector = _bytes(workload.cols * activation_bits)
    outputs = settings.batch * _bytes(workload.rows * activation_bits)

    def total(reads: tuple[int, int]) -> int:
        return reads[0] * (values + mask + scales) + reads[1] * settings.batch * vector + outputs

    schedules = _schedules(workload.rows, vector, accelerator, settings.batch)
    weight_reads, input_reads = min(schedules, key=total)
    return Roof(
        compute_cycles=settings.batch * compute_cycles(workload.kept_by_row, accelerator),
        memory_cycles=accelerator.transfer_cycles(total((weight_reads, input_reads))),
        value_bytes=weight_reads * values,
        mask_bytes=weight_reads * mask,
        scale_bytes=weight_reads * scales,
        input_bytes=input_reads * settings.batch * vector,
        output_bytes=outputs,
    )


def _stored(workload: Workload, bits: int) -> tuple[int, int]:
    """Return the bytes of values and mask in the smaller of the sparse and the dense form (mask 0)."""
    values, mask = _bytes(workload.kept * bits), _bytes(workload.weights)
    dense = _bytes(workload.weights * bits)
    return (values, mask) if values + mask < dense else (dense, 0)


def _schedules(rows: int, vector: int, accelerator: Accelerator, batch: int) -> list[tuple[int, int]]:
    """Return (reads of the weights, reads of each input) for the two schedules.

    Either the weights of a tile of rows stay on the chip, and all inputs are read once for every tile; or as many
    inputs as fit stay, and all weights are read for every such group. In both, the inputs processed together are
    limited by the buffer for their partial sums.

    Parameters
    ----------
    vector : int
        Bytes of one input.
    """
    sums = max(1, accelerator.output_bytes // (accelerator.lanes * _bytes(accelerator.sum_bits)))
    fitting = accelerator.input_bytes // vector if vector else batch
    schedules = [(-(-batch // sums), -(-rows // accelerator.lanes))]
    if fitting:
        schedules.append((-(-batch // min(fitting, sums)), 1))
    return schedules


def _bytes(bits: int) -> int:
    return -(-bits // 8)
