"""Description of this machine: processor, cores, threads, instructions of the packed kernels."""

import os
import platform
from pathlib import Path

import torch

from besa_cli.ops.kernels import native_tiles
from besa_cli.system.disk import JsonObject

_CPU_INFO = Path("/proc/cpuinfo")


def describe() -> JsonObject:
    """Return processor, logical cores, threads of torch, level of the packed kernels, and versions."""
    import transformers

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": native_tiles.level(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor() -> str:
    """Return the name of the processor, or its architecture where the system does not tell."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
