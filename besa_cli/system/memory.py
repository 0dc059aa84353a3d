"""Free memory."""

from pathlib import Path

import torch

_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")  # limit of a container


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
