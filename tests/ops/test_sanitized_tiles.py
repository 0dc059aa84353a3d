"""The kernels under the address and undefined behaviour sanitizers, with buffers that end where they have to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from besa_cli.ops.kernels import build, native_tiles

PROGRAM = """
import itertools, sys, torch
from pathlib import Path
from besa_cli.ops import affine, packing
from besa_cli.ops.affine import Grid
from besa_cli.ops.kernels import native_tiles
from besa_cli.runtime import matrix as runtime

native_tiles.LIBRARY = Path(sys.argv[1])
runtime.huge_pages = lambda size: torch.zeros(size, dtype=torch.uint8)  # memory that the sanitizer watches to the byte
for name in native_tiles.supported():
    native_tiles.level = lambda name=name: name
    for value in (torch.bfloat16, torch.float16):
        for rows, cols in ((1, 1), (16, 64), (17, 65), (33, 700), (5, 4200)):
            for sparsity in (0.0, 0.5, 1.0):
                matrix = torch.randn(rows, cols).masked_fill(torch.rand(rows, cols) < sparsity, 0.0).to(value)
                mask = packing.stored_mask(matrix)
                starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
                blocks = native_tiles.block_starts(starts, cols)
                tiles = torch.zeros(native_tiles.packed_bytes(blocks), dtype=torch.uint8)
                native_tiles.pack(packing.pack_mask(mask), matrix[mask], starts, blocks, cols, tiles)
                back = torch.empty_like(matrix)
                native_tiles.expand(tiles, blocks, rows, 0, back)
                assert torch.equal(back, matrix)
                for vectors in (1, 3, 32):
                    for dtype in (value, torch.float32):
                        native_tiles.multiply(tiles, blocks, torch.randn(vectors, cols).to(dtype), rows, value)
                native_tiles.multiply_dense(matrix, torch.randn(1, cols).to(value))
            for bits, group, symmetric in itertools.product((4, 8), (None, 32, 64, 128), (True, False)):
                for sparsity in (0.0, 0.6, 1.0):
                    grid = Grid(bits=bits, group_size=group, symmetric=symmetric)
                    codes = affine.nearest(torch.randn(rows, cols), grid)
                    codes = affine.pruned(codes, torch.rand(rows, cols) >= sparsity)
                    packed = runtime.pack_codes(codes, value)
                    assert torch.equal(packed.expand(), affine.dequantize(codes).to(value))
                    for vectors in (1, 3):
                        packed.multiply(torch.randn(vectors, cols).to(value))
    print(name)
"""


def runtime(name: str) -> str:
    """The path of a sanitizer's library; empty where the compiler has none."""
    try:
        command = ["c++", f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found if Path(found).is_absolute() else ""


@pytest.mark.skipif(not runtime("libasan.so"), reason="there is no compiler with sanitizers")
def test_the_kernels_neither_leave_their_buffers_nor_rely_on_undefined_behaviour(tmp_path: Path) -> None:
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1")
    assert build.build_tiles(tmp_path / "tiles.so", flags) == ""
    preloaded = " ".join(filter(None, map(runtime, ("libasan.so", "libubsan.so"))))
    # Python and torch keep memory until the end, and torch's allocator is replaced by the sanitizer's.
    environment = {**os.environ, "LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    environment.pop("BESA_INSTRUCTIONS", None)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "tiles.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(native_tiles.supported())
