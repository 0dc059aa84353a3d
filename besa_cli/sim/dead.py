"""Dead neurons: neurons of an MLP that can be removed without changing its output.

Neuron i of an MLP is row i of gate and up, and column i of down. It does not contribute to the output if its column of
down is all zeros, or if its row of gate or up is all zeros and has no bias (the activation of zero is zero). Its
removal needs no sparse format.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from besa_cli.sim.workload import Mask


@dataclass(frozen=True, kw_only=True)
class DeadNeurons:
    """Counts of the dead neurons of one MLP.

    Attributes
    ----------
    neurons, dead : int
        Number of neurons, and of dead ones.
    weights : int
        Weights of the dead neurons, zero or not.
    kept : int
        Nonzero weights of the dead neurons, which are stored and multiplied without effect.
    """

    neurons: int
    dead: int
    weights: int
    kept: int


def find(rows: Sequence[tuple[Mask, Mask | None]], down: Mask) -> Mask:
    """Find the dead neurons of an MLP; returns a boolean array of shape (neurons,).

    Parameters
    ----------
    rows : sequence of (mask, bias)
        For gate and up (or up alone): the mask of shape (neurons, cols), and a boolean array of the nonzero biases of
        shape (neurons,), or None without a bias.
    down : boolean array of shape (rows, neurons)
        The mask of down.
    """
    dead: Mask = np.count_nonzero(down, axis=0) == 0
    for mask, bias in rows:
        silent: Mask = np.count_nonzero(mask, axis=1) == 0
        dead |= silent if bias is None else silent & ~bias
    return dead


def without(masks: Mapping[str, Mask], dead: Mask) -> dict[str, Mask]:
    """Return the masks of an MLP by role (``gate``, ``up``, ``gate_up``, ``down``) without its dead neurons."""
    alive = ~dead
    return {role: _cut(role, mask, alive) for role, mask in masks.items()}


def count(masks: Mapping[str, Mask], dead: Mask) -> DeadNeurons:
    """Count the dead neurons of an MLP, and their weights, from its masks by role."""
    alive = without(masks, dead)
    return DeadNeurons(
        neurons=len(dead),
        dead=int(dead.sum()),
        weights=sum(masks[role].size - alive[role].size for role in masks),
        kept=sum(int(np.count_nonzero(masks[role]) - np.count_nonzero(alive[role])) for role in masks),
    )


def _cut(role: str, mask: Mask, alive: Mask) -> Mask:
    if role == "down":
        return mask[:, alive]
    return mask[np.tile(alive, 2) if role == "gate_up" else alive]
