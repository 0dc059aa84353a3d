"""What a sparse accelerator would make of pruned linears: masks as counts, accelerators as data, dataflows as formulas.

A dataflow is a file in this folder (``-`` in its name is ``_`` in the file's) with a function
``simulate(workload, accelerator, settings) -> Cost``, and a line in `DATAFLOWS`. An accelerator is a TOML file in
``accelerators/``. Only numpy is used here; nothing here knows a model.
"""

import importlib
from typing import Any

from besa_cli.errors import unknown

DATAFLOWS: dict[str, str] = {
    "dense": "every weight is computed with, zero or not",
    "vitcod": "a denser and a sparser engine share the lanes (ViTCoD, HPCA 2023), counted rightly",
    "vitcod-released": "the same by the formula of BESA's released program, its mistakes included, for comparison",
    "roofline": "load imbalance between rows, and bytes over the memory's bandwidth: says which of the two holds",
}


def dataflow(name: str) -> Any:
    """The module of a dataflow; its `simulate(workload, accelerator, settings)` gives a `cost.Cost`.

    Raises
    ------
    UsageError
        There is no such dataflow.
    """
    if name not in DATAFLOWS:
        raise unknown("dataflow", name, DATAFLOWS)
    return importlib.import_module(f"besa_cli.sim.{name.replace('-', '_')}")
