"""File with the state of the learning of the whole model, beside the blocks that it starts from."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from besa_cli.checkpoint import weights
from besa_cli.errors import BesaError
from besa_cli.system import disk

_DIGEST = "digest"


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
        if not self._path.exists():
            return None
        tensors = weights.read_file(self._path)
        digest = tensors.pop(_DIGEST, None)
        if digest is None or not torch.equal(digest, _digest(tensors)):
            raise BesaError(
                f"{self._path} is damaged: it does not hold what was written",
                "delete it; the same command then learns from the start of the passes again",
            )
        return tensors

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the stored tensors."""
        whole = {**tensors, _DIGEST: _digest(tensors)}
        disk.publish(self._path, lambda temporary: disk.save_tensors(temporary, whole))


def _digest(tensors: Mapping[str, Tensor]) -> Tensor:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        found.update(tensors[name].contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)
