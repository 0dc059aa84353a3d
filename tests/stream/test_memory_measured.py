"""The memory of no command grows with the number of blocks (`benchmarks/speed/bench_memory.py` at full size)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from besa_cli.system import compute

ROOT = Path(__file__).parents[2]
CASES = ["prune", "export-sparse", "export-gguf-Q8_0", "import"]
SMALL = ["--hidden", "512", "--intermediate", "2048", "--method", "wanda", "--blocks", "2", "6", "--case", *CASES]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_four_more_blocks_cost_less_than_one(tmp_path: Path) -> None:
    kept = ["--lines", str(tmp_path / "lines.jsonl")]
    command = [sys.executable, "-m", "benchmarks.speed.bench_memory", *SMALL, *kept]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = list(map(json.loads, done.stdout.splitlines()))
    growths = {line["case"]: line["of_a_block"] for line in lines if "of_a_block" in line}
    assert sorted(growths) == sorted(CASES)
    for line in lines:
        if "above_imports_mb" in line:  # what is measured is really there: a block, at least
            assert line["above_imports_mb"] > 16, line
    assert max(growths.values()) < 1, growths  # blocks as small as these: the heap's noise is half of one


def _kept(mebibytes: int) -> float:
    """How much of a tensor of so many MiB the process still holds once it is freed: 0 nothing, 1 all."""
    before = compute.resident()
    tensor = torch.ones(mebibytes << 18)
    grown = compute.resident() - before
    assert grown > 0.9 * (mebibytes << 20)
    del tensor
    return (compute.resident() - before) / grown


@pytest.mark.skipif(not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="of glibc")
def test_holes_of_the_largest_tensors_do_not_stay_in_the_heap() -> None:
    compute.map_large_tensors()
    assert _kept(64) < 0.1
    with compute.repeated_passes():
        assert _kept(64) < 0.1
    assert _kept(64) < 0.1
