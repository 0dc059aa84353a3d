"""Triton kernels of `fused.py`. Importing this imports Triton, so only `fused.py` does, inside a function.

No atomic additions: no two programs write to the same place, and every sum has a fixed order, so that an interrupted
run resumes to the same bytes.
"""

from typing import no_type_check  # mypy and the tests' shape checks do not support Triton

import triton
import triton.language as tl


@triton.jit
@no_type_check
def mask(weight, ranks, counts, out, cols, WIDTH: tl.constexpr):
    """Write `WIDTH` columns of a row: the weight where its rank is not below the row's count, else 0."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = col < cols
    at = row * cols + col
    kept = tl.load(ranks + at, mask=inside, other=0) >= tl.load(counts + row)
    value = tl.load(weight + at, mask=inside, other=0.0).to(out.dtype.element_ty)
    tl.store(out + at, tl.where(kept, value, 0.0), mask=inside)


@triton.jit
@no_type_check
def products(gradient, weight, ranks, out, cols, WIDTH: tl.constexpr):
    """Write gradient·weight of `WIDTH` columns of a row at the place of each rank, which is unique in the row."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = col < cols
    at = row * cols + col
    product = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    product *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * cols + tl.load(ranks + at, mask=inside, other=0), product, mask=inside)


@triton.jit
@no_type_check
def sums(ranked, out, cols, count, offset, longest, CANDIDATES: tl.constexpr, WIDTH: tl.constexpr):
    """Sum one row between successive cuts, then accumulate over the candidates and negate.

    The cuts are ⌊(d·cols + offset)/count⌋, at most `longest` apart. `CANDIDATES` is a power of two above `count`.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, CANDIDATES)
    wanted = d <= count
    start = ((tl.maximum(d - 1, 0).to(tl.int64) * cols + offset) // count).to(tl.int32)
    stop = tl.where(wanted, ((d.to(tl.int64) * cols + offset) // count).to(tl.int32), 0)
    place = start[:, None] + tl.arange(0, WIDTH)[None, :]
    parts = tl.zeros([CANDIDATES, WIDTH], tl.float32)
    for offset in range(0, longest, WIDTH):
        inside = place + offset < stop[:, None]
        parts += tl.load(ranked + row * cols + (place + offset), mask=inside, other=0.0)
    tl.store(out + row * (count + 1) + d, -tl.cumsum(tl.sum(parts, 1), 0), mask=wanted)
