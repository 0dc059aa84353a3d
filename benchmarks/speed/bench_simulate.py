"""How long does simulating take, and does it grow with the number of weights alone?

    python -m benchmarks.speed.bench_simulate                # one mask of LLaMA-7B's down, and masks of growing size
    python -m benchmarks.speed.bench_simulate --model DIR    # all linears of a checkpoint as well, reading included

Prints one JSON line a case; seconds are those of the process's own CPU time beside those of the clock, best of five.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from besa_cli import sim
from besa_cli.sim import accelerator
from besa_cli.sim.cost import SimulationSettings
from besa_cli.sim.workload import of_mask

MACHINE = accelerator.load("besa")
DOWN = (4096, 11008)


def main() -> None:
    """Run every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint with zeros in it")
    model = parser.parse_args().model
    for rows, cols in (DOWN, *((512 << step, 11008) for step in range(5))):
        mask = np.random.default_rng(0).random((rows, cols), dtype=np.float32) < 0.5
        seconds, cpu = best(partial(simulate, mask))
        each = {"nanoseconds_a_weight": round(1e9 * cpu / mask.size, 3)}
        report("mask", rows=rows, cols=cols, seconds=seconds, cpu_seconds=cpu, **each)
    if model is not None:
        counts: list[int] = []
        seconds, cpu = best(lambda: counts.append(whole(model)))
        report("checkpoint", linears=counts[-1], seconds=seconds, cpu_seconds=cpu)


def simulate(mask: np.ndarray) -> None:
    """All dataflows on one mask, from the booleans on."""
    counted = of_mask(mask, "down")
    for name in sim.DATAFLOWS:
        sim.dataflow(name).simulate(counted, MACHINE, SimulationSettings(search=True))


def whole(model: Path) -> int:
    """All dataflows on all linears of a checkpoint; gives their number."""
    from besa_cli.simulation.run import SimulationRequest, blocks

    request = SimulationRequest(
        func="model", dataflows=tuple(sim.DATAFLOWS), accelerator=MACHINE, settings=SimulationSettings()
    )
    return sum(len(block.linears) for block in blocks(model, request, lambda name: True))


def best(work: Callable[[], object]) -> tuple[float, float]:
    """The fewest seconds of five, by the clock and of the processor."""
    taken = []
    for _ in range(5):
        clock, cpu = time.perf_counter(), time.process_time()
        work()
        taken.append((time.perf_counter() - clock, time.process_time() - cpu))
    return min(clock for clock, _ in taken), min(cpu for _, cpu in taken)


def report(case: str, **facts: float) -> None:
    """One JSON line."""
    print(json.dumps({"case": case, **{name: round(value, 4) for name, value in facts.items()}}), flush=True)


if __name__ == "__main__":
    main()
