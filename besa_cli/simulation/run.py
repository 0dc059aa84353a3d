"""Simulation of a checkpoint's linears on a sparse accelerator: reads the masks shard by shard and counts them."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from besa_cli import sim
from besa_cli.checkpoint import inspection
from besa_cli.checkpoint.inspection import BlockMatrices
from besa_cli.errors import unknown
from besa_cli.sim import dead, roles, workload
from besa_cli.sim.accelerator import Accelerator
from besa_cli.sim.cost import Cost, SimulationSettings
from besa_cli.sim.dead import DeadNeurons
from besa_cli.sim.summary import Summary, summarize
from besa_cli.sim.workload import Mask, Workload

EVERYTHING = ("model", "dense", "sparsity")
GROUPS = ("attn", "mlp")

_MLP = ("gate", "up", "gate_up", "down")


@dataclass(frozen=True, kw_only=True)
class SimulationRequest:
    """The linears, dataflows and accelerator to simulate.

    Attributes
    ----------
    func : str
        ``model``, ``attn``, ``mlp``, a role (``q``, ``down``, …) or a linear's own name.
    dataflows : tuple of str
        Keys of `sim.DATAFLOWS`.
    """

    func: str
    dataflows: tuple[str, ...]
    accelerator: Accelerator
    settings: SimulationSettings


@dataclass(frozen=True, kw_only=True)
class LinearCost:
    """One linear of one block: the counts of its mask, and its cost under each dataflow."""

    block: int
    name: str
    label: str
    workload: Workload
    costs: Mapping[str, Cost]


@dataclass(frozen=True, kw_only=True)
class MlpCost:
    """The dead neurons of one MLP of one block, and the cycles that their removal saves under each dataflow."""

    block: int
    name: str
    dead: DeadNeurons
    cycles: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """The costs of one block's linears, and the dead neurons of its MLPs."""

    index: int
    linears: tuple[LinearCost, ...]
    mlps: tuple[MlpCost, ...]


def label(linear: str) -> str:
    """Return the label of a linear in tables: its role, else its name, with ``*`` for the number of an expert."""
    return roles.role(linear) or re.sub(r"\.\d+\.", ".*.", linear)


def chosen(func: str, directory: Path) -> Callable[[str], bool]:
    """Return a predicate for the names of the linears that `func` selects; no tensor is read.

    Raises
    ------
    UsageError
        `func` selects no linear of the checkpoint.
    """
    names = {name for block in inspection.linear_names(directory).values() for name in block}
    selected = {name for name in names if _selects(func, name)}
    if not selected:
        labels = ordered({label(name) for name in names})
        groups = [group for group in GROUPS if any(roles.group(name) == group for name in names)]
        error = unknown("linear", func, [*labels, *groups, *EVERYTHING])
        raise type(error)(f"{error.message} in {directory}", error.hint)
    return selected.__contains__


def _selects(func: str, name: str) -> bool:
    if func in EVERYTHING:
        return True
    return roles.group(name) == func if func in GROUPS else func in (label(name), name)


def ordered(labels: set[str]) -> list[str]:
    """Sort labels in the order of the paper's table, other names after them."""
    known = list(roles.ROLES)
    return sorted(labels, key=lambda name: (known.index(name) if name in known else len(known), name))


def blocks(directory: Path, request: SimulationRequest, wanted: Callable[[str], bool]) -> Iterator[BlockCost]:
    """Simulate the blocks one after the other, with one block in memory at a time.

    Parameters
    ----------
    directory : Path
        A stage or a checkpoint.
    request : SimulationRequest
    wanted : callable
        The predicate that `chosen` returns.
    """
    for block in inspection.matrices(directory, wanted):
        masks = {name: _mask(weight) for name, weight in block.weights.items()}
        linears = []
        for name, mask in masks.items():
            counts = workload.of_mask(mask, roles.role(name))
            linears.append(
                LinearCost(
                    block=block.index, name=name, label=label(name), workload=counts, costs=costs(counts, request)
                )
            )
        yield BlockCost(index=block.index, linears=tuple(linears), mlps=tuple(_mlps(block, masks, request)))


def costs(counts: Workload, request: SimulationRequest) -> dict[str, Cost]:
    """Return the cost of a linear under each requested dataflow."""
    return {
        name: sim.dataflow(name).simulate(counts, request.accelerator, request.settings) for name in request.dataflows
    }


def _mask(tensor: Tensor) -> Mask:
    mask: Mask = (tensor != 0).numpy()
    return mask


def _mlps(block: BlockMatrices, masks: Mapping[str, Mask], request: SimulationRequest) -> Iterator[MlpCost]:
    """Yield the dead neurons of each MLP of a block whose linears are all among the masks."""
    mlps: dict[str, dict[str, str]] = {}
    for name in masks:
        role = roles.role(name)
        if role in _MLP:
            mlps.setdefault(name.rpartition(".")[0], {})[role] = name
    for mlp, names in mlps.items():
        by_role = {role: masks[name] for role, name in names.items()}
        biases = {role: _mask(block.biases[name]) for role, name in names.items() if name in block.biases}
        neuron_rows = _neuron_rows(by_role, biases)
        if neuron_rows is None:
            continue
        is_dead = dead.find(neuron_rows, by_role["down"])
        nothing = dict.fromkeys(request.dataflows, 0)
        yield MlpCost(
            block=block.index,
            name=mlp,
            dead=dead.count(by_role, is_dead),
            cycles=_saved(by_role, dead.without(by_role, is_dead), request) if is_dead.any() else nothing,
        )


def _neuron_rows(masks: Mapping[str, Mask], biases: Mapping[str, Mask]) -> list[tuple[Mask, Mask | None]] | None:
    """Return the masks and biases with one row per neuron (gate and up, up alone, or the halves of gate_up).

    None if the linears are not an MLP.
    """
    if "down" not in masks:
        return None
    neurons = masks["down"].shape[1]
    parts: list[tuple[Mask, Mask | None]] = []
    for role in ("gate", "up", "gate_up"):
        if role not in masks:
            continue
        bias, rows = biases.get(role), len(masks[role])
        if rows not in (neurons, 2 * neurons if role == "gate_up" else neurons):
            return None
        parts += [
            (masks[role][start : start + neurons], None if bias is None else bias[start : start + neurons])
            for start in range(0, rows, neurons)
        ]
    return parts or None


def _saved(before: Mapping[str, Mask], after: Mapping[str, Mask], request: SimulationRequest) -> dict[str, int]:
    """Return the cycles that an MLP saves under each dataflow with the masks `after` instead of `before`."""

    def cycles(masks: Mapping[str, Mask]) -> dict[str, int]:
        linears = [costs(workload.of_mask(mask, role), request) for role, mask in masks.items()]
        return {name: sum(linear[name].cycles for linear in linears) for name in request.dataflows}

    more, fewer = cycles(before), cycles(after)
    return {name: more[name] - fewer[name] for name in request.dataflows}


def summaries(block_costs: Sequence[BlockCost], dataflow: str) -> dict[str, Summary]:
    """Map each label to its summary under one dataflow, in the order of the paper's table, with ``all`` last."""
    linears = [linear for block in block_costs for linear in block.linears]
    labels = ordered({linear.label for linear in linears})
    groups = {name: [linear for linear in linears if linear.label == name] for name in labels}
    groups["all"] = linears
    return {
        name: summarize(
            [(linear.workload, linear.costs[dataflow]) for linear in group], len({linear.block for linear in group})
        )
        for name, group in groups.items()
    }
