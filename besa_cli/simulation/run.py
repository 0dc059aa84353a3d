"""A checkpoint's linears on a sparse accelerator: masks read shard by shard, counted, and simulated."""

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
    """What to simulate, and on what.

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
    """One linear of one block: its mask, counted, and what it costs under each dataflow."""

    block: int
    name: str
    label: str
    workload: Workload
    costs: Mapping[str, Cost]


@dataclass(frozen=True, kw_only=True)
class MlpCost:
    """The dead neurons of one MLP of one block, and the cycles that go with them under each dataflow."""

    block: int
    name: str
    dead: DeadNeurons
    cycles: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """What was found in one block."""

    index: int
    linears: tuple[LinearCost, ...]
    mlps: tuple[MlpCost, ...]


def label(linear: str) -> str:
    """What a linear stands under in a table: its role, else its own name, all experts as one."""
    return roles.role(linear) or re.sub(r"\.\d+\.", ".*.", linear)


def chosen(func: str, directory: Path) -> Callable[[str], bool]:
    """Which linears of a checkpoint `func` stands for, found out from their names before any is read.

    Raises
    ------
    UsageError
        The checkpoint has none.
    """
    names = {name for block in inspection.linear_names(directory).values() for name in block}
    wanted = {name for name in names if _stands_for(func, name)}
    if not wanted:
        labels = ordered({label(name) for name in names})
        groups = [group for group in GROUPS if any(roles.group(name) == group for name in names)]
        stranger = unknown("linear", func, [*labels, *groups, *EVERYTHING])
        raise type(stranger)(f"{stranger.message} in {directory}", stranger.hint)
    return wanted.__contains__


def _stands_for(func: str, name: str) -> bool:
    if func in EVERYTHING:
        return True
    return roles.group(name) == func if func in GROUPS else func in (label(name), name)


def ordered(labels: set[str]) -> list[str]:
    """Labels in the order of the paper's table, own names after them."""
    known = list(roles.ROLES)
    return sorted(labels, key=lambda each: (known.index(each) if each in known else len(known), each))


def blocks(directory: Path, request: SimulationRequest, wanted: Callable[[str], bool]) -> Iterator[BlockCost]:
    """Simulate one block after the other; no more than one is in memory.

    Parameters
    ----------
    wanted : callable
        As from `chosen`.
    """
    for block in inspection.matrices(directory, wanted):
        masks = {name: _mask(weight) for name, weight in block.weights.items()}
        linears = []
        for name, mask in masks.items():
            counted = workload.of_mask(mask, roles.role(name))
            linears.append(
                LinearCost(
                    block=block.index,
                    name=name,
                    label=label(name),
                    workload=counted,
                    costs=costs(counted, request),
                )
            )
        yield BlockCost(index=block.index, linears=tuple(linears), mlps=tuple(_mlps(block, masks, request)))


def costs(counted: Workload, request: SimulationRequest) -> dict[str, Cost]:
    """What a linear costs under each of the dataflows asked for."""
    found: dict[str, Cost] = {}
    for name in request.dataflows:
        found[name] = sim.dataflow(name).simulate(counted, request.accelerator, request.settings)
    return found


def _mask(tensor: Tensor) -> Mask:
    mask: Mask = (tensor != 0).numpy()
    return mask


def _mlps(block: BlockMatrices, masks: Mapping[str, Mask], request: SimulationRequest) -> Iterator[MlpCost]:
    """The dead neurons of every MLP of a block whose linears are all there."""
    below: dict[str, dict[str, str]] = {}
    for name in masks:
        role = roles.role(name)
        if role in _MLP:
            below.setdefault(name.rpartition(".")[0], {})[role] = name
    for place, names in below.items():
        own = {role: masks[name] for role, name in names.items()}
        biases = {role: _mask(block.biases[name]) for role, name in names.items() if name in block.biases}
        halves = _halves(own, biases)
        if halves is None:
            continue
        silent = dead.find(halves, own["down"])
        nothing = dict.fromkeys(request.dataflows, 0)
        yield MlpCost(
            block=block.index,
            name=place,
            dead=dead.count(own, silent),
            cycles=_saved(own, dead.without(own, silent), request) if silent.any() else nothing,
        )


def _halves(own: Mapping[str, Mask], biases: Mapping[str, Mask]) -> list[tuple[Mask, Mask | None]] | None:
    """The masks with a row for each neuron (gate and up, up alone, or both in one), or None where this is no MLP."""
    if "down" not in own:
        return None
    neurons = own["down"].shape[1]
    found: list[tuple[Mask, Mask | None]] = []
    for role in ("gate", "up", "gate_up"):
        if role not in own:
            continue
        bias, rows = biases.get(role), len(own[role])
        if rows not in (neurons, 2 * neurons if role == "gate_up" else neurons):
            return None
        found += [
            (own[role][start : start + neurons], None if bias is None else bias[start : start + neurons])
            for start in range(0, rows, neurons)
        ]
    return found or None


def _saved(before: Mapping[str, Mask], after: Mapping[str, Mask], request: SimulationRequest) -> dict[str, int]:
    def cycles(masks: Mapping[str, Mask]) -> dict[str, int]:
        found = [costs(workload.of_mask(mask, role), request) for role, mask in masks.items()]
        return {name: sum(each[name].cycles for each in found) for name in request.dataflows}

    with_them, left = cycles(before), cycles(after)
    return {name: with_them[name] - left[name] for name in request.dataflows}


def summaries(found: Sequence[BlockCost], dataflow: str) -> dict[str, Summary]:
    """Label → the mean over blocks under one dataflow, in the order of the paper's table; ``all`` last."""
    linears = [linear for block in found for linear in block.linears]
    labels = ordered({linear.label for linear in linears})
    groups = {name: [linear for linear in linears if linear.label == name] for name in labels}
    groups["all"] = linears
    return {
        name: summarize(
            [(linear.workload, linear.costs[dataflow]) for linear in group], len({each.block for each in group})
        )
        for name, group in groups.items()
    }
