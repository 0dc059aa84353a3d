"""Where and in which dtype to compute, and what `auto` stands for on this machine."""

import contextlib
import ctypes
import functools
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from besa_cli.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_PAGES = 128 << 10  # glibc's own trim threshold
_LARGE, _HUGE = 4 << 20, 32 << 20  # tensors mapped by themselves, and within repeated passes; older glibc takes no more


def device(name: str) -> torch.device:
    """The device for ``--device auto|cpu|cuda``.

    Raises
    ------
    UsageError
        CUDA is asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has no CUDA device that torch can use", "leave the option out")
    return torch.device(name)


def dtype(name: str, on: torch.device) -> torch.dtype:
    """The dtype for ``--dtype``; auto is bfloat16 where the machine has instructions for its products, else float32.

    The same machine always gives the same answer, whatever else it does.
    """
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if _multiplies_bfloat16(on) else torch.float32


def dtype_reason(name: str, on: torch.device) -> str:
    """Why `dtype` chose what it did, in a few words."""
    if name != "auto":
        return "asked for"
    machine = "GPU" if on.type == "cuda" else "processor"
    return f"the {machine} {'multiplies' if _multiplies_bfloat16(on) else 'does not multiply'} bfloat16 in hardware"


def _multiplies_bfloat16(on: torch.device) -> bool:
    """Whether there are instructions for bfloat16 products, and torch's library of them uses them."""
    if on.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported())  # every processor with AMX has these, too
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def overlaps(device: torch.device) -> bool:
    """Whether the next block is read and the last one written beside the computing: not where all need the CPU."""
    return device.type == "cuda"


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def map_large_tensors() -> None:
    """Let glibc map every tensor of 4 MiB or more by itself, and unmap it when it is freed.

    Left alone it keeps freed tensors of up to 32 MB in its heap, where the holes between them grow block after block.
    Below 4 MiB the heap is faster. Does nothing with another C library.
    """
    library = _c_library()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, _LARGE)


@contextlib.contextmanager
def repeated_passes() -> Iterator[None]:
    """Within, freed memory is kept for the next tensor; at the end it goes back to the system.

    The passes over a block ask for the same tensors again and again. Mapped anew each time, they fault on every page:
    that was a third of a pass. Tensors beyond 32 MiB (the gradient of a linear of 7B has 172) are still mapped by
    themselves: so much is computed for each of their numbers that faults hardly count, and a hole that one leaves in
    the heap is cut up by smaller ones, until there are several. Nothing that stays should be made in here. Does nothing
    without glibc.
    """
    library = _c_library()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _HUGE)
    library.mallopt(_TRIM_THRESHOLD, 1 << 30)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_TRIM_THRESHOLD, _PAGES)
        library.malloc_trim(0)


def give_back_memory() -> None:
    """Return the heap's free pages to the system, where the C library is glibc."""
    library = _c_library()
    if library is not None:
        library.malloc_trim(0)


def age() -> float:
    """Seconds since this process began, imports included; its time on the processor where the system does not say."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return time.process_time()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


def resident() -> int:
    """Bytes of this process that are in memory now; the highest so far where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_resident()
    return pages * resource.getpagesize()


def peak_resident() -> int:
    """The most bytes of this process that were in memory at one time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory() -> int:
    """The process's peak resident memory so far, in bytes; on CUDA the device's peak where that is more."""
    return max(peak_resident(), torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


@functools.cache
def _c_library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
