"""How good is the pruned demo model after how much work? Protocol A at 50 %, learned on fewer and fewer samples.

    python -m benchmarks.quality.time_to_quality TOKENS.jsonl --work DIR [--samples 16 32 64 128] [--window block 2]

Work is the CPU time of `besa prune`, process and reports included, in units of one plain pass without gradients of all
blocks over all rows of TOKENS.jsonl, a row at a time, timed before and after in CPU seconds too, on the first rows.
Finished cells are kept (one JSON line each in results/time_to_quality.jsonl); `results.py` writes the table. A cell
is known by all of the stage's options and the version of the method, so that none survives a change of either.
"""

import argparse
import json
import os
import resource
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as `besa` does: before torch reads it

import torch

from benchmarks.results import recorded
from benchmarks.shared.besa_runs import RESULTS, append_line, besa, commit, machine, read_lines, spent
from benchmarks.speed.bench_prune import CPU, plain_pass
from besa_cli import models
from besa_cli.decoder.decoder import Decoder
from besa_cli.pruners.besa import BesaOptions as BesaOptions
from besa_cli.system import compute

LINES = RESULTS / "time_to_quality.jsonl"
SPARSITY = "0.5"
_TIMED = 16  # rows of which a plain pass is timed


def unit(tokens: Path, dtype: torch.dtype) -> float:
    """CPU seconds of a plain pass over all rows, from one over the first."""
    decoder = Decoder(models.resolve("smollm2-135m", notify=print).directory, CPU, dtype)
    rows = [json.loads(line)["input_ids"] for line in tokens.read_text().splitlines()]
    timed = rows[:_TIMED]
    return plain_pass(decoder, torch.tensor(timed)).cpu * len(rows) / len(timed)


def cell(samples: int, window: str, dtype: str) -> dict[str, Any]:
    """What tells a measurement from others."""
    options = BesaOptions(window=window).record()
    return {"samples": samples, "dtype": dtype, "options": options, "methods": recorded.methods("besa")}


def measure(samples: int, window: str, dtype: str, tokens: Path, work: Path) -> dict[str, Any]:
    """Prune on so many rows and evaluate."""
    run = work / f"{samples}-{window}-{dtype}"
    besa("calibrate", "--data", str(tokens), "--samples", str(samples), "--seqlen", "512", "--run", str(run))
    before, started = unit(tokens, compute.DTYPES[dtype]), _children()
    words = ["--sparsity", SPARSITY, "--window", window, "--dtype", dtype]
    stage = besa("prune", *words, "--restart", "--run", str(run))
    took = _children() - started
    units = took / ((before + unit(tokens, compute.DTYPES[dtype])) / 2)
    how = ["--limit", "16", "--no-baseline", "--dtype", dtype]
    evaluated = besa("eval", "ppl", "wikitext2", *how, "--run", str(run))
    return {
        **cell(samples, window, dtype),
        "perplexity": evaluated["results"][0]["perplexity"],
        "units": units,
        "cpu_seconds": took,
        "peak_memory": spent(run / "pruned")[1],
        "counts": stage["counts"],
        "compute": stage["compute"],
        "machine": machine(),
        "commit": commit(),
    }


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--window", nargs="+", default=["block"])
    parser.add_argument("--dtype", choices=("auto", *compute.DTYPES), default="auto")
    arguments = parser.parse_args(words)
    dtype = compute.name_of(compute.dtype(arguments.dtype, CPU))
    for window, samples in product(arguments.window, arguments.samples):
        wanted = cell(samples, window, dtype)
        if any(wanted.items() <= line.items() for line in read_lines(LINES)):
            continue
        line = measure(samples, window, dtype, arguments.tokens, arguments.work)
        append_line(LINES, line)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
