"""Simulation of pruned linears on sparse accelerators: masks as counts, accelerators as data, dataflows as formulas.

A dataflow is a file in this folder (``-`` in its name is ``_`` in the file's) with a function
``simulate(workload, accelerator, settings) -> Cost``, and a line in `DATAFLOWS`. An accelerator is a TOML file in
``accelerators/``. The package uses only numpy and knows no model.
"""

import importlib
from typing import TYPE_CHECKING, Protocol, cast

from besa_cli.errors import unknown

if TYPE_CHECKING:
    from besa_cli.sim.accelerator import Accelerator
    from besa_cli.sim.cost import Cost, SimulationSettings
    from besa_cli.sim.workload import Workload

DATAFLOWS: dict[str, str] = {
    "dense": "every weight is multiplied, zero or not",
    "vitcod": "a denser and a sparser engine share the lanes (ViTCoD, HPCA 2023)",
    "vitcod-released": "ViTCoD by the formula of BESA's released program, including its mistakes, for comparison",
    "roofline": "compute time with load imbalance between rows, against memory time; tells which one is the bound",
}


class Dataflow(Protocol):
    """Module of a dataflow."""

    def simulate(self, workload: "Workload", accelerator: "Accelerator", settings: "SimulationSettings") -> "Cost":
        """Return the cost of a linear."""


def dataflow(name: str) -> Dataflow:
    """Import the module of a dataflow, whose `simulate(workload, accelerator, settings)` returns a `cost.Cost`.

    Raises
    ------
    UsageError
        The name is not in `DATAFLOWS`.
    """
    if name not in DATAFLOWS:
        raise unknown("dataflow", name, DATAFLOWS)
    return cast("Dataflow", importlib.import_module(f"besa_cli.sim.{name.replace('-', '_')}"))
