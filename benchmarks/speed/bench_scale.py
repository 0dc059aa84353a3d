"""Is what `--dry-run` says true? Ask it, run the command, and compare: peak resident memory, disk, seconds.

    python -m benchmarks.speed.bench_scale --shape 7b --blocks 2 --work DIR  # a random checkpoint, kept
    python -m benchmarks.speed.bench_scale --shape 7b --blocks 2 --work DIR --max-memory 4GB --seqlen 256
    python -m benchmarks.speed.bench_scale --model smollm2-135m --samples 32 --seqlen 512 --work DIR --methods besa

One JSON line a command, also kept in bench_scale.jsonl: `prune` with each method, then `eval ppl` of two windows of the
last one. The peak is the process's own (`ru_maxrss`), imports included. Run directories are removed again. `results.py`
makes the table of docs/scale.md of memory and disk; seconds are those of a machine with other work on it, so that none
are quoted. Lines with `from` were taken over as they stood in dev/log, from before this file was kept.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import recorded
from benchmarks.shared import besa_runs, random_checkpoint

Line = Mapping[str, Any]

LINES = besa_runs.RESULTS / "bench_scale.jsonl"


def spent(words: Sequence[str], place: Path) -> dict[str, float]:
    """Run one command; returns its peak resident bytes, the bytes that it left in `place`, and its seconds."""
    before, began = _size(place), time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "besa_cli", *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"besa {' '.join(words)} ended with {process.returncode}")
    return {
        "memory": used.ru_maxrss * 1024,
        "disk": _size(place) - before,
        "seconds": seconds,
        "cpu": used.ru_utime + used.ru_stime,
    }


def compare(words: Sequence[str], place: Path) -> dict[str, Any]:
    """What was said before, what was measured, and the ratio of the two."""
    said = besa_runs.besa(*words, "--dry-run")
    found = spent(words, place)
    return {"said": {name: said[name] for name in ("memory", "disk", "seconds")}, "measured": found}


def model_of(options: argparse.Namespace) -> tuple[str, list[str], str]:
    """The model, the options that calibrate on it, and what to measure; a random one is made where there is none."""
    drawn = ["--samples", str(options.samples), "--seqlen", str(options.seqlen)]
    if options.model:
        return options.model, ["--data", "bundled", *drawn], "wikitext2"
    directory = options.work / f"{options.shape}-{options.blocks}"
    if not (directory / "tokenizer.json").exists():
        whole = random_checkpoint.SHAPES[options.shape]
        shape = random_checkpoint.Shape(**{**vars(whole), "blocks": options.blocks})
        random_checkpoint.checkpoint(directory, shape, torch.bfloat16)
        random_checkpoint.texts(directory, shape.vocabulary, options.samples, options.seqlen)
    return str(directory), ["--data", str(directory / "rows.jsonl"), *drawn], str(directory / "text.txt")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", help="instead of a random checkpoint")
    parser.add_argument("--shape", choices=random_checkpoint.SHAPES, default="7b")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=["besa"])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-memory")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    model, drawn, text = model_of(options)
    limit = ["--max-memory", options.max_memory] if options.max_memory else []
    asked = {name: getattr(options, name) for name in ("blocks", "samples", "seqlen", "dtype", "max_memory")}
    made = {
        "model": options.model or options.shape, **asked, "commit": besa_runs.commit(),
        "machine": besa_runs.machine(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    made["blocks"] = None if options.model else options.blocks
    for method in options.methods:
        run = options.work / f"run-{method}"
        common = ["--dtype", options.dtype, "--run", str(run)]
        prune = ["prune", "--model", model, "--method", method, *drawn, *limit, *common]
        keep({"command": "prune", "methods": recorded.methods(method), **made, **compare(prune, options.work)})
        if method == options.methods[-1]:
            windows = ["--limit", "2", "--seqlen", str(options.seqlen), "--no-baseline"]
            found = compare(["eval", "ppl", text, *windows, *common], options.work)
            keep({"command": "eval ppl", "methods": {}, **made, **found})
        shutil.rmtree(run)


def keep(line: Line) -> None:
    """Print a line and add it to the others."""
    besa_runs.append_line(LINES, dict(line))
    print(json.dumps(line), flush=True)


def table() -> str:
    """What was said of memory and disk, and what was measured, in Markdown: the newest line of everything asked."""
    told = ("command", "model", "blocks", "samples", "seqlen", "dtype", "max_memory")
    newest = {(*(line[name] for name in told), *line["methods"]): line for line in besa_runs.read_lines(LINES)}
    rows = ["| model | command | memory, MB | ratio | disk, MB | ratio |", "|---|---|---|---|---|---|"]
    rows += [f"| {_model(line)} | {_command(line)} | {_both(line, 'memory')} | {_both(line, 'disk')} |"
             for line in newest.values()]  # fmt: skip
    return "\n".join(rows)


def _model(line: Line) -> str:
    name = line["model"] if line["blocks"] is None else f"{line['blocks']} blocks of {line['model'].upper()}"
    limit = f", `--max-memory {line['max_memory']}`" if line["max_memory"] else ""
    return f"{name}, {line['samples']} × {line['seqlen']}, {line['dtype']}{limit}"


def _command(line: Line) -> str:
    words = f"{line['command']}, {', '.join(line['methods'])}" if line["methods"] else f"{line['command']}, two windows"
    return recorded.marked(words, line)


def _both(line: Line, name: str) -> str:
    said, found = line["said"].get(name), line["measured"].get(name)
    return f"{said / 1e6:,.0f} / {found / 1e6:,.0f} | {said / found:.2f}" if said and found else "| "


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
