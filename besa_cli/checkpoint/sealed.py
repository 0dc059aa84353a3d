"""Files of tensors that carry their own digest: states that an unfinished stage is resumed from."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from besa_cli.checkpoint import weights
from besa_cli.errors import BesaError
from besa_cli.system import disk

_DIGEST = "digest"


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with the digest of all, atomically."""
    digest = torch.frombuffer(bytearray.fromhex(weights.digest(tensors)), dtype=torch.uint8)
    disk.publish(path, lambda temporary: disk.save_tensors(temporary, {**tensors, _DIGEST: digest}))


def read(path: Path, remedy: str) -> dict[str, Tensor]:
    """Read the tensors that were written last; empty if there is no file.

    Raises
    ------
    BesaError
        The file is damaged; `remedy` is its hint.
    """
    if not path.exists():
        return {}
    tensors = weights.read_file(path)
    digest = tensors.pop(_DIGEST, None)
    if digest is None or bytes(digest.tolist()).hex() != weights.digest(tensors):
        raise BesaError(f"{path} is damaged: it does not hold what was written", remedy)
    return tensors
