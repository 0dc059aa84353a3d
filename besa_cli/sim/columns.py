"""Columns by density: ViTCoD's reordering, and the threshold search of BESA's released program."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from besa_cli.sim.cost import Split
from besa_cli.sim.workload import Counts

_TRIES = 5
_STEP = 0.1
_FEW, _MANY = 0.4, 0.6  # the search ends when the denser columns hold a share of the kept weights between these


def denser(kept_by_column: Counts, rows: int, threshold: float) -> NDArray[np.bool_]:
    """Return a boolean array of shape (cols,): True for columns that keep more than `threshold` of their rows."""
    is_denser: NDArray[np.bool_] = kept_by_column > threshold * rows
    return is_denser


def relabelling(kept_by_column: Counts, rows: int, threshold: float) -> NDArray[np.intp]:
    """Return the permutation that puts denser columns first, each part in its old order; shape (cols,).

    Element i is the old index of the column at the new index i. (The released program swaps columns with 200 as a
    temporary index, which is free among ViTCoD's 197 tokens but not among a linear's columns: two columns are merged.)
    """
    return np.argsort(~denser(kept_by_column, rows, threshold), kind="stable")


def searched(split: Callable[[float], Split], kept: int, start: float) -> Split:
    """Search the threshold as the released program does and return the split with the fewest cycles.

    Parameters
    ----------
    split : callable
        Threshold → split.
    kept : int
        Kept weights of the linear.
    start : float
        The first threshold to try.
    """
    threshold, splits = start, []
    for _ in range(_TRIES):
        splits.append(split(threshold))
        share = splits[-1].kept / kept if kept else 0.5
        if _FEW < share < _MANY:
            break
        threshold += _STEP if share >= _MANY else -_STEP
    return min(splits, key=lambda candidate: candidate.slower)
