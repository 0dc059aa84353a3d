"""Protocol A with few bits: quantized, pruned then quantized, quantized then pruned, and both learned together.

    python benchmarks/quant_protocol_a.py TOKENS.jsonl --work DIR [--pruned STAGE] [--only CELL ...]

The conditions are those of `protocol_a.py`, all pruning is to 50 %. Every cell is one or two real commands in a run
directory of its own. Finished cells are kept (one JSON line each in benchmarks/quant_protocol_a.jsonl), an interrupted
one is resumed; the table is written into benchmarks/QUANTIZATION.md.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from besa_runs import HERE, append_line, besa, commit, machine, read_lines, spent

LINES = HERE / "quant_protocol_a.jsonl"
PAGE = HERE / "QUANTIZATION.md"
GRIDS = {"g128": "128", "channel": "channel"}
METHODS = ("rtn", "gptq", "clip")
EQUAL = {"2bit": "2", "3bit": "3"}  # what dense 4-bit has to be left for to be as small as sparse 4-bit
CELLS = [
    "dense",
    "besa",
    *[f"{kind}-{grid}" for grid in GRIDS for kind in ("rtn", "jwanda", "besa-rtn", "joint")],
    *[f"{kind}-{grid}" for grid in GRIDS for kind in ("gptq", "besa-gptq", "clip", "besa-clip")],
    *[f"{method}-{bits}-g128" for bits in EQUAL for method in METHODS],
]
ROWS = {
    "rtn": "RTN",
    "gptq": "GPTQ",
    "clip": "clip",
    "jwanda": "RTN then Wanda (J-Wanda)",
    "besa-rtn": "BESA then RTN",
    "besa-gptq": "BESA then GPTQ",
    "besa-clip": "BESA then clip",
    "joint": "joint: BESA with 4 bits",
}


class Cells:
    """The cells of one work directory; a cell that another needs is made first."""

    def __init__(self, tokens: Path, work: Path, model: str, pruned: Path | None) -> None:
        self._tokens, self._work, self._model, self._pruned = tokens, work, model, pruned

    def make(self, cell: str) -> tuple[Path, dict[str, Any]]:
        """Run the commands of a cell; the stage that they end in, and its manifest."""
        if cell == "besa" and self._pruned is not None:
            return self._pruned, json.loads((self._pruned / "besa.json").read_text())
        run = self._work / cell
        stage, words = self._words(cell)
        chosen = [*words, "--calibration", str(self._calibration()), "--run", str(run)]
        return run / stage, besa(*chosen)

    def _words(self, cell: str) -> tuple[str, Sequence[str]]:
        prune = ["prune", "--sparsity", "0.5"]
        if cell == "besa":
            return "pruned", [*prune, "--model", self._model]
        kind, _, grid = cell.rpartition("-")
        bits = ["--bits", "4", "--group-size", GRIDS[grid]]
        if kind == "joint":
            return "quantized", [*prune, "--model", self._model, *bits]
        if kind == "jwanda":
            parent, _ = self.make(f"rtn-{grid}")
            return "pruned", [*prune, "--method", "wanda", "--model", str(parent)]
        source = self._model
        if kind.startswith("besa-"):
            pruned, _ = self.make("besa")
            source = str(pruned)
        method, _, low = kind.removeprefix("besa-").partition("-")
        bits[1] = EQUAL.get(low, "4")
        return "quantized", ["quantize", "--method", method, "--model", source, *bits]

    def _calibration(self) -> Path:
        there = self._work / "tokens" / "calibration"
        if not there.exists():
            drawn = ["--data", str(self._tokens), "--samples", "128", "--seqlen", "512"]
            besa("calibrate", "--model", self._model, *drawn, "--run", str(there.parent))
        return there

    def measure(self, cell: str) -> dict[str, Any]:
        """One line of results."""
        measured = ["eval", "ppl", "wikitext2", "--limit", "16"]
        if cell == "dense":
            result = besa(*measured, "--model", self._model)
            return {"cell": cell, "perplexity": result["results"][0]["perplexity"], "commit": commit()}
        directory, stage = self.make(cell)
        evaluated = besa(*measured, "--model", str(directory))
        seconds, peak_memory = spent(directory)
        return {
            "cell": cell,
            "perplexity": evaluated["results"][0]["perplexity"],
            "counts": stage["counts"],
            "bits_per_weight": self._bits(cell, stage["counts"]),
            "compute": stage["compute"],
            "versions": stage["versions"],
            "seconds": round(seconds),
            "peak_memory": peak_memory,
            "machine": machine(),
            "commit": commit(),
        }

    def _bits(self, cell: str, counts: dict[str, Any]) -> float:
        """Bits that a weight takes with mask and scales; J-Wanda's codes are its parent's, its mask is its own."""
        if cell == "besa":
            return 16.0 * (1 - counts["sparsity"]) + 1
        if not cell.startswith("jwanda"):
            return float(counts["bits_per_weight"])
        _, parent = self.make(f"rtn-{cell.rpartition('-')[2]}")
        kept = counts["weights"] - counts["zeros"]
        return float(4 * kept + counts["weights"] + 16 * parent["counts"]["groups"]) / float(counts["weights"])


def known() -> dict[str, dict[str, Any]]:
    """The newest line of every cell."""
    return {line["cell"]: line for line in read_lines(LINES)}


def table() -> str:
    """The Markdown tables of all cells that were measured."""
    found = known()
    rows = [
        "| 4 bits, symmetric | groups of 128 | bits a weight | per channel | bits a weight |",
        "|---|---|---|---|---|",
    ]
    for cell, name in (("dense", "dense, bf16"), ("besa", "BESA 50 %, bf16")):
        rows.append(f"| {name} | {_perplexity(found, cell)} | {16 if cell == 'dense' else 9} | | |")
    for kind, name in ROWS.items():
        texts = [text(found, f"{kind}-{grid}") for grid in GRIDS for text in (_perplexity, _bits)]
        rows.append(f"| {name} | {' | '.join(texts)} |")
    rows += ["", "| groups of 128 | RTN | GPTQ | clip | bits a weight |", "|---|---|---|---|---|"]
    for name, middle in (("dense, 4 bits", ""), ("dense, 3 bits", "-3bit"), ("dense, 2 bits", "-2bit")):
        cells = [f"{method}{middle}-g128" for method in METHODS]
        rows.append(f"| {name} | {' | '.join(_perplexity(found, cell) for cell in cells)} | {_bits(found, cells[0])} |")
    sparse = [f"besa-{method}-g128" for method in METHODS]
    rows.append(
        f"| BESA 50 %, then 4 bits | {' | '.join(_perplexity(found, c) for c in sparse)} | {_bits(found, sparse[0])} |"
    )
    joint = f"{_perplexity(found, 'joint-g128')} | {_bits(found, 'joint-g128')}"
    rows.append(f"| joint, 50 % and 4 bits | | | {joint} |")
    return "\n".join(rows)


def _perplexity(found: dict[str, dict[str, Any]], cell: str) -> str:
    return f"{found[cell]['perplexity']:.2f}" if cell in found else "-"


def _bits(found: dict[str, dict[str, Any]], cell: str) -> str:
    return f"{found[cell]['bits_per_weight']:.3f}" if cell in found else "-"


def main() -> None:
    """Measure what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pruned", type=Path, help="a finished BESA stage to take for the cell besa")
    parser.add_argument("--only", nargs="*", default=CELLS)
    arguments = parser.parse_args()
    cells = Cells(arguments.tokens, arguments.work, arguments.model, arguments.pruned)
    for cell in arguments.only:
        if cell not in known():
            line = cells.measure(cell)
            append_line(LINES, line)
            print(json.dumps(line), flush=True)
    head = (
        "# Few bits\n\nGenerated by `benchmarks/quant_protocol_a.py` from `quant_protocol_a.jsonl`.\n\n"
        "SmolLM2-135M-Instruct; calibration 128 × 512 tokens of C4; WikiText-2 raw test, windows of 2048, the first 16"
        "; perplexity. Scales are fp16 numbers; bits a weight are codes, scales and, where it saves, a mask.\n\n"
    )
    PAGE.write_text(head + table() + "\n")


if __name__ == "__main__":
    main()
