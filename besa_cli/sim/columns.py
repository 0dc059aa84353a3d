"""Columns by density: ViTCoD's reordering, and the threshold search of BESA's released program."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from besa_cli.sim.cost import Split
from besa_cli.sim.workload import Counts

_TRIES = 5
_STEP = 0.1
_FEW, _MANY = 0.4, 0.6  # shares of the kept weights in denser columns between which the search ends


def denser(kept_by_column: Counts, rows: int, threshold: float) -> NDArray[np.bool_]:
    """Which columns keep more than `threshold` of their rows; boolean of shape (cols,)."""
    chosen: NDArray[np.bool_] = kept_by_column > threshold * rows
    return chosen


def relabelling(kept_by_column: Counts, rows: int, threshold: float) -> NDArray[np.intp]:
    """The old number of the column at each new place: denser columns first, each part in its old order.

    It is a permutation at every size. (The released program swaps by way of the column number 200, free among
    ViTCoD's 197 tokens and taken in a linear: there two columns are merged.)
    """
    return np.argsort(~denser(kept_by_column, rows, threshold), kind="stable")


def searched(split: Callable[[float], Split], kept: int, start: float) -> Split:
    """The split with the fewest cycles of those that the moving threshold comes to, `start` the first.

    Parameters
    ----------
    split : callable
        The split at a threshold.
    kept : int
        Kept weights of the linear.
    """
    threshold, tried = start, []
    for _ in range(_TRIES):
        tried.append(split(threshold))
        share = tried[-1].kept / kept if kept else 0.5
        if _FEW < share < _MANY:
            break
        threshold += _STEP if share >= _MANY else -_STEP
    return min(tried, key=lambda each: each.slower)
