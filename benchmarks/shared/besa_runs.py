"""What the measuring scripts share: running `besa`, and one JSON line for every finished cell."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"  # recorded lines, and the pages made of them


def besa(*words: str) -> dict[str, Any]:
    """Run one command and return the JSON object it prints.

    Raises
    ------
    subprocess.CalledProcessError
        It failed; what it said stands on the terminal.
    """
    command = [sys.executable, "-m", "besa_cli", *words, "--json"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


def calibrated(tokens: Path, work: Path, model: str) -> Path:
    """Protocol A's calibration set in `work`, 128 × 512 tokens: drawn from the file `tokens` where it is not there."""
    there = work / "tokens" / "calibration"
    if not there.exists():
        drawn = ["--data", str(tokens), "--samples", "128", "--seqlen", "512", "--run", str(there.parent)]
        besa("calibrate", "--model", model, *drawn)
    return there


def perplexity(*words: str) -> float:
    """Protocol A's perplexity: WikiText-2 raw test, windows of 2048, the first 16; `words` say of what."""
    found: float = besa("eval", "ppl", "wikitext2", "--limit", "16", *words)["results"][0]["perplexity"]
    return found


def facts(directory: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What is kept of how a stage was made."""
    seconds, peak_memory = spent(directory)
    return {
        "counts": manifest["counts"],
        "compute": manifest["compute"],
        "versions": manifest["versions"],
        "seconds": round(seconds),
        "peak_memory": peak_memory,
        "machine": machine(),
        "commit": commit(),
    }


def spent(stage: Path) -> tuple[float, int]:
    """Seconds of making a stage, those of interrupted attempts included, and the peak resident memory in bytes."""
    lines = read_lines(stage / "timing.jsonl")
    worked = [line for line in lines if not line["resumed"]]
    return sum(line["seconds"] for line in worked), max((line["peak_memory"] for line in worked), default=0)


def machine() -> str:
    """Processor and cores."""
    return f"{platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit that is checked out, where there is one."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def newest(path: Path) -> dict[str, dict[str, Any]]:
    """The newest line of every cell in a file of results."""
    return {line["cell"]: line for line in read_lines(path)}


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add one JSON object, and return when it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
