"""The machine that knows no zeros: what every speed-up is measured against."""

from besa_cli.sim.accelerator import Accelerator
from besa_cli.sim.cost import Cost, SimulationSettings
from besa_cli.sim.workload import Workload


def cycles(work: int, pes: int) -> int:
    """Cycles of `pes` processing elements for `work` multiplications that may go to any of them: ⌈work / pes⌉."""
    return -(-work // pes)


def simulate(workload: Workload, accelerator: Accelerator, settings: SimulationSettings) -> Cost:
    """Every weight is computed with: ⌈rows · cols · batch / PEs⌉ cycles."""
    taken = cycles(workload.weights * settings.batch, accelerator.pes)
    return Cost(dense_cycles=taken, cycles=taken, useful=workload.kept * settings.batch, pes=accelerator.pes)
