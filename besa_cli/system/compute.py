"""Device and dtype of computation, the meaning of `auto` on this machine, and the memory of the process."""

import contextlib
import ctypes
import functools
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import torch

from besa_cli.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PRIMITIVES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"  # compiled products that oneDNN keeps
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_DEFAULT_TRIM = 128 << 10  # bytes; glibc's default trim threshold
_passes_repeated: ContextVar[bool] = ContextVar("repeated_passes", default=False)
_LARGE, _HUGE = 4 << 20, 32 << 20  # bytes; mmap thresholds: default, and in repeated passes


def device(name: str) -> torch.device:
    """Return the device for ``--device auto|cpu|cuda``.

    Raises
    ------
    UsageError
        CUDA is requested but not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has no CUDA device that torch can use", "omit the option")
    return torch.device(name)


def dtype(name: str, on: torch.device) -> torch.dtype:
    """Return the dtype for ``--dtype``; auto is bfloat16 if the hardware multiplies bfloat16, else float32.

    The result depends on the machine alone, never on its load.
    """
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if _multiplies_bfloat16(on) else torch.float32


def dtype_reason(name: str, on: torch.device) -> str:
    """Explain the choice of `dtype` in a few words."""
    if name != "auto":
        return "asked for"
    machine = "GPU" if on.type == "cuda" else "processor"
    return f"the {machine} {'multiplies' if _multiplies_bfloat16(on) else 'does not multiply'} bfloat16 in hardware"


def _multiplies_bfloat16(on: torch.device) -> bool:
    """Check that the hardware has bfloat16 multiply instructions and torch's library uses them."""
    if on.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported())  # every processor with AMX has these too
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def overlaps(device: torch.device) -> bool:
    """Check that reading and writing blocks can overlap with computing: not if all of them need the CPU."""
    return device.type == "cuda"


def name_of(dtype: torch.dtype) -> str:
    """Return the short name of a dtype, e.g. ``float32`` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def map_large_tensors() -> None:
    """Make glibc map every tensor of 4 MiB or more separately, and unmap it when it is freed.

    By default glibc keeps freed tensors of up to 32 MB in its heap, whose fragmentation grows block by block. Below 4
    MiB the heap is faster. Has no effect with another C library.
    """
    library = _c_library()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, _LARGE)


def bound_primitives() -> None:
    """Let oneDNN keep fewer compiled products than its 1,024, unless the environment says how many.

    Products in bf16 are compiled for each shape. In a mixture of experts each expert meets another number of tokens in
    each pass, and what is kept of them took hundreds of MB. Changes no result; call it before the first product.
    """
    os.environ.setdefault(PRIMITIVES, "128")


@contextlib.contextmanager
def repeated_passes() -> Iterator[None]:
    """Keep freed memory for the next tensor within this context, and return it to the system at the end.

    The passes over a block allocate the same tensors again and again; mapping them each time cost a third of a pass in
    page faults. Tensors beyond 32 MiB (the gradient of a linear of a 7B model has 172) are still mapped separately:
    their computation outweighs the faults, and in the heap they would leave holes that smaller tensors fragment.
    Allocate nothing in here that outlives it. Has no effect without glibc, or within itself.
    """
    library = _c_library()
    if library is None or _passes_repeated.get():
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _HUGE)
    library.mallopt(_TRIM_THRESHOLD, 1 << 30)
    inside = _passes_repeated.set(True)
    try:
        yield
    finally:
        _passes_repeated.reset(inside)
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM)
        library.malloc_trim(0)


def give_back_memory() -> None:
    """Return the heap's free pages to the system, if the C library is glibc."""
    library = _c_library()
    if library is not None:
        library.malloc_trim(0)


def age() -> float:
    """Return the seconds since this process began, imports included; its CPU time if the system does not tell."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return time.process_time()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


def resident() -> int:
    """Return the resident memory of this process in bytes; its peak if the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_resident()
    return pages * resource.getpagesize()


def peak_resident() -> int:
    """Return the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory() -> int:
    """Return the peak resident memory of the process in bytes, or the peak of the CUDA device if that is larger."""
    return max(peak_resident(), torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


@functools.cache
def _c_library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
