"""Protocol A with few bits: quantized, pruned then quantized, quantized then pruned, and both learned together.

    python benchmarks/quant_protocol_a.py TOKENS.jsonl --work DIR [--pruned STAGE] [--reference PYTHON] [--only ...]

The conditions are those of `protocol_a.py`, which measured the dense model and BESA's; all pruning is to 50 %. Every
cell is one or two real commands in a run directory of its own. Finished cells are kept (one JSON line each in
benchmarks/quant_protocol_a.jsonl), an interrupted one is resumed; the table is written into benchmarks/QUANTIZATION.md.
"""

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from besa_runs import HERE, append_line, besa, calibrated, commit, facts, machine, newest, perplexity

LINES = HERE / "quant_protocol_a.jsonl"
WITHOUT = {"dense": "dense"}  # by its name in protocol_a.jsonl; "besa" is the stage that these cells began from
PAGE = HERE / "QUANTIZATION.md"
GRIDS = {"g128": "128", "channel": "channel"}
GROUPS = {**GRIDS, "g64": "64"}  # what llm-compressor can do with 576 columns
ORDERS = ("natural", "static")  # of its columns
METHODS = ("rtn", "gptq", "clip")
EQUAL = {"2bit": "2", "3bit": "3"}  # what dense 4-bit has to be left for to be as small as sparse 4-bit
CELLS = [
    *[f"{kind}-{grid}" for grid in GRIDS for kind in ("rtn", "jwanda", "besa-rtn", "joint")],
    *[f"{kind}-{grid}" for grid in GRIDS for kind in ("gptq", "besa-gptq", "clip", "besa-clip")],
    *[f"{kind}-{grid}" for grid in GRIDS for kind in ("gptq-plain", "besa-gptq-plain")],
    *[f"{method}-{bits}-g128" for bits in EQUAL for method in METHODS],
    "gptq-plain-g64",
    *[f"reference-{order}-g64" for order in ORDERS],
]
ROWS = {
    "rtn": "RTN",
    "gptq-plain": "GPTQ, grids from extreme to extreme",
    "gptq": "GPTQ",
    "clip": "clip",
    "jwanda": "RTN then Wanda (J-Wanda)",
    "besa-rtn": "BESA then RTN",
    "besa-gptq-plain": "BESA then GPTQ, grids from extreme to extreme",
    "besa-gptq": "BESA then GPTQ",
    "besa-clip": "BESA then clip",
    "joint": "joint: BESA with 4 bits",
}


class Cells:
    """The cells of one work directory; a cell that another needs is made first."""

    def __init__(self, tokens: Path, work: Path, model: str, pruned: Path | None, reference: str | None) -> None:
        self._tokens, self._work, self._model, self._pruned, self._reference = tokens, work, model, pruned, reference

    def make(self, cell: str) -> tuple[Path, dict[str, Any]]:
        """Run the commands of a cell; the stage that they end in, and its manifest."""
        if cell == "besa" and self._pruned is not None:
            return self._pruned, json.loads((self._pruned / "besa.json").read_text())
        run = self._work / cell
        stage, words = self._words(cell)
        if "rtn" not in words:  # which looks at no samples
            words = [*words, "--calibration", str(calibrated(self._tokens, self._work, self._model))]
        return run / stage, besa(*words, "--run", str(run))

    def _words(self, cell: str) -> tuple[str, Sequence[str]]:
        prune = ["prune", "--sparsity", "0.5"]
        if cell == "besa":
            return "pruned", [*prune, "--model", self._model]
        kind, _, grid = cell.rpartition("-")
        bits = ["--bits", "4", "--group-size", GROUPS[grid]]
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
        plain = ["--no-search"] if low == "plain" else []
        return "quantized", ["quantize", "--method", method, *plain, "--model", source, *bits]

    def measure(self, cell: str) -> dict[str, Any]:
        """One line of results."""
        if cell.startswith("reference-"):
            return self._measure_reference(cell)
        directory, stage = self.make(cell)
        return {
            "cell": cell,
            "perplexity": perplexity("--no-baseline", "--run", str(directory.parent)),
            "bits_per_weight": self._bits(cell, stage["counts"]),
            **facts(directory, stage),
        }

    def _measure_reference(self, cell: str) -> dict[str, Any]:
        _, stage = self.make("gptq-plain-g64")
        if self._reference is None:
            raise SystemExit(f"{cell} needs --reference PYTHON: see gptq_reference.py")
        out, source = self._work / cell, stage["model"]["directory"]
        command = [self._reference, str(HERE / "gptq_reference.py"), source, str(self._tokens), str(out)]
        subprocess.run([*command, "--order", cell.split("-")[1], "--group-size", "64"], check=True)
        return {"cell": cell, "perplexity": perplexity("--model", str(out)), "machine": machine(), "commit": commit()}

    def _bits(self, cell: str, counts: dict[str, Any]) -> float:
        """Bits that a weight takes with mask and scales; J-Wanda's codes are its parent's, its mask is its own."""
        if not cell.startswith("jwanda"):
            return float(counts["bits_per_weight"])
        _, parent = self.make(f"rtn-{cell.rpartition('-')[2]}")
        kept = counts["weights"] - counts["zeros"]
        return float(4 * kept + counts["weights"] + 16 * parent["counts"]["groups"]) / float(counts["weights"])


def known() -> dict[str, dict[str, Any]]:
    """The newest line of every cell, those of `protocol_a.py` among them."""
    there = newest(HERE / "protocol_a.jsonl")
    return {cell: there[name] for cell, name in WITHOUT.items() if name in there} | newest(LINES)


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
    both = ["gptq-plain-g64", *[f"reference-{order}-g64" for order in ORDERS]]
    rows += [
        "",
        "| GPTQ, dense, 4 bits, plain grids | besa | llm-compressor | llm-compressor, heaviest columns first |",
        "|---|---|---|---|",
    ]
    rows.append(f"| groups of 64 | {' | '.join(_perplexity(found, cell) for cell in both)} |")
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
    parser.add_argument("--reference", help="the Python of an environment with llm-compressor, see gptq_reference.py")
    parser.add_argument("--only", nargs="*", default=CELLS)
    arguments = parser.parse_args()
    cells = Cells(arguments.tokens, arguments.work, arguments.model, arguments.pruned, arguments.reference)
    for cell in arguments.only:
        if cell not in known():
            line = cells.measure(cell)
            append_line(LINES, line)
            print(json.dumps(line), flush=True)
    PAGE.write_text(page())


def page() -> str:
    """The whole page."""
    head = (
        "# Few bits\n\nGenerated by `benchmarks/quant_protocol_a.py` from `quant_protocol_a.jsonl`.\n\n"
        "SmolLM2-135M-Instruct; calibration 128 × 512 tokens of C4; WikiText-2 raw test, windows of 2048, the first "
        "16; perplexity; `-` is not measured yet. Scales are fp16 numbers; bits a weight are codes, scales and, where "
        "it saves, a mask.\n\n"
    )
    return head + table() + "\n"


if __name__ == "__main__":
    main()
