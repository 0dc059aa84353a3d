"""How fast is a pruned matrix times one vector, beside torch's dense product and beside our own dense kernel?

    python -m benchmarks.speed.bench_matvec --record
    python -m benchmarks.speed.bench_matvec --bits 4 --shape 4096 11008 --record

One thread, bf16. For every shape and sparsity the products are called in turns, each turn on another of several
matrices so that none stays in the cache, and their medians are compared. Seconds are those of the thread's own
processor time, so that other programs on the same core count little; those on other cores still take memory bandwidth
away. The dense matrices are in large pages of memory, as the packed ones are. `--vectors` measures batches instead:
there the dense product is torch's alone. `--bits` measures codes of 8 or 4 bits in groups of 128 in place of bf16
values: there `dense` is our kernel for all codes without a mask, and torch multiplies bf16.

`read` is the bandwidth at which the thread sums a large array of integers: about the most that a core reads. The level
of the kernels is the best there is, or that of ``BESA_INSTRUCTIONS``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.shared.besa_runs import RESULTS, append_line, commit, machine, read_lines
from besa_cli.ops import affine
from besa_cli.ops.affine import Grid
from besa_cli.ops.kernels import native_tiles
from besa_cli.runtime import matrix
from besa_cli.runtime.matrix import PackedMatrix

FILE = RESULTS / "bench_matvec.jsonl"
SHAPES = ((4096, 11008), (11008, 4096), (4096, 4096))
SPARSITIES = (0.5, 0.6, 0.7)
_TURNED = 96 << 20  # bytes of dense matrices in turn: three times the last cache

Job = Callable[[int], object]


def in_large_pages(tensor: Tensor) -> Tensor:
    """A copy in the memory that packed matrices use."""
    return matrix.huge_pages(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def pruned(dense: Tensor, sparsity: float) -> PackedMatrix:
    """The matrix with random weights removed."""
    keep = torch.rand(dense.shape) >= sparsity
    return matrix.pack(keep, dense[keep])


def coded(dense: Tensor, sparsity: float, bits: int) -> PackedMatrix:
    """The matrix rounded to codes, with random weights removed."""
    codes = affine.nearest(dense, Grid(bits=bits))
    return matrix.pack_codes(affine.pruned(codes, torch.rand(dense.shape) >= sparsity), torch.bfloat16)


def code_jobs(rows: int, cols: int, bits: int) -> tuple[dict[str, Job], dict[str, float]]:
    """What is called in turns with codes, and how many bytes each reads."""
    count = -(-_TURNED // (bits * rows * cols // 8))
    weight = in_large_pages(torch.randn(rows, cols).bfloat16())
    whole = in_large_pages(torch.randint(9, (rows * cols // 4,)))
    inputs = torch.randn(1, cols).bfloat16()
    called: dict[str, Job] = {
        "read": lambda turn: whole.sum(),
        "torch": lambda turn: torch.nn.functional.linear(inputs, weight),
    }
    sizes = dict.fromkeys(called, float(2 * rows * cols))
    for name, sparsity in {"dense": 0.0, **{f"sparse {sparsity}": sparsity for sparsity in SPARSITIES}}.items():
        packed = [coded(weight, sparsity, bits) for _ in range(count)]
        called[name] = lambda turn, packed=packed: packed[turn % count].multiply(inputs)  # type: ignore[misc]
        sizes[name] = float(packed[0].data.nbytes)
    return called, sizes


def jobs(rows: int, cols: int, vectors: int) -> tuple[dict[str, Job], dict[str, float]]:
    """What is called in turns, and how many bytes each reads."""
    count = -(-_TURNED // (2 * rows * cols))
    dense = [in_large_pages(torch.randn(rows, cols).bfloat16()) for _ in range(count)]
    whole = in_large_pages(torch.randint(9, (rows * cols // 4,)))
    inputs = torch.randn(vectors, cols).bfloat16()
    called: dict[str, Job] = {
        "read": lambda turn: whole.sum(),
        "torch": lambda turn: torch.nn.functional.linear(inputs, dense[turn % count]),
    }
    if vectors == 1:
        called["dense"] = lambda turn: native_tiles.multiply_dense(dense[turn % count], inputs)
    sizes = dict.fromkeys(called, float(2 * rows * cols))
    for sparsity in SPARSITIES:
        packed = [pruned(weight, sparsity) for weight in dense]
        called[f"sparse {sparsity}"] = lambda turn, packed=packed: packed[turn % count].multiply(inputs)  # type: ignore[misc]
        sizes[f"sparse {sparsity}"] = float(packed[0].data.nbytes)
    return called, sizes


def medians(called: Mapping[str, Job], turns: int) -> dict[str, float]:
    """Median seconds of each job, called one after the other in every turn; the first turn does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in called}
    for turn in range(turns + 1):
        for name, job in called.items():
            start = time.thread_time()
            job(turn)
            seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def table() -> str:
    """How many times as fast the newest line of every matrix of one vector is, in Markdown."""
    lines = {(line["bits"], line["rows"], line["cols"]): line for line in read_lines(FILE) if line["vectors"] == 1}
    compared = [(share, other) for other in ("dense", "torch") for share in (SPARSITIES[0], SPARSITIES[-1])]
    titles = {"dense": "our dense kernel", "torch": "torch in bf16"}
    header = [f"{share:.0%} as {titles[other]}".replace("%", " %") for share, other in compared]
    rows = [f"| values | matrix | {' | '.join(header)} |", "|---" * (2 + len(header)) + "|"]
    for (bits, height, width), line in sorted(lines.items(), reverse=True):
        times = [f"× {line['times_as_fast'][f'sparse {share} as {other}']:.2f}" for share, other in compared]
        title = "bf16" if bits == 16 else f"codes of {bits} bits"
        rows.append(f"| {title} | {height:,} × {width:,} | {' | '.join(times)} |")
    levels = sorted({line["level"] for line in lines.values()})
    commits = sorted({line["commit"] for line in lines.values()})
    return "\n".join(rows) + f"\n\nOne thread, one vector, level {', '.join(levels)}; commits {', '.join(commits)}."


