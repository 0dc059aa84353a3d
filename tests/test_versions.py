"""A method whose results change gets another version: each is compared with what its version did when it was recorded.

`python tests/test_versions.py` records anew, once the numbers in `VERSIONS` are raised.
"""

import base64
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_models

from besa_cli import pruners, quantizers
from besa_cli.calibration.calibration_set import CalibrationSet
from besa_cli.checkpoint.runs import Run
from besa_cli.jobs import quantize, tune
from besa_cli.jobs.stage import StageJob
from besa_cli.jobs.tune_job import TuneJob
from besa_cli.models import Model
from besa_cli.stream import tuning

RECORD = Path(__file__).parent / "versions.json"
ALIKE = 0.99  # of the decisions: rounding, of another machine too, turns fewer
BITS = 2
METHODS = [*pruners.PRUNERS, *quantizers.QUANTIZERS, "tune"]


def version(method: str) -> int:
    """Today's."""
    return {**quantizers.VERSIONS, **pruners.VERSIONS, "tune": tuning.VERSION}.get(method, 1)


def decisions(method: str, place: Path) -> np.ndarray:
    """What a method makes of every weight of a tiny model: kept or not, a code, or where it moved, in one row."""
    source = tiny_models.local(tiny_models.checkpoint(place / "source", blocks=1))
    rows = tiny_models.calibration_set(tiny_models.tokens(samples=32))
    (names,) = tiny_models.linear_names(tiny_models.built(tiny_models.config("llama", blocks=1)), "model.layers")
    if method == "tune":
        before, after = (tiny_models.weights(stage) for stage in _pruned_and_tuned(source, rows, place / "run"))
        moved = [(after[name] - before[name]).sign() for name in names]  # 0: pruned, or not at all
        return np.concatenate([(sign % 3).numpy().astype(np.uint8).ravel() for sign in moved])
    if method in pruners.PRUNERS:
        tiny_models.run(StageJob(Run(place / "run"), source, rows, tiny_models.request(method)))
        made = tiny_models.weights(place / "run" / "pruned")
        return np.concatenate([(made[name] != 0).numpy().astype(np.uint8).ravel() for name in names])
    asked = quantize.request(method=method, options={}, bits=BITS, group_size="16", device="cpu", dtype="float32")
    tiny_models.run(StageJob(Run(place / "run"), source, rows, asked))
    codes = tiny_models.weights(place / "run" / "quantized" / "codes")
    return np.concatenate([codes[name].numpy().ravel() for name in sorted(codes) if name.endswith(".codes")])


def _pruned_and_tuned(source: Model, rows: CalibrationSet, run: Path) -> tuple[Path, Path]:
    pruned = Run(run).stage("pruned")
    tiny_models.run(StageJob(Run(run), source, rows, tiny_models.request("wanda")))
    made = TuneJob(Run(run), tiny_models.local(pruned), rows, tune.request(lr=0.01, device="cpu", dtype="float32"))
    list(made.work())
    made.finish()
    return pruned, Run(run).stage("tuned")


def recorded() -> dict[str, Any]:
    """Method → its version and what it decided."""
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def agreement(method: str, found: np.ndarray) -> float:
    """The share of decisions that are those recorded."""
    packed = np.frombuffer(base64.b64decode(recorded()[method]["decisions"]), np.uint8)
    return float((np.unpackbits(packed)[: 2 * len(found)].reshape(-1, 2) @ (2, 1) == found).mean())


@pytest.mark.parametrize("method", METHODS)
def test_a_method_decides_as_its_version_did(method: str, tmp_path: Path) -> None:
    remedy = "raise its number in VERSIONS, and record: python tests/test_versions.py"
    assert recorded()[method]["version"] == version(method), remedy
    assert agreement(method, decisions(method, tmp_path)) >= ALIKE, remedy


def test_every_record_is_of_a_method_that_there_is() -> None:
    assert set(recorded()) == set(METHODS)
    assert set(pruners.VERSIONS) <= set(pruners.PRUNERS)
    assert set(quantizers.VERSIONS) <= set(quantizers.QUANTIZERS)


def record() -> None:
    """Write what every method decides today."""
    made = {}
    for method in METHODS:
        with tempfile.TemporaryDirectory() as name:
            found = decisions(method, Path(name))
        bits = np.unpackbits(found[:, None], axis=1)[:, -2:]
        packed = base64.b64encode(np.packbits(bits).tobytes()).decode()
        made[method] = {"version": version(method), "decisions": packed}
    RECORD.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    record()
