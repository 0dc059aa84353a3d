"""Learning curves: the losses of all steps in few points, none lost."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_models, toy_block

from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.jobs.stage import StageJob
from besa_cli.pruners import besa, wanda
from besa_cli.stream import descent


@given(st.integers(1, 8), st.data())
def test_a_curve_is_the_means_of_equal_parts(size: int, data: st.DataObject) -> None:
    steps = size * descent.CURVE_POINTS
    history = data.draw(st.lists(st.floats(0, 1e6), min_size=steps, max_size=steps))
    expected = np.array(history).reshape(descent.CURVE_POINTS, size).mean(axis=1)
    assert descent.curve(history) == pytest.approx(expected.tolist())


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=400))
def test_a_curve_of_any_length_is_short_and_follows_its_steps(history: list[float]) -> None:
    found = descent.curve(sorted(history))
    assert len(found) == min(len(history), descent.CURVE_POINTS)
    assert all(before <= after * (1 + 1e-12) for before, after in pairwise(found))
    shortest = len(history) // len(found)
    ends = [math.fsum(sorted(history)[-size:]) / size for size in (shortest, shortest + 1)]
    assert found[0] == pytest.approx(math.fsum(sorted(history)[:shortest]) / shortest)
    assert any(math.isclose(found[-1], end, abs_tol=1e-9) for end in ends)


def test_few_steps_are_the_curve_themselves() -> None:
    assert descent.curve([3.0, 1.0, 2.0]) == (3.0, 1.0, 2.0)
    assert descent.curve([]) == ()


def test_besa_notes_every_step_of_its_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    curve = descent.curve

    def noted(history: list[float]) -> tuple[float, ...]:
        seen.append(list(history))
        return curve(history)

    monkeypatch.setattr(descent, "curve", noted)
    weights = toy_block.source()
    block = toy_block.block(weights, toy_block.size(weights) // 2)
    found = besa.prune(block, besa.Options(epochs=3, batch_size=2))
    (history,) = seen
    assert len(history) == 3 * math.ceil(block.rank_share.samples / 2)
    assert found.curve == curve(history)
    assert found.learned_loss == descent.tail_mean(history)
    assert wanda.prune(toy_block.block(weights, 5), wanda.Options()).curve == ()


@pytest.mark.parametrize(
    ("method", "options"), [("besa", {"window": "attn-mlp", "epochs": 2}), ("besa", {}), ("wanda", {})]
)
def test_the_report_on_disk_holds_the_curve(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_models.local(tiny_models.checkpoint(tmp_path / "model"))
    calibration = tiny_models.calibration_set(tiny_models.tokens(16, 16))
    job = StageJob(Run(tmp_path / "run"), model, calibration, tiny_models.request(method, **options))
    made = list(job.blocks())
    stored = Stage(tmp_path / "run" / "pruned", len(made))
    for report in made:
        assert stored.report(report.index).curve == report.curve
        if method == "wanda":
            assert report.curve == ()
            assert "curve" not in report.record()
        else:
            assert len(report.curve) == min(16 * options.get("epochs", 1), descent.CURVE_POINTS)
