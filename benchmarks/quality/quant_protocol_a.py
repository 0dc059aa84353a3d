"""Protocol A with few bits: quantized, pruned then quantized, quantized then pruned, and both learned together.

    python -m benchmarks.quality.quant_protocol_a TOKENS.jsonl --work DIR [--pruned STAGE] [--reference PYTHON]

The conditions are those of `protocol_a.py`, seed 0; all pruning is to 50 %. TOKENS.jsonl holds the rows. Every cell is
one or two real commands in a run directory of its own. Finished cells are kept (one JSON line each in
results/quant_protocol_a.jsonl), an interrupted one is resumed, and one of other options or an older version of a
method than today's is measured again; `results.py` writes the tables.
"""

import argparse
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.quality import protocol_a
from benchmarks.quality.ablation_plan import DENSE
from benchmarks.results import recorded
from benchmarks.shared.besa_runs import (
    RESULTS,
    append_line,
    besa,
    calibrated,
    commit,
    facts,
    machine,
    newest,
    perplexity,
)
from besa_cli.jobs import prune, quantize
from besa_cli.ops import affine
from besa_cli.quantizers import QUANTIZERS
from besa_cli.system import compute

LINES, PAGE = RESULTS / "quant_protocol_a.jsonl", RESULTS / "QUANTIZATION.md"
SPARSITY = 0.5
GRIDS = {"g128": "128", "channel": "channel"}
GROUPS = {**GRIDS, "g64": "64"}  # what llm-compressor can do with 576 columns
ORDERS = ("natural", "static")  # of its columns
METHODS = tuple(QUANTIZERS)
EQUAL = {"2bit": 2, "3bit": 3}  # what dense 4-bit has to be left for to be as small as sparse 4-bit
LOWER = sorted(EQUAL.items(), key=lambda item: -item[1])
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


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of a cell: `besa prune` to half, `besa quantize`, or `besa prune --bits`."""

    command: str
    method: str
    group_size: str | None = None
    bits: int = 4
    search: bool = True

    def words(self) -> list[str]:
        """As they are typed."""
        sparsity = ["--sparsity", str(SPARSITY)] if self.command == "prune" else []
        grid = ["--bits", str(self.bits), "--group-size", self.group_size] if self.group_size else []
        plain = [] if self.search else ["--no-search"]
        return [self.command, "--method", self.method, *sparsity, *grid, *plain]

    def record(self) -> dict[str, Any]:
        """All that it is told, defaults included."""
        own: dict[str, Any] = {} if self.search else {"search": False}
        if self.command == "quantize":
            given = quantize.request(method=self.method, options=own)
            grid = {"bits": self.bits, "group_size": self.group_size, "symmetric": True}
            return {"command": "quantize", "method": self.method, **grid, "options": given.method.options.record()}
        grid = {"bits": self.bits, "group_size": self.group_size} if self.group_size else {}
        asked = prune.request(method=self.method, sparsity=SPARSITY, options=grid)
        options = asked.method.options.record()
        return {"command": "prune", "method": self.method, "sparsity": SPARSITY, "options": options}

    def methods(self) -> list[str]:
        """Those that have a part in it."""
        return [self.method, "clip"] if self.command == "prune" and self.group_size else [self.method]


def parent(cell: str) -> str | None:
    """The cell whose stage this one begins from; None for the dense model."""
    kind, _, grid = cell.rpartition("-")
    if kind == "jwanda":
        return f"rtn-{grid}"
    return "besa" if kind.startswith("besa-") else None


def step(cell: str) -> Step:
    """The command that makes a cell of its parent."""
    if cell == "besa":
        return Step(command="prune", method="besa")
    kind, _, grid = cell.rpartition("-")
    if kind == "joint":
        return Step(command="prune", method="besa", group_size=GROUPS[grid])
    if kind == "jwanda":
        return Step(command="prune", method="wanda")
    method, _, low = kind.removeprefix("besa-").partition("-")
    bits, search = EQUAL.get(low, 4), low != "plain"
    return Step(command="quantize", method=method, group_size=GROUPS[grid], bits=bits, search=search)


def chain(cell: str) -> list[Step]:
    """All commands of a cell, from the dense model on."""
    before = parent(cell)
    return [*(chain(before) if before else []), step(cell)]


def key(cell: str) -> dict[str, Any]:
    """What a cell is told from others by, and from itself with other defaults or methods of another version."""
    if cell.startswith("reference-"):
        grid = {"bits": 4, "group_size": GROUPS["g64"], "symmetric": True, "order": cell.split("-")[1]}
        return {"steps": [{"command": "llm-compressor", "method": "gptq", **grid}], "seed": 0, "methods": {}}
    steps = chain(cell)
    names = [name for each in steps for name in each.methods()]
    return {"steps": [each.record() for each in steps], "seed": 0, "methods": recorded.methods(*names)}


class Cells:
    """The cells of one work directory; a cell that another needs is made first."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self._tokens, self._work, self._model = asked.tokens, asked.work, asked.model
        self._pruned, self._reference, self._dtype = asked.pruned, asked.reference, asked.dtype

    def make(self, cell: str) -> tuple[Path, dict[str, Any]]:
        """Run the commands of a cell; the stage that they end in, and its manifest."""
        if cell == "besa" and self._pruned is not None:
            return self._pruned, json.loads((self._pruned / "besa.json").read_text())
        before = parent(cell)
        source = str(self.make(before)[0]) if before else self._model
        run, last = self._work / cell, step(cell)
        words = [*last.words(), "--model", source, "--dtype", self._dtype]
        if last.command == "prune" or quantize.request(method=last.method).uses_calibration:
            words += ["--calibration", str(calibrated(self._tokens, self._work, self._model))]
        return run / ("quantized" if last.group_size else "pruned"), besa(*words, "--run", str(run))

    def measure(self, cell: str) -> dict[str, Any]:
        """One line of results."""
        setup = replace(protocol_a.SETUP, data=(str(self._tokens),), dtype=self._dtype).record()
        known = {"cell": cell, "setup": setup, **key(cell)}
        if cell.startswith("reference-"):
            return {**known, **self._measure_reference(cell)}
        directory, stage = self.make(cell)
        return {
            **known,
            "perplexity": perplexity("--no-baseline", "--dtype", self._dtype, "--run", str(directory.parent)),
            "bits_per_weight": self._bits(cell, stage["counts"]),
            **facts(directory, stage),
        }

    def _measure_reference(self, cell: str) -> dict[str, Any]:
        _, stage = self.make("gptq-plain-g64")
        if self._reference is None:
            raise SystemExit(f"{cell} needs --reference PYTHON: see gptq_reference.py")
        out, source = self._work / cell, stage["model"]["directory"]
        command = [self._reference, "-m", "benchmarks.reference.gptq_reference", source, str(self._tokens), str(out)]
        subprocess.run([*command, "--order", cell.split("-")[1], "--group-size", "64"], check=True)
        found = perplexity("--dtype", self._dtype, "--model", str(out))
        return {"perplexity": found, "machine": machine(), "commit": commit()}

    def _bits(self, cell: str, counts: dict[str, Any]) -> float:
        """Bits that a weight takes with mask and scales; J-Wanda's codes are its parent's, its mask is its own."""
        if not cell.startswith("jwanda"):
            return float(counts["bits_per_weight"])
        before = f"rtn-{cell.rpartition('-')[2]}"
        _, rounded = self.make(before)
        size, grid = counts["weights"], affine.grid(4, str(step(before).group_size), symmetric=True)
        return affine.packed_bits(size, size - counts["zeros"], rounded["counts"]["groups"], grid) / float(size)


