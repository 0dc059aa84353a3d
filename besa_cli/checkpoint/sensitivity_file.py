"""Files with the sensitivity of a model's channels, beside the calibration set and in an unfinished stage."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from besa_cli.checkpoint import weights
from besa_cli.errors import BesaError
from besa_cli.system import disk

_VALUES, _DIGEST = "sensitivity", "sha256"
_REMEDY = "delete it: the same command makes it again"


def beside_samples(directory: Path, key: str) -> Path:
    """Return the path in the directory of a calibration set.

    Parameters
    ----------
    directory : Path
    key : str
        Everything that the values depend on.
    """
    return directory / f"sensitivity-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def digest(values: Tensor, key: str) -> str:
    """Return the SHA-256 of the values and of what they depend on."""
    return hashlib.sha256(f"{key} {weights.digest({_VALUES: values})}".encode()).hexdigest()


def write(path: Path, values: Tensor, key: str) -> None:
    """Write values of shape (blocks, hidden), fp32, with their digest."""
    tensors = {_VALUES: values, _DIGEST: torch.tensor(list(bytes.fromhex(digest(values, key))), dtype=torch.uint8)}
    disk.publish(path, lambda temporary: disk.save_tensors(temporary, tensors))


def read(path: Path, key: str, shape: tuple[int, int]) -> Tensor:
    """Read values that were written with the same key.

    Parameters
    ----------
    path : Path
    key : str
    shape : (blocks, hidden)

    Raises
    ------
    BesaError
        The file is damaged, or holds something else.
    """
    try:
        tensors = weights.read_file(path)
    except BesaError as error:
        raise BesaError(error.message, _REMEDY) from error
    values, stored = tensors.get(_VALUES), tensors.get(_DIGEST)
    if values is None or stored is None or tuple(values.shape) != shape or values.dtype != torch.float32:
        raise BesaError(
            f"{path} does not hold the sensitivity of {shape[1]} channels behind {shape[0]} blocks", _REMEDY
        )
    known = stored.dtype == torch.uint8 and len(stored) == 32 and bytes(stored.tolist()).hex() == digest(values, key)
    if not known or not bool(values.isfinite().all()):
        raise BesaError(f"{path} is damaged: it does not hold what was written", _REMEDY)
    return values
