"""Free memory, and a check that a whole model fits into it."""

from pathlib import Path

import torch

from besa_cli.decoder import architecture

_ROOM = 1.2  # factor on the weights' bytes that leaves room for a pass over a few requests
_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")  # limit of a container


def fits(directory: Path, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether all weights of a checkpoint, in the compute dtype, fit into memory at the same time."""
    return weights(directory, dtype) * _ROOM < available(device)


def weights(directory: Path, dtype: torch.dtype) -> int:
    """Return the bytes of all weights in the compute dtype; shared weights count once."""
    model = architecture.skeleton(architecture.config_of(directory), dtype)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def available(device: torch.device) -> int:
    """Return the free bytes on the GPU or in main memory, within the limit of the container if there is one."""
    import psutil

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        return min(free, int(_LIMIT.read_text()) - int(_USED.read_text()))
    except (OSError, ValueError):  # not in a container, or in one without a limit
        return free