def main(words: list[str] | None = None) -> None:
    """Measure, print, and with --record keep the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--vectors", type=int, default=1)
    parser.add_argument("--bits", type=int, default=16, choices=(16, 8, 4))
    parser.add_argument("--shape", type=int, nargs=2, help="rows and columns of one matrix in place of the three")
    parser.add_argument("--record", action="store_true", help=f"add the lines to {FILE.name}")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.bits != 16 and options.vectors != 1:
        parser.error("--bits is measured with one vector")
    for rows, cols in [options.shape] if options.shape else SHAPES:
        called, sizes = jobs(rows, cols, options.vectors) if options.bits == 16 else code_jobs(rows, cols, options.bits)
        seconds = medians(called, options.turns)
        line = {
            "rows": rows,
            "cols": cols,
            "bits": options.bits,
            "vectors": options.vectors,
            "level": native_tiles.level(),
            "turns": options.turns,
            "microseconds": {name: round(1e6 * value, 1) for name, value in seconds.items()},
            "gigabytes_per_second": {name: round(sizes[name] / value / 1e9, 1) for name, value in seconds.items()},
            "machine": machine(),
            "torch": torch.__version__,
            "commit": commit(),
            "methods": {},  # the weights are random
        }
        line["times_as_fast"] = {
            f"{name} as {other}": round(seconds[other] / seconds[name], 2)
            for name in seconds
            if name.startswith("sparse")
            for other in ("torch", "dense")
            if other in seconds
        }
        print(json.dumps(line))
        if options.record:
            append_line(FILE, line)


if __name__ == "__main__":
    main()
