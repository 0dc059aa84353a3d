"""File of measured speeds in the run directory: the machine, what every contender reached, and how they compare."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge
from typing_extensions import TypedDict

from besa_cli.bench.rounds import SpeedComparison, Speeds
from besa_cli.checkpoint import manifests
from besa_cli.checkpoint.manifests import Digest
from besa_cli.checkpoint.runs import Run
from besa_cli.system import disk, lock
from besa_cli.system.disk import Json, JsonObject
from besa_cli.system.records import strict

Amount = Annotated[float, Ge(0)]


@strict
class RecordedLoad(TypedDict):
    """Tokens of a prompt, tokens generated after it, and sequences at a time."""

    prompt: Annotated[int, Ge(1)]
    new: Annotated[int, Ge(1)]
    batch: Annotated[int, Ge(1)]


@strict
class RecordedSpeeds(TypedDict):
    """Tokens per second and resident bytes of one contender on one workload."""

    name: str
    workload: RecordedLoad
    prefill: Amount
    decode: Amount
    resident: Annotated[int, Ge(0)]


@strict
class RecordedMachine(TypedDict):
    """Machine that was measured on."""

    processor: str
    threads: int


@strict
class SpeedRecord(TypedDict):
    """Fields of a measurement that a report shows."""

    kind: Literal["speed"]
    model_digest: Digest
    machine: RecordedMachine
    bandwidth: Amount
    rounds: Annotated[int, Ge(1)]
    results: list[RecordedSpeeds]


def record(
    results: Sequence[Speeds], comparisons: Sequence[SpeedComparison], machine: Json, bandwidth: float, rounds: int
) -> JsonObject:
    """Return a measurement as JSON data."""
    return {
        "machine": dict(machine),
        "bandwidth": bandwidth,
        "rounds": rounds,
        "results": [{**asdict(each), "workload": each.workload._asdict()} for each in results],
        "comparisons": [{**asdict(each), "workload": each.workload._asdict()} for each in comparisons],
    }


def save(measured: Json, run: Run, name: str, digest: str) -> Path:
    """Write a measurement of a run's stage to ``speed/`` and return the file.

    The same contenders and workloads on the same machine give the same name: the newest measurement is kept.

    Parameters
    ----------
    measured : mapping
        The result of `record`.
    run : Run
    name : str
        Name of the model.
    digest : str
        Digest of the stage's content.

    Raises
    ------
    BesaError
        The file cannot be written.
    """
    told_apart = [
        digest,
        [measured["machine"][each] for each in ("processor", "threads")],
        [[each["name"], each["workload"]] for each in measured["results"]],
    ]
    key = hashlib.sha256(json.dumps(told_apart, sort_keys=True).encode()).hexdigest()[:8]
    file = run.speeds / f"bench-{digest[:8]}-{key}.json"
    content = {
        "format": manifests.FORMAT,
        "kind": "speed",
        "model": {"name": name},
        "model_digest": digest,
        **measured,
        "versions": manifests.versions(),
    }
    with lock.hold_results(run.path):
        disk.sweep(file)
        disk.write_json(file, content)
    return file
