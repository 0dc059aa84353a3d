"""A roofline: what the array computes with rows in lock step, and what the memory must deliver. The larger one counts.

*Compute.* A tile of as many rows as there are lanes is worked on at a time, a row in each lane, as many kept weights
a cycle as the lane has processing elements. Zeros are skipped; lanes that are done wait for the longest row of the
tile. Each input vector of the batch takes its own turn.

*Memory.* Weights are stored as the kept values and one bit a weight that says which these are, or densely where that
is smaller, with a scale for every group of columns where they have fewer than 16 bits. They are read once for every
part of the batch whose inputs and sums fit in the buffers; inputs and outputs go over the bus as well.
"""

import numpy as np

from besa_cli.sim.accelerator import Accelerator
from besa_cli.sim.cost import Cost, Roof, Settings
from besa_cli.sim.workload import Counts, Workload


def simulate(workload: Workload, accelerator: Accelerator, settings: Settings) -> Cost:
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
        roof=sparse,
    )


def compute_cycles(kept_by_row: Counts, accelerator: Accelerator) -> int:
    """Σ over tiles of rows of the longest row's ⌈kept / PEs of a lane⌉, for one input vector."""
    if not len(kept_by_row):
        return 0
    turns = -(-kept_by_row // accelerator.pes_per_lane)
    tiles = np.arange(0, len(turns), accelerator.lanes)
    return int(np.maximum.reduceat(turns, tiles).sum())


def _roof(workload: Workload, accelerator: Accelerator, settings: Settings) -> Roof:
    bits = settings.weight_bits or accelerator.weight_bits
    activation_bits = max(bits, accelerator.activation_bits)
    passes, reads = _passes(workload, accelerator, settings.batch, activation_bits)
    values, mask = _stored(workload, bits)
    groups = workload.rows * -(-workload.cols // accelerator.scale_group) if bits < 16 else 0
    scales = _bytes(groups * accelerator.scale_bits)
    inputs = settings.batch * reads * _bytes(workload.cols * activation_bits)
    outputs = settings.batch * _bytes(workload.rows * activation_bits)
    total = passes * (values + mask + scales) + inputs + outputs
    return Roof(
        compute_cycles=settings.batch * compute_cycles(workload.kept_by_row, accelerator),
        memory_cycles=accelerator.transfer_cycles(total),
        value_bytes=passes * values,
        mask_bytes=passes * mask,
        scale_bytes=passes * scales,
        input_bytes=inputs,
        output_bytes=outputs,
        dense_bytes=passes * (_bytes(workload.weights * bits) + scales) + inputs + outputs,
    )


def _stored(workload: Workload, bits: int) -> tuple[int, int]:
    """Bytes of the values and of the mask, in the smaller of the two forms."""
    values, mask = _bytes(workload.kept * bits), _bytes(workload.weights)
    dense = _bytes(workload.weights * bits)
    return (values, mask) if values + mask < dense else (dense, 0)


def _passes(workload: Workload, accelerator: Accelerator, batch: int, activation_bits: int) -> tuple[int, int]:
    """How often the weights are read, and how often each input vector is."""
    vector = _bytes(workload.cols * activation_bits)
    fitting = accelerator.input_bytes // vector if vector else batch
    sums = accelerator.output_bytes // (accelerator.lanes * _bytes(accelerator.sum_bits))
    part = max(1, min(fitting, sums))
    tiles = -(-workload.rows // accelerator.lanes)
    return -(-batch // part), 1 if fitting else tiles


def _bytes(bits: int) -> int:
    return -(-bits // 8)
