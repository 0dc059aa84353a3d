"""Protocol A: every method at 50, 60 and 70 % on the demo model, by the real commands.

    python benchmarks/protocol_a.py TOKENS.jsonl --work DIR [--only besa-row-50 wanda-50 ...] [--device cpu]

TOKENS.jsonl holds 128 rows of 512 token ids. Perplexity is on the WikiText-2 raw test
split, windows of 2048, the first 16.
Finished cells are kept (one JSON line each in benchmarks/protocol_a.jsonl), an interrupted one is resumed; `results.py`
writes the table.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from besa_runs import HERE, append_line, besa, calibrated, commit, facts, newest, perplexity

LINES = HERE / "protocol_a.jsonl"
MODEL = "smollm2-135m"
METHODS = {
    "magnitude": ["--method", "magnitude"],
    "wanda": ["--method", "wanda"],
    "sparsegpt": ["--method", "sparsegpt"],
    "besa-layer": ["--method", "besa", "--granularity", "layer"],
    "besa-row": ["--method", "besa", "--granularity", "row"],
    "besa-row-window-2": ["--method", "besa", "--granularity", "row", "--window", "2"],
}
SPARSITIES = (50, 60, 70)
CELLS = [f"{method}-{sparsity}" for sparsity in SPARSITIES for method in METHODS]


def measure(cell: str, tokens: Path, work: Path) -> dict[str, Any]:
    """Prune and evaluate one cell."""
    method, sparsity = cell.rsplit("-", 1)
    run = work / cell
    calibration = calibrated(tokens, work, MODEL)
    chosen = [*METHODS[method], "--sparsity", f"0.{sparsity}", "--calibration", str(calibration), "--run", str(run)]
    stage = besa("prune", "--model", MODEL, *chosen)
    return {"cell": cell, "perplexity": perplexity("--no-baseline", "--run", str(run)), **facts(run / "pruned", stage)}


def table() -> str:
    """The Markdown table of all cells that were measured."""
    found = newest(LINES)
    rows = [
        "| method | " + " | ".join(f"{sparsity} %" for sparsity in SPARSITIES) + " |",
        "|---|" + "---|" * len(SPARSITIES),
    ]
    for method in METHODS:
        cells = [found.get(f"{method}-{sparsity}") for sparsity in SPARSITIES]
        texts = [
            f"{c['perplexity']:.2f} ({c['seconds']} s, {c['peak_memory'] / 1e9:.2f} GB)" if c else "-" for c in cells
        ]
        rows.append(f"| {method} | " + " | ".join(texts) + " |")
    if "dense" in found:
        rows.insert(2, f"| dense | {found['dense']['perplexity']:.2f} | | |")
    return "\n".join(rows)


def conditions() -> str:
    """Which cells were measured at which commit, in which dtype and with how many threads."""
    cells: dict[tuple[str, str, int], list[str]] = {}
    for cell, line in newest(LINES).items():
        if "compute" in line:
            how = (str(line["commit"]), str(line["compute"]["dtype"]), int(line["compute"]["threads"]))
            cells.setdefault(how, []).append(cell)
    return "".join(
        f"- commit {made}, {dtype}, {threads} {'thread' if threads == 1 else 'threads'}: {', '.join(sorted(names))}\n"
        for (made, dtype, threads), names in sorted(cells.items())
    )


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["dense", *CELLS])
    arguments = parser.parse_args()
    for cell in arguments.only:
        if cell in newest(LINES):
            continue
        if cell == "dense":
            line = {"cell": cell, "perplexity": perplexity("--model", MODEL), "commit": commit()}
        else:
            line = measure(cell, arguments.tokens, arguments.work)
        append_line(LINES, line)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
