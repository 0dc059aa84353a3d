"""Where and in which dtype to compute, and what `auto` stands for on this machine."""

import ctypes
import time

import torch

from besa_cli.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_FASTER = 1.3  # bf16 products have to be this much faster than fp32 ones to be worth their rounding


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
    """The dtype for ``--dtype``; auto is bfloat16 where its products are clearly faster, else float32."""
    if name != "auto":
        return DTYPES[name]
    if on.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _seconds(torch.float32) > _FASTER * _seconds(torch.bfloat16) else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library can: glibc.

    It keeps freed tensors of up to 32 MB in its heap, and the holes there grow with every block.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)


def _seconds(dtype: torch.dtype) -> float:
    """The fastest of a few matrix products, after one to warm up."""
    left, right = torch.ones(512, 768, dtype=dtype), torch.ones(768, 768, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        times.append(time.perf_counter() - start)
    return min(times[1:])
