"""Check that a whole model fits into the free memory."""

from pathlib import Path

import torch

from besa_cli.decoder import architecture
from besa_cli.system import memory

_ROOM = 1.2  # factor on the weights' bytes that leaves room for a pass over a few requests


def fits(directory: Path, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether all weights of a checkpoint, in the compute dtype, fit into memory at the same time."""
    return weights(directory, dtype) * _ROOM < memory.available(device)


def weights(directory: Path, dtype: torch.dtype) -> int:
    """Return the bytes of all weights in the compute dtype; shared weights count once."""
    model = architecture.skeleton(architecture.config_of(directory), dtype)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