def known() -> Mapping[str, Mapping[str, Any]]:
    """The newest line of every cell, and the dense model's of `protocol_a.py`."""
    dense = protocol_a.found().get(DENSE)
    found = newest(LINES)
    return {"dense": {**dense, "perplexity": dense["perplexity"]["wikitext2"]}, **found} if dense else found


def is_current(cell: str, line: Mapping[str, Any]) -> bool:
    """Whether the same commands would be asked today, of the same versions of the methods."""
    return cell == "dense" or all(line[name] == value for name, value in key(cell).items())


def table() -> str:
    """The Markdown tables of all cells that were measured."""
    found = known()
    rows = [
        "| 4 bits, symmetric | groups of 128 | bits a weight | per channel | bits a weight |",
        "|---|---|---|---|---|",
    ]
    for cell, name, nonzero in (("dense", "dense, bf16", 2), ("besa", "BESA 50 %, bf16", 1)):
        stored = affine.value_bits(2, nonzero, 16) / 2  # of two weights
        rows.append(f"| {name} | {shown(found, cell)} | {stored:g} | | |")
    for kind, name in ROWS.items():
        texts = [text(found, f"{kind}-{grid}") for grid in GRIDS for text in (shown, _bits)]
        rows.append(f"| {name} | {' | '.join(texts)} |")
    titles = ["groups of 128", *(name if name == "clip" else name.upper() for name in METHODS), "bits a weight"]
    rows += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, middle in (("dense, 4 bits", ""), *((f"dense, {bits} bits", f"-{low}") for low, bits in LOWER)):
        cells = [f"{method}{middle}-g128" for method in METHODS]
        rows.append(f"| {name} | {' | '.join(shown(found, cell) for cell in cells)} | {_bits(found, cells[0])} |")
    sparse = [f"besa-{method}-g128" for method in METHODS]
    rows.append(
        f"| BESA 50 %, then 4 bits | {' | '.join(shown(found, c) for c in sparse)} | {_bits(found, sparse[0])} |"
    )
    joint = f"{shown(found, 'joint-g128')} | {_bits(found, 'joint-g128')}"
    rows.append(f"| joint, 50 % and 4 bits |{' |' * (len(METHODS) - 1)} {joint} |")
    both = ["gptq-plain-g64", *[f"reference-{order}-g64" for order in ORDERS]]
    rows += [
        "",
        "| GPTQ, dense, 4 bits, plain grids | besa | llm-compressor | llm-compressor, heaviest columns first |",
        "|---|---|---|---|",
    ]
    rows.append(f"| groups of 64 | {' | '.join(shown(found, cell) for cell in both)} |")
    return "\n".join(rows)


