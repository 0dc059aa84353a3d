"""The memory of `besa prune` does not grow with the number of blocks (`benchmarks/bench_memory.py` at full size)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = ["--hidden", "512", "--intermediate", "2048", "--method", "wanda", "--blocks", "2", "6"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_four_more_blocks_cost_less_than_one() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_memory.py"), *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    few, many, growth = map(json.loads, done.stdout.splitlines())
    assert (few["blocks"], many["blocks"]) == (2, 6)
    assert few["above_imports_mb"] > few["block_mb"] > 16  # what is measured is really there
    assert growth["of_a_block"] < 1, done.stdout  # blocks as small as these: the heap's noise is half of one
