"""The paper's Table 4 for any model: the same linears under several methods and dataflows, as Markdown.

    python benchmarks/simulate_table4.py SparseGPT=run-a/pruned Wanda=run-b/pruned BESA=run-c/pruned
    python benchmarks/simulate_table4.py --llama-7b

The first writes mean cycles over blocks, and the speed-up over the dense linear under the same dataflow. The second
does it for LLaMA-7B's shapes with random masks at the sparsities that the paper prints for BESA: every weight kept
by the same chance, and by the chance of its column, which differs from column to column.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from besa_cli.sim import accelerator
from besa_cli.sim.cost import Settings
from besa_cli.sim.summary import Summary, summarize
from besa_cli.sim.workload import of_mask
from besa_cli.simulation.run import Request, blocks, costs, summaries

FLOWS = ("vitcod", "vitcod-released", "roofline")
MACHINE = accelerator.load("besa")

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
    """Print the table asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="TITLE=DIR")
    parser.add_argument("--llama-7b", action="store_true")
    given = parser.parse_args()
    named = dict(stage.split("=", 1) for stage in given.stages)
    for title, made in (("", measured(named)), ("LLaMA-7B, random masks", llama_7b() if given.llama_7b else {})):
        if made:
            print("\n".join([f"{title}\n" if title else "", *lines(made)]))


def measured(stages: Mapping[str, str]) -> dict[tuple[str, str], dict[str, Summary]]:
    """(dataflow, method) → label → mean over blocks; with the threshold fixed and searched for."""
    found: dict[tuple[str, str], dict[str, Summary]] = {}
    for title, place in stages.items():
        for flow, search in (("vitcod", False), ("vitcod", True), *((flow, False) for flow in FLOWS[1:])):
            request = Request(func="model", dataflows=(flow,), accelerator=MACHINE, settings=Settings(search=search))
            name = f"{flow} --search" if search else flow
            found[name, title] = summaries(list(blocks(Path(place), request, lambda name: True)), flow)
    return dict(
        sorted(found.items(), key=lambda item: list(dict.fromkeys(flow for flow, _ in found)).index(item[0][0]))
    )


def llama_7b() -> dict[tuple[str, str], dict[str, Summary]]:
    """(dataflow, spread) → label → one random linear of LLaMA-7B's shape."""
    found: dict[tuple[str, str], dict[str, Summary]] = {}
    for spread in SPREADS:
        for role, (rows, cols, sparsity) in LLAMA_7B.items():
            counted = of_mask(random_mask(rows, cols, 1 - sparsity / 100, spread), role)
            for flow, search in (("vitcod", False), ("vitcod", True), ("vitcod-released", False), ("roofline", False)):
                request = Request(
                    func="model", dataflows=(flow,), accelerator=MACHINE, settings=Settings(search=search)
                )
                name = f"{flow} --search" if search else flow
                one = summarize([(counted, costs(counted, request)[flow])], 1)
                found.setdefault((name, f"spread {spread}"), {})[role] = one
    return dict(sorted(found.items()))


def random_mask(rows: int, cols: int, kept: float, spread: float) -> np.ndarray:
    """A mask that keeps a share of its weights; each column's own share is drawn from a beta distribution."""
    random = np.random.default_rng(0)
    chances = np.full(cols, kept)
    if spread:
        size = kept * (1 - kept) / spread**2 - 1
        chances = random.beta(kept * size, (1 - kept) * size, cols)
        chances *= kept / chances.mean()
    return random.random((rows, cols), dtype=np.float32) < chances


def lines(found: Mapping[tuple[str, str], Mapping[str, Summary]]) -> Iterator[str]:
    """The table in Markdown: a dense line for every dataflow, then a line a method."""
    labels = list(next(iter(found.values())))
    yield row(["dataflow", "model", *labels])
    yield row(["---", "---", *["---:"] * len(labels)])
    said = set()
    for (flow, title), means in found.items():
        if flow not in said:
            said.add(flow)
            yield row([flow, "dense", *(f"{means[label].dense_cycles:,.0f}" for label in labels)])
        yield row([flow, title, *(f"{means[label].cycles:,.1f} ({means[label].speedup:.2f})" for label in labels)])


def row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