def shown(found: Mapping[str, Mapping[str, Any]], cell: str) -> str:
    """A cell's perplexity, marked where the program does something else today; a dash where there is none."""
    if cell not in found:
        return "-"
    return f"{found[cell]['perplexity']:,.2f}" + ("" if is_current(cell, found[cell]) else " (old)")


def _bits(found: Mapping[str, Mapping[str, Any]], cell: str) -> str:
    return f"{found[cell]['bits_per_weight']:.3f}" if cell in found else "-"


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=list(compute.DTYPES), default="float32", help="in which all is computed")
    parser.add_argument("--pruned", type=Path, help="a finished BESA stage to take for the cell besa")
    parser.add_argument("--reference", help="the Python of an environment with llm-compressor, see gptq_reference.py")
    parser.add_argument("--only", nargs="*", default=CELLS)
    asked = parser.parse_args()
    cells = Cells(asked)
    for cell in asked.only:
        if cell not in known() or not is_current(cell, known()[cell]):
            line = cells.measure(cell)
            append_line(LINES, line)
            print(json.dumps(line), flush=True)


def page() -> str:
    """The whole page."""
    return (
        "# Few bits\n\nGenerated by `benchmarks/results/results.py` from `quant_protocol_a.jsonl`.\n\n"
        "SmolLM2-135M-Instruct; calibration 128 × 512 tokens of C4, seed 0; WikiText-2 raw test, windows of 2048, the "
        "first 16; computed in fp32; perplexity; `-` is not measured yet, *(old)* was measured with an older version "
        "of a method, so that it would be otherwise today. Scales are fp16 numbers; bits a weight are codes, scales "
        f"and, where it saves, a mask.\n\n{table()}\n"
    )


if __name__ == "__main__":
    main()
