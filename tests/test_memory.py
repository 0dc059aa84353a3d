"""The memory of no command grows with the number of blocks (`benchmarks/bench_memory.py` at full size)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = ["--hidden", "256", "--intermediate", "1024", "--method", "wanda", "--blocks", "2", "10", "--case", "all"]
COMMANDS = {"prune": 1, "quantize": 3, "export": 9, "import": 2}  # and in how many ways each is measured


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_eight_more_blocks_cost_less_than_two() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_memory.py"), *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = list(map(json.loads, done.stdout.splitlines()))
    growths = {line["case"]: line for line in lines if "of_a_block" in line}
    assert {name: sum(case.startswith(name) for case in growths) for name in COMMANDS} == COMMANDS
    for line in lines:
        if "above_imports_mb" in line:  # what is measured is really there: a block, at least
            assert line["above_imports_mb"] > 4.2, line
    for case, line in growths.items():
        assert line["block_mb"] == 4.2
        assert line["of_a_block"] < 2, case  # blocks as small as these: the heap's noise may be one
