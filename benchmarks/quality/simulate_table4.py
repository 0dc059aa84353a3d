"""The paper's Table 4 for any model: the same linears under several methods and dataflows.

    python -m benchmarks.quality.simulate_table4 sparsegpt=run-a/pruned wanda=run-b/pruned besa-row=run-c/pruned
    python -m benchmarks.quality.simulate_table4 --llama-7b

The first takes stages of protocol A by the names of its methods: mean cycles over blocks, and the speed-up over the
dense linear under the same dataflow. The second does it for LLaMA-7B's shapes with random masks at the sparsities that
the paper prints for BESA: every weight kept by the same chance, and by the chance of its column, which differs from
column to column. Both add JSON lines to simulate_table4.jsonl, of which `results.py` makes the tables of
docs/simulate.md.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.protocol_a import METHODS
from benchmarks.results import recorded
from benchmarks.shared.besa_runs import RESULTS, append_line, commit, read_lines
from besa_cli.sim import accelerator
from besa_cli.sim.cost import Cost, SimulationSettings
from besa_cli.sim.workload import of_mask
from besa_cli.simulation.run import BlockCost, SimulationRequest, blocks, costs, summaries

Line = Mapping[str, Any]

LINES = RESULTS / "simulate_table4.jsonl"
MACHINE = accelerator.load("besa")
RELEASED = "vitcod-released"
VARIANTS = (  # name, dataflow, with a search
    ("vitcod", "vitcod", False),
    ("vitcod --search", "vitcod", True),
    (RELEASED, RELEASED, False),
    ("roofline", "roofline", False),
)
COLUMNS = (
    ("vitcod", "ViTCoD, threshold 0.5"),
    ("vitcod --search", "ViTCoD, threshold searched"),
    (RELEASED, "released formula"),
    ("roofline", "roofline, batch 1, 8 bits"),
)

# Rows, columns, and the sparsity in percent that the paper's Table 4 prints for BESA.
LLAMA_7B = {
    "q": (4096, 4096, 53.87),
    "k": (4096, 4096, 54.54),
    "v": (4096, 4096, 48.96),
    "o": (4096, 4096, 47.15),
    "gate": (11008, 4096, 50.20),
    "up": (11008, 4096, 50.36),
    "down": (4096, 11008, 46.52),
}
SPREADS = (0.0, 0.1, 0.2, 0.3, 0.4)  # standard deviation of the share that a column keeps


def main() -> None:
    """Simulate what is asked for, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="METHOD=DIR")
    parser.add_argument("--llama-7b", action="store_true")
    given = parser.parse_args()
    for stage in given.stages:
        name, _, place = stage.partition("=")
        if name not in METHODS:
            parser.error(f"{name} is none of {', '.join(METHODS)}")
        keep({"what": "stage", "name": name, **simulated(Path(place))})
    for spread in SPREADS if given.llama_7b else ():
        keep({"what": "random", "spread": spread, "cycles": llama_7b(spread), "methods": {}})


def keep(line: dict[str, Any]) -> None:
    """Print a line and add it to the others."""
    line |= {"commit": commit(), "date": time.strftime("%Y-%m-%d")}
    append_line(LINES, line)
    print(json.dumps(line), flush=True)


def simulated(stage: Path) -> dict[str, Any]:
    """What made a stage, and its cycles under every dataflow, with the threshold fixed and searched for."""
    manifest = json.loads((stage / "besa.json").read_text())
    asked = manifest["options"]
    found: dict[str, Any] = {
        "model": manifest["model"]["digest"],
        "asked": {name: value for name, value in asked.items() if name not in ("model", "calibration")},
        "tokens_digest": manifest["calibration"]["tokens_digest"],
        "dtype": manifest["compute"]["dtype"],
        "methods": recorded.methods(asked["method"]),
        "cycles": {},
    }
    for name, flow, search in VARIANTS:
        request = SimulationRequest(
            func="model", dataflows=(flow,), accelerator=MACHINE, settings=SimulationSettings(search=search)
        )
        made = list(blocks(stage, request, lambda name: True))
        means = summaries(made, flow)
        found["cycles"][name] = {label: [mean.dense_cycles, mean.cycles] for label, mean in means.items()}
        if name == RELEASED:
            found["impossible"] = [sum(map(below, of_role(made, role, flow))) for role in ("gate", "up")]
    found["dead_neurons"] = sum(mlp.dead.dead for block in made for mlp in block.mlps)
    return found


def of_role(made: Sequence[BlockCost], role: str, flow: str) -> list[Cost]:
    """What the linears of one role cost."""
    return [linear.costs[flow] for block in made for linear in block.linears if linear.label == role]


def below(cost: Cost) -> bool:
    """Whether it takes fewer cycles than one multiplication an element and cycle would."""
    return cost.cycles * cost.pes < cost.useful


def llama_7b(spread: float) -> dict[str, dict[str, float]]:
    """Dataflow → role → cycles of one random linear of LLaMA-7B's shape."""
    found: dict[str, dict[str, float]] = {name: {} for name, *_ in VARIANTS}
    for role, (rows, cols, sparsity) in LLAMA_7B.items():
        counted = of_mask(random_mask(rows, cols, 1 - sparsity / 100, spread), role)
        for name, flow, search in VARIANTS:
            request = SimulationRequest(
                func="model", dataflows=(flow,), accelerator=MACHINE, settings=SimulationSettings(search=search)
            )
            found[name][role] = costs(counted, request)[flow].cycles
    return found


def random_mask(rows: int, cols: int, kept: float, spread: float) -> np.ndarray:
    """A mask that keeps a share of its weights; each column's own share is drawn from a beta distribution."""
    random = np.random.default_rng(0)
    chances = np.full(cols, kept)
    if spread:
        size = kept * (1 - kept) / spread**2 - 1
        chances = random.beta(kept * size, (1 - kept) * size, cols)
        chances *= kept / chances.mean()
    return random.random((rows, cols), dtype=np.float32) < chances


def stages() -> dict[str, Line]:
    """The newest line of every method's stage, in the order of the methods."""
    newest = {line["name"]: line for line in read_lines(LINES) if line["what"] == "stage"}
    return {name: newest[name] for name in METHODS if name in newest and not recorded.is_old(newest[name])}


def random_masks() -> dict[float, Line]:
    """The newest line of every spread."""
    return {line["spread"]: line for line in read_lines(LINES) if line["what"] == "random"}


def table(titles: Mapping[str, str]) -> str:
    """In Markdown: a dense line for every dataflow, then a line a method."""
    found = stages()
    if not found:
        return "Not measured yet."
    labels = list(next(iter(found.values()))["cycles"][RELEASED])
    rows = [["dataflow", "model", *labels], ["---", "---", *["---:"] * len(labels)]]
    for flow, *_ in VARIANTS:
        first = next(iter(found.values()))["cycles"][flow]
        rows.append([flow, "dense", *(f"{first[label][0]:,.0f}" for label in labels)])
        for name, line in found.items():
            cells = (line["cycles"][flow][label] for label in labels)
            rows.append([flow, titles[name], *(f"{taken:,.1f} ({dense / taken:.2f})" for dense, taken in cells)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def speedups(titles: Mapping[str, str]) -> str:
    """In Markdown: how much faster the whole model is, by method and dataflow."""
    rows = [["", *(title for _, title in COLUMNS)], ["---"] * (len(COLUMNS) + 1)]
    for name, line in stages().items():
        whole = [line["cycles"][flow]["all"] for flow, _ in COLUMNS]
        rows.append([titles[name], *(f"{dense / taken:.2f}" for dense, taken in whole)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    main()
