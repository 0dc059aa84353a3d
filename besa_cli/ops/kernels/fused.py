"""The inner loops of learning as Triton kernels (`triton_loops.py`), for tensors on CUDA devices.

Triton is part of the CUDA builds of torch. With ``TRITON_INTERPRET=1`` in the environment it also runs on the CPU,
slowly: so the kernels are tested without a GPU. All functions return None for tensors that Triton does not support.
"""

import os
import subprocess
from functools import cache

import torch
from torch import Tensor

_DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.int32}
_WIDTH = 1024  # columns per program
_TILE = 2048  # numbers that a program sums at a time
_CHUNK = 1 << 24  # products in rank order in memory at a time: 64 MiB


@cache
def available(device: torch.device) -> bool:
    """Check that Triton works for this device: it needs a C compiler, a writable cache, and a supported GPU."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        import triton
    except ImportError:
        return False
    weight, kept = torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device)
    try:
        _mask(weight, weight.short().sub_(1), weight[0].int().sub_(1), kept)
    except (OSError, RuntimeError, subprocess.SubprocessError, triton.TritonError):
        return False
    return torch.equal(weight, kept)


def mask(weight: Tensor, ranks: Tensor, counts: Tensor, out: Tensor) -> Tensor | None:
    """Run the Triton kernel of `besa_cli.ops.kernels.mask`."""
    if not _supported(weight, ranks, out):
        return None
    _mask(weight, ranks, counts.to(torch.int32).contiguous(), out)
    return out


def candidate_sums(gradient: Tensor, weight: Tensor, ranks: Tensor, count: int, floored: bool = False) -> Tensor | None:
    """Run the Triton kernels of `besa_cli.ops.kernels.candidate_sums`, in chunks of rows."""
    if not _supported(gradient, weight, ranks):
        return None
    rows, cols = weight.shape
    result = torch.empty(rows, count + 1, device=weight.device)
    step = max(_CHUNK // cols, 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        _sums(gradient[part], weight[part], ranks[part], result[part], floored)
    return result


def _supported(*tensors: Tensor) -> bool:
    device = tensors[0].device
    supported = all(
        tensor.device == device and tensor.is_contiguous() and tensor.dtype in _DTYPES for tensor in tensors
    )
    return supported and available(device)


def _mask(weight: Tensor, ranks: Tensor, counts: Tensor, out: Tensor) -> None:
    _launch("mask", _grid(weight), weight, ranks, counts, out, weight.shape[1], WIDTH=_WIDTH)


def _sums(gradient: Tensor, weight: Tensor, ranks: Tensor, out: Tensor, floored: bool) -> None:
    (rows, cols), count = weight.shape, out.shape[1] - 1
    longest, offset = -(-cols // count), 0 if floored else count - 1
    height = _power_of_2(count + 1)
    width = min(max(_TILE // height, 1), _power_of_2(longest))
    ranked = torch.empty(rows, cols, device=weight.device)
    _launch("products", _grid(weight), gradient, weight, ranks, ranked, cols, WIDTH=_WIDTH)
    _launch("sums", (rows,), ranked, out, cols, count, offset, longest, CANDIDATES=height, WIDTH=width)


def _launch(name: str, grid: tuple[int, ...], first: Tensor, *others: Tensor | int, **sizes: int) -> None:
    from besa_cli.ops.kernels import triton_loops

    with torch.cuda.device(first.get_device()):
        getattr(triton_loops, name)[grid](first, *others, **sizes, enable_fp_fusion=False)


def _grid(weight: Tensor) -> tuple[int, int]:
    rows, cols = weight.shape
    return rows, -(-cols // _WIDTH)


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()
