"""Whether a whole model fits into memory, and how much of it there is."""

from pathlib import Path

import torch

from besa_cli.decoder import architecture

_ROOM = 1.2  # of the weights: what a pass over a few requests needs beside them
_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")  # of a container


def fits(directory: Path, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all weights of a checkpoint, in the dtype of computation, can be in memory at a time."""
    return weights(directory, dtype) * _ROOM < available(device)


def weights(directory: Path, dtype: torch.dtype) -> int:
    """Bytes of all weights in the dtype of computation; what is shared counts once."""
    model = architecture.skeleton(architecture.config_of(directory), dtype)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def available(device: torch.device) -> int:
    """Bytes that this process can still take, on the GPU or in main memory (of its container, if that has less)."""
    import psutil

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        return min(free, int(_LIMIT.read_text()) - int(_USED.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return free
