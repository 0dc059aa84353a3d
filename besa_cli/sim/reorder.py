"""Which columns are denser, and the order that brings them to the front (ViTCoD's reordering)."""

import numpy as np
from numpy.typing import NDArray

from besa_cli.sim.workload import Counts


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
