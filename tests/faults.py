"""Kill `besa prune` at random moments, run it again, and compare what it makes with an uninterrupted run.

    python tests/faults.py                                   # `make faults`
    python tests/faults.py --tiny-runs 100 --demo-runs 0 --seed 7

Each run is killed with SIGKILL after a random part of the time that an uninterrupted one takes, once to three times in
a row, and then left to end. All files of the run directory have to be the same but for ``timing.jsonl`` and the lock's.
Exits with 1 if any differ. Not collected by pytest: `tests/test_resume.py` dies at named points instead.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import tiny

ROOT = Path(__file__).parent.parent
TRANSIENT = ("timing.jsonl", ".lock", ".holder.json")
MOST_KILLS = 3
TINY_METHODS = (
    ["--method", "besa", "--epochs", "3"],
    ["--method", "besa", "--granularity", "layer", "--target", "stream", "--epochs", "3"],
    ["--method", "sparsegpt", "--nm", "2:4"],
)


@dataclass(kw_only=True)
class Tally:
    """What became of the runs on one model."""

    model: str
    runs: int = 0
    kills: int = 0
    in_a_stage: int = 0
    different: int = 0


def start(words: Sequence[str], run: Path) -> "subprocess.Popen[bytes]":
    """Start one `besa prune`; what it says goes to a file beside the run directory."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONPATH": str(ROOT)}
    with run.with_suffix(".log").open("ab") as log:
        command = [sys.executable, "-m", "besa_cli", "prune", *words, "--run", str(run)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def finish(words: Sequence[str], run: Path) -> float:
    """Run to the end; returns the seconds."""
    began = time.perf_counter()
    if start(words, run).wait():
        raise SystemExit(f"besa prune {' '.join(words)} failed:\n{run.with_suffix('.log').read_text()}")
    return time.perf_counter() - began


def killed(words: Sequence[str], run: Path, delay: float) -> bool:
    """Start, wait and kill; whether there was still something to kill."""
    process = start(words, run)
    try:
        process.wait(timeout=delay)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    return False


def interrupted(words: Sequence[str], run: Path, whole: dict[str, bytes], seconds: float, tally: Tally) -> None:
    """One run with kills, compared with the files of an uninterrupted one."""
    tally.runs += 1
    for _ in range(random.randint(1, MOST_KILLS)):
        if killed(words, run, random.uniform(0, seconds)):
            tally.kills += 1
            tally.in_a_stage += (run / "pruned" / "besa.json").exists()
    finish(words, run)
    found = tiny.files(run, without=TRANSIENT)
    differ = sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))
    if differ:
        tally.different += 1
        sys.stderr.write(f"{run.name} of {tally.model} differs in {', '.join(differ)}\n")
    shutil.rmtree(run)


def campaign(name: str, variants: Sequence[Sequence[str]], runs: int, place: Path) -> Tally:
    """`runs` interrupted runs, in turn over the variants, each compared with one uninterrupted run of its variant."""
    tally = Tally(model=name)
    references: list[tuple[float, dict[str, bytes]]] = []
    for number, words in enumerate(variants[:runs]):
        whole = place / f"{name}-whole-{number}"
        seconds = finish(words, whole)
        references.append((seconds, tiny.files(whole, without=TRANSIENT)))
        shutil.rmtree(whole)
    for number in range(runs):
        seconds, whole_files = references[number % len(references)]
        words = variants[number % len(references)]
        interrupted(words, place / f"{name}-{number}", whole_files, seconds, tally)
        sys.stderr.write(f"{name}: {number + 1} of {runs} runs, {tally.kills} kills, {tally.different} different\n")
    return tally


def tiny_variants(place: Path) -> list[list[str]]:
    """Commands on a tiny model of four blocks."""
    model = tiny.checkpoint(place / "tiny", blocks=4, dtype=torch.bfloat16, shard_size="20KB")
    rows = tiny.rows_file(place / "tiny.jsonl", tiny.tokens(8, 32))
    drawn = ["--model", str(model), "--data", str(rows), "--samples", "8", "--seqlen", "32", "--dtype", "float32"]
    return [[*drawn, *method] for method in TINY_METHODS]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both campaigns and print the table; 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny-runs", type=int, default=30)
    parser.add_argument("--demo-runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    random.seed(options.seed)
    demo = ["--data", "bundled", "--samples", "8", "--seqlen", "128"]
    tallies = []
    with tempfile.TemporaryDirectory(prefix="besa-faults-") as name:
        place = Path(name)
        if options.tiny_runs:
            tallies.append(campaign("tiny", tiny_variants(place), options.tiny_runs, place))
        if options.demo_runs:
            tallies.append(campaign("smollm2-135m", [["--model", "smollm2-135m", *demo]], options.demo_runs, place))
    write = sys.stdout.write
    write(f"{'model':14} {'runs':>5} {'kills':>6} {'in a stage':>11} {'identical':>10} {'different':>10}\n")
    for tally in tallies:
        same = tally.runs - tally.different
        cells = f"{tally.runs:5} {tally.kills:6} {tally.in_a_stage:11} {same:10} {tally.different:10}"
        write(f"{tally.model:14} {cells}\n")
    return int(any(tally.different for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
