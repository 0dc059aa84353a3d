"""What reading the next block and writing the last one beside the computing gains: the same prune without and with.

    python -m benchmarks.speed.bench_overlap --model DIR --samples 8 --seqlen 256 --method wanda --turns 3

Random tokens, fp32. Seconds by the clock, and of the processor; and what there is to gain at most: reading a block and
writing it (digest, file, flush) alone.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from besa_cli.calibration.calibration_set import CalibrationSet, tokens_digest
from besa_cli.checkpoint import weights
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.jobs import prune
from besa_cli.jobs.stage import StageJob
from besa_cli.models import Model
from besa_cli.system import compute


def _always(answer: bool, device: torch.device) -> bool:
    return answer


@contextmanager
def timed(into: list[tuple[float, float]]) -> Iterator[None]:
    """Add the seconds by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    yield
    into.append((time.perf_counter() - clock, time.process_time() - processor))


def shown(found: list[tuple[float, float]]) -> str:
    """The medians."""
    clock, processor = (statistics.median(part) for part in zip(*found, strict=True))
    return f"{clock:.3f} s by the clock, {processor:.3f} s of the processor"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    tokens = torch.randint(3, 1000, (options.samples, options.seqlen), generator=torch.Generator().manual_seed(0))
    drawn = {"data": ["random"], "samples": options.samples, "seqlen": options.seqlen, "seed": 0, "pack": None}
    manifest: Any = {"options": drawn, "sources": [], "tokens_digest": tokens_digest(tokens)}
    calibration_set = CalibrationSet(tokens=tokens, manifest=manifest)
    model = Model(name=str(options.model), kind="local", directory=options.model, revision=None)
    request = prune.request(method=options.method, options={}, device=options.device, dtype="float32")
    walks: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    reading: list[tuple[float, float]] = []
    writing: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(prefix="besa-overlap-") as place:
        for turn in range(2 * options.turns):
            overlapping = bool(turn % 2)
            compute.overlaps = partial(_always, overlapping)
            job = StageJob(Run(Path(place) / str(turn)), model, calibration_set, request)
            with timed(walks[overlapping]):
                blocks = len(list(job.blocks()))
            stage = Stage(Path(place) / str(turn) / "pruned", blocks)
            with timed(reading):
                tensors = weights.read_file(stage.shard(blocks - 1))
            report = stage.report(blocks - 1)
            stage.shard(blocks - 1).unlink()
            with timed(writing):
                stage.write(report, tensors, {})
    print(f"{options.method}, {options.samples} x {options.seqlen}, {blocks} blocks")
    for overlapping, found in walks.items():
        print(f"{'overlapping' if overlapping else 'one after the other'}: {shown(found)}")
    print(f"reading a block: {shown(reading)}")
    print(f"writing it: {shown(writing)}")


if __name__ == "__main__":
    main()
