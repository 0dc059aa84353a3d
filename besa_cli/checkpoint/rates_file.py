"""File with the state of the learning of the whole model, beside the blocks that it starts from."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from besa_cli.checkpoint import sealed


class RatesFile:
    """State of the learning between two steps, see `besa_cli.stream.global_rates`; written atomically.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Tensor] | None:
        """Return the tensors that were written last; None if there are none.

        Raises
        ------
        BesaError
            The file is damaged.
        """
        remedy = "delete it; the same command then learns from the start of the passes again"
        return sealed.read(self._path, remedy) or None

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the stored tensors."""
        sealed.write(self._path, tensors)
