"""Dead neurons: what can be removed from an MLP for free.

Neuron i of an MLP is row i of gate and of up, and column i of down. It gives nothing to the block's output if its
column of down is wholly zero, or if its row of gate or up is and has no bias (activations are zero at zero).
Removing it then changes no output, and needs no sparse format.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from besa_cli.sim.workload import Mask


@dataclass(frozen=True, kw_only=True)
class DeadNeurons:
    """The dead neurons of one MLP.

    Attributes
    ----------
    neurons, dead : int
        How many there are, and how many of them are dead.
    weights : int
        Weights, zero or not, that go with the dead ones.
    kept : int
        Those of them that are not zero: they are stored and computed with for nothing.
    """

    neurons: int
    dead: int
    weights: int
    kept: int


def find(rows: Sequence[tuple[Mask, Mask | None]], down: Mask) -> Mask:
    """Which neurons are dead; boolean of shape (neurons,).

    Parameters
    ----------
    rows : sequence of (mask, bias)
        For each of gate and up (or up alone) the mask of shape (neurons, cols), and which biases are not zero, of
        shape (neurons,); None where it has no bias.
    down : boolean array of shape (rows, neurons)
    """
    dead: Mask = np.count_nonzero(down, axis=0) == 0
    for mask, bias in rows:
        silent: Mask = np.count_nonzero(mask, axis=1) == 0
        dead |= silent if bias is None else silent & ~bias
    return dead


def without(masks: Mapping[str, Mask], dead: Mask) -> dict[str, Mask]:
    """The masks of an MLP by role (``gate``, ``up``, ``gate_up``, ``down``) with its dead neurons removed."""
    alive = ~dead
    return {role: _cut(role, mask, alive) for role, mask in masks.items()}


def count(masks: Mapping[str, Mask], dead: Mask) -> DeadNeurons:
    """What goes with the dead neurons of an MLP whose masks are given by role."""
    left = without(masks, dead)
    return DeadNeurons(
        neurons=len(dead),
        dead=int(dead.sum()),
        weights=sum(masks[role].size - left[role].size for role in masks),
        kept=sum(int(np.count_nonzero(masks[role]) - np.count_nonzero(left[role])) for role in masks),
    )


def _cut(role: str, mask: Mask, alive: Mask) -> Mask:
    if role == "down":
        return mask[:, alive]
    return mask[np.tile(alive, 2) if role == "gate_up" else alive]
