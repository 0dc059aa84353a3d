"""Dataflow that does not skip zeros: the baseline of every speed-up."""

from besa_cli.sim.accelerator import Accelerator
from besa_cli.sim.cost import Cost, SimulationSettings
from besa_cli.sim.workload import Workload


def cycles(work: int, pes: int) -> int:
    """Return the cycles of `pes` processing elements for `work` independent multiplications: ⌈work / pes⌉."""
    return -(-work // pes)


def simulate(workload: Workload, accelerator: Accelerator, settings: SimulationSettings) -> Cost:
    """Return the cost of multiplying every weight: ⌈rows · cols · batch / PEs⌉ cycles."""
    count = cycles(workload.weights * settings.batch, accelerator.pes)
    return Cost(dense_cycles=count, cycles=count, useful=workload.kept * settings.batch, pes=accelerator.pes)
