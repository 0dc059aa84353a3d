"""Results of a simulation as plain data: a JSON object with all settings, rows for CSV, and the file in the run."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from besa_cli.checkpoint import manifests
from besa_cli.checkpoint.runs import Run
from besa_cli.sim.cost import Cost
from besa_cli.simulation.run import BlockCost, LinearCost, MlpCost, SimulationRequest, summaries
from besa_cli.system import disk, lock
from besa_cli.system.disk import Json, JsonObject

_LINEAR = ("block", "name", "label", "rows", "cols", "kept", "sparsity", "empty_rows", "empty_columns")
_COST = ("dense_cycles", "cycles", "speedup", "utilisation")
_SPLIT = ("denser_columns", "denser_kept", "denser_lanes", "denser_cycles", "sparser_cycles")
_ROOF = ("bound", "compute_cycles", "memory_cycles", "value_bytes", "mask_bytes", "scale_bytes", "input_bytes",
         "output_bytes", "bytes", "dense_bytes")  # fmt: skip


def record(block_costs: Sequence[BlockCost], request: SimulationRequest) -> JsonObject:
    """Return the results and the settings of a simulation as JSON data; infinite numbers become None."""
    return {
        "func": request.func,
        "settings": asdict(request.settings),
        "accelerator": asdict(request.accelerator),
        "mean": {
            name: {label: _finite(asdict(mean)) for label, mean in summaries(block_costs, name).items()}
            for name in request.dataflows
        },
        "dead_neurons": dead_neurons(block_costs, request),
        "linears": [_linear(linear) for block in block_costs for linear in block.linears],
    }


def dead_neurons(block_costs: Sequence[BlockCost], request: SimulationRequest) -> JsonObject | None:
    """Return the dead neurons of all MLPs, their weights, cycles and places; None if no whole MLP was simulated."""
    mlps = [mlp for block in block_costs for mlp in block.mlps]
    if not mlps:
        return None
    return {
        "mlps": len(mlps),
        **{name: sum(getattr(mlp.dead, name) for mlp in mlps) for name in ("neurons", "dead", "weights", "kept")},
        "cycles": {name: sum(mlp.cycles[name] for mlp in mlps) for name in request.dataflows},
        "places": [_mlp(mlp) for mlp in mlps if mlp.dead.dead],
    }


def _mlp(mlp: MlpCost) -> JsonObject:
    return {"block": mlp.block, "name": mlp.name, **asdict(mlp.dead), "cycles": dict(mlp.cycles)}


def _linear(linear: LinearCost) -> JsonObject:
    costs = {name: {key: value for key, value in _cost(cost).items() if value is not None}
             for name, cost in linear.costs.items()}  # fmt: skip
    return {**_counts(linear), "costs": costs}


def _counts(linear: LinearCost) -> JsonObject:
    workload = linear.workload
    return {
        "block": linear.block,
        "name": linear.name,
        "label": linear.label,
        "rows": workload.rows,
        "cols": workload.cols,
        "kept": workload.kept,
        "sparsity": workload.sparsity,
        "empty_rows": int((workload.kept_by_row == 0).sum()),
        "empty_columns": int((workload.kept_by_column == 0).sum()),
    }


def _cost(cost: Cost) -> JsonObject:
    """Return a cost by the names of `_COST`, `_SPLIT` and `_ROOF`; None for values that the dataflow lacks."""
    split, roof = cost.split, cost.roof
    flat: JsonObject = {name: getattr(cost, name) for name in _COST}
    flat |= dict.fromkeys((*_SPLIT, *_ROOF))
    if split:
        flat |= {
            "denser_columns": split.columns,
            "denser_kept": split.kept,
            "denser_lanes": list(split.lanes),
            "denser_cycles": split.denser_cycles,
            "sparser_cycles": split.sparser_cycles,
        }
    if roof:
        flat |= {name: getattr(roof, name) for name in _ROOF}
    return _finite(flat)


def _finite(values: Json) -> JsonObject:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def rows(block_costs: Sequence[BlockCost]) -> tuple[list[str], list[list[str]]]:
    """Return the CSV header and one row for each linear and dataflow; missing values are empty strings."""
    header = [*_LINEAR, "dataflow", *_COST, *_SPLIT, *_ROOF]
    table = []
    for linear in (linear for block in block_costs for linear in block.linears):
        for name, cost in linear.costs.items():
            values = [*_counts(linear).values(), name, *_cost(cost).values()]
            table.append([_plain(value) for value in values])
    return header, table


def _plain(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def save(simulation: Json, run: Run, model: Json, digest: str) -> Path:
    """Write a simulation of a run's stage to ``simulate/`` and return the file; equal settings give the same name.

    Parameters
    ----------
    simulation : mapping
        The result of `record`.
    run : Run
    model : mapping
        The description of the model to write to the file.
    digest : str
        Digest of the checkpoint's content.

    Raises
    ------
    BesaError
        The file cannot be written.
    """
    made_with = {"model_digest": digest, **{name: simulation[name] for name in ("func", "settings", "accelerator")}}
    made_with["dataflows"] = list(simulation["mean"])
    key = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:8]
    file = run.simulations / f"simulate-{disk.safe_name(simulation['func'])}-{digest[:8]}-{key}.json"
    content = {
        "format": manifests.FORMAT,
        "kind": "simulation",
        "model": dict(model),
        "model_digest": digest,
        **simulation,
        "versions": {**manifests.versions(), "numpy": version("numpy")},
    }
    with lock.hold_results(run.path):
        disk.sweep(file)
        disk.write_json(file, content)
    return file
