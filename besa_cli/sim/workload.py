"""Workload of a simulator: the shape of one linear, and the number of weights kept in each row and each column.

No dataflow depends on *which* weights of a row are kept. The order of rows matters only for the tiles of the roofline,
the order of columns only for the patches of ``vitcod-released``. One pass over the mask computes all counts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """Counts of a linear's mask.

    Attributes
    ----------
    kept_by_row : int array of shape (rows,)
        Nonzero weights in each row (output feature).
    kept_by_column : int array of shape (cols,)
        Nonzero weights in each column (input feature).
    role : str or None
        The role of the linear (`roles.role`); the released program treats ``down`` differently.
    """

    kept_by_row: Counts
    kept_by_column: Counts
    role: str | None = None

    @property
    def rows(self) -> int:
        """Number of output features."""
        return len(self.kept_by_row)

    @property
    def cols(self) -> int:
        """Number of input features."""
        return len(self.kept_by_column)

    @property
    def weights(self) -> int:
        """Number of weights, zero or not."""
        return self.rows * self.cols

    @property
    def kept(self) -> int:
        """Number of nonzero weights."""
        return int(self.kept_by_row.sum())

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.kept / self.weights if self.weights else 0.0


def of_mask(mask: Mask, role: str | None = None) -> Workload:
    """Count a mask of shape (rows, cols), True = kept."""
    return Workload(
        kept_by_row=np.count_nonzero(mask, axis=1).astype(np.int64),
        kept_by_column=np.count_nonzero(mask, axis=0).astype(np.int64),
        role=role,
    )
