"""A simulation as plain data: one JSON object with all that made it, rows for CSV, and the file that keeps it."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from besa_cli.checkpoint import manifests
from besa_cli.checkpoint.runs import Run
from besa_cli.sim.cost import Cost
from besa_cli.simulation.run import BlockCost, LinearCost, MlpCost, SimulationRequest, summaries
from besa_cli.system import disk, lock

_LINEAR = ("block", "name", "label", "rows", "cols", "kept", "sparsity", "empty_rows", "empty_columns")
_COST = ("dense_cycles", "cycles", "speedup", "utilisation")
_SPLIT = ("denser_columns", "denser_kept", "denser_lanes", "denser_cycles", "sparser_cycles")
_ROOF = ("bound", "compute_cycles", "memory_cycles", "value_bytes", "mask_bytes", "scale_bytes", "input_bytes",
         "output_bytes", "bytes", "dense_bytes")  # fmt: skip


def record(found: Sequence[BlockCost], request: SimulationRequest) -> dict[str, Any]:
    """Everything that was found, and what it was asked for with; numbers that JSON lacks are None."""
    return {
        "func": request.func,
        "settings": asdict(request.settings),
        "accelerator": asdict(request.accelerator),
        "mean": {
            name: {label: _finite(asdict(one)) for label, one in summaries(found, name).items()}
            for name in request.dataflows
        },
        "dead_neurons": dead_neurons(found, request),
        "linears": [_linear(linear) for block in found for linear in block.linears],
    }


def dead_neurons(found: Sequence[BlockCost], request: SimulationRequest) -> dict[str, Any] | None:
    """The dead neurons of all MLPs, what goes with them, and where they are; None where no whole MLP was simulated."""
    mlps = [mlp for block in found for mlp in block.mlps]
    if not mlps:
        return None
    return {
        "mlps": len(mlps),
        **{name: sum(getattr(mlp.dead, name) for mlp in mlps) for name in ("neurons", "dead", "weights", "kept")},
        "cycles": {name: sum(mlp.cycles[name] for mlp in mlps) for name in request.dataflows},
        "places": [_mlp(mlp) for mlp in mlps if mlp.dead.dead],
    }


def _mlp(mlp: MlpCost) -> dict[str, Any]:
    return {"block": mlp.block, "name": mlp.name, **asdict(mlp.dead), "cycles": dict(mlp.cycles)}


def _linear(linear: LinearCost) -> dict[str, Any]:
    costs = {name: {key: value for key, value in _cost(cost).items() if value is not None}
             for name, cost in linear.costs.items()}  # fmt: skip
    return {**_facts(linear), "costs": costs}


def _facts(linear: LinearCost) -> dict[str, Any]:
    counted = linear.workload
    return {
        "block": linear.block,
        "name": linear.name,
        "label": linear.label,
        "rows": counted.rows,
        "cols": counted.cols,
        "kept": counted.kept,
        "sparsity": counted.sparsity,
        "empty_rows": int((counted.kept_by_row == 0).sum()),
        "empty_columns": int((counted.kept_by_column == 0).sum()),
    }


def _cost(cost: Cost) -> dict[str, Any]:
    """A cost by the names of `_COST`, `_SPLIT` and `_ROOF`; None for what the dataflow does not have."""
    split, roof = cost.split, cost.roof
    flat: dict[str, Any] = {name: getattr(cost, name) for name in _COST}
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


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def rows(found: Sequence[BlockCost]) -> tuple[list[str], list[list[str]]]:
    """The header, and a line for every linear under every dataflow; empty where there is no value."""
    header = [*_LINEAR, "dataflow", *_COST, *_SPLIT, *_ROOF]
    lines = []
    for linear in (each for block in found for each in block.linears):
        for name, cost in linear.costs.items():
            values = [*_facts(linear).values(), name, *_cost(cost).values()]
            lines.append([_plain(value) for value in values])
    return header, lines


def _plain(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def save(found: Mapping[str, Any], run: Run, model: Mapping[str, Any], digest: str) -> Path:
    """Write one simulation of a run's stage into ``simulate/``, and say where; the same simulation has the same name.

    Parameters
    ----------
    found : mapping
        As from `record`.
    model : mapping
        What the file says of the model.
    digest : str
        Of the checkpoint's content.

    Raises
    ------
    BesaError
        It cannot be written.
    """
    made = {"model_digest": digest, **{name: found[name] for name in ("func", "settings", "accelerator")}}
    made["dataflows"] = list(found["mean"])
    key = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:8]
    file = run.simulations / f"simulate-{disk.safe_name(found['func'])}-{digest[:8]}-{key}.json"
    kept = {
        "format": manifests.FORMAT,
        "kind": "simulation",
        "model": dict(model),
        "model_digest": digest,
        **found,
        "versions": {**manifests.versions(), "numpy": version("numpy")},
    }
    with lock.hold_results(run.path):
        disk.sweep(file)
        disk.write_json(file, kept)
    return file
