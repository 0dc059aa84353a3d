"""A roofline: what the array computes with rows in lock step, and what the memory must deliver. The larger one counts.

*Compute.* A tile of as many rows as there are lanes is worked on at a time, a row in each lane, as many kept weights
a cycle as the lane has processing elements. Zeros are skipped; lanes that are done wait for the longest row of the
tile. Each input vector of the batch takes its own turn.

*Memory.* Weights are stored as the kept values and one bit a weight that says which these are, or densely where that
is smaller, with a scale for every group of columns where they have fewer than 16 bits. Inputs and outputs go over the
bus as well. Where a batch does not fit in the buffers, weights or inputs are read again, whichever is less.
"""

from dataclasses import replace

import numpy as np

from besa_cli.sim.accelerator import Accelerator
from besa_cli.sim.cost import Cost, Roof, SimulationSettings
from besa_cli.sim.workload import Counts, Workload


def simulate(workload: Workload, accelerator: Accelerator, settings: SimulationSettings) -> Cost:
    """Cycles under the bound that holds, beside those of the dense linear under its own."""
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
    """Σ over tiles of rows of the longest row's ⌈kept / PEs of a lane⌉, for one input vector."""
    if not len(kept_by_row):
        return 0
    turns = -(-kept_by_row // accelerator.pes_per_lane)
    tiles = np.arange(0, len(turns), accelerator.lanes)
    return int(np.maximum.reduceat(turns, tiles).sum())


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

    ways = _ways(workload.rows, vector, accelerator, settings.batch)
    weight_reads, input_reads = min(ways, key=total)
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
    """Bytes of the values and of the mask, in the smaller of the two forms."""
    values, mask = _bytes(workload.kept * bits), _bytes(workload.weights)
    dense = _bytes(workload.weights * bits)
    return (values, mask) if values + mask < dense else (dense, 0)


def _ways(rows: int, vector: int, accelerator: Accelerator, batch: int) -> list[tuple[int, int]]:
    """How often the weights and how often each input is read: by the inputs that stay on the chip, or by the weights.

    Inputs stay, as many as fit, and all weights pass by; or the weights of a tile of rows stay, and all inputs pass
    by, once for every tile. Either way there are no more inputs at a time than there is room for their sums.

    Parameters
    ----------
    vector : int
        Bytes of one input.
    """
    sums = max(1, accelerator.output_bytes // (accelerator.lanes * _bytes(accelerator.sum_bits)))
    fitting = accelerator.input_bytes // vector if vector else batch
    ways = [(-(-batch // sums), -(-rows // accelerator.lanes))]
    if fitting:
        ways.append((-(-batch // min(fitting, sums)), 1))
    return ways


def _bytes(bits: int) -> int:
    return -(-bits // 8)
