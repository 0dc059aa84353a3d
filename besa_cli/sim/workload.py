"""One linear as a simulator sees it: its shape, and how many weights each row and each column keeps.

No dataflow here asks *which* weights of a row are kept, so nothing depends on the order of rows or columns but the
tiles that rows are taken in. One pass over the mask gives all there is to know.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """A linear's mask, counted.

    Attributes
    ----------
    kept_by_row : int array of shape (rows,)
        Weights that are not zero in each row (output feature).
    kept_by_column : int array of shape (cols,)
        The same in each column (input feature).
    role : str or None
        What the linear is for (`roles.role`); the released program treats ``down`` in its own way.
    """

    kept_by_row: Counts
    kept_by_column: Counts
    role: str | None = None

    @property
    def rows(self) -> int:
        """Output features."""
        return len(self.kept_by_row)

    @property
    def cols(self) -> int:
        """Input features."""
        return len(self.kept_by_column)

    @property
    def weights(self) -> int:
        """Weights, zero or not."""
        return self.rows * self.cols

    @property
    def kept(self) -> int:
        """Weights that are not zero."""
        return int(self.kept_by_row.sum())

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.kept / self.weights if self.weights else 0.0


def of_mask(mask: Mask, role: str | None = None) -> Workload:
    """The workload of a mask of shape (rows, cols), true = kept."""
    return Workload(
        kept_by_row=np.count_nonzero(mask, axis=1).astype(np.int64),
        kept_by_column=np.count_nonzero(mask, axis=0).astype(np.int64),
        role=role,
    )
