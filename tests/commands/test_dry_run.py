"""`--dry-run` on prune, quantize, eval ppl and export: every check, a forecast, and not a byte written."""

import json
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support import tiny_models
from transformers import AutoConfig

from besa_cli.checkpoint.runs import Run
from besa_cli.jobs.stage import StageJob
from besa_cli.stream import forecast
from besa_cli.stream.block import Phase
from besa_cli.system import compute

Besa = Callable[..., Any]  # conftest.Outcome


@pytest.fixture
def words(workplace: Path) -> list[str]:
    model = tiny_models.add_tokenizer(tiny_models.checkpoint(workplace / "model", blocks=3, dtype=torch.bfloat16))
    rows = tiny_models.rows_file(workplace / "rows.jsonl", tiny_models.tokens(5, 12))
    (workplace / "text.txt").write_text("w3 w4 w5 w9 " * 60)
    drawn = ["--data", str(rows), "--samples", "5", "--seqlen", "12"]
    return ["prune", "--model", str(model), "--dtype", "float32", *drawn]


@pytest.mark.parametrize("method", ["besa", "wanda", "sparsegpt"])
def test_prune_says_what_it_would_take_and_writes_nothing(
    method: str, besa: Besa, words: list[str], workplace: Path
) -> None:
    before = tiny_models.files(workplace, without=())
    found = besa(*words, "--method", method, "--dry-run", "--json")
    assert found.code == 0, found.err
    said = json.loads(found.out)
    assert tiny_models.files(workplace, without=()) == before
    assert (said["blocks"], said["left"], said["in_files"], said["batch"]) == (3, 3, False, 85)
    assert said["seconds"] > 0
    weights = sum(tensor.nbytes for tensor in tiny_models.weights(workplace / "model").values())
    assert weights <= said["disk"] < 1.2 * weights
    assert besa(*words, "--method", method).code == 0
    again = besa(*words, "--method", method, "--dry-run", "--json")
    assert json.loads(again.out) == {"done": True}


def test_the_memory_that_is_said_is_that_of_the_model_of_memory(
    besa: Besa, words: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what this process holds: a sample more is two hidden states of 12 tokens, and 12 tokens in a pass."""
    for name in ("resident", "peak_resident"):
        monkeypatch.setattr(compute, name, lambda: 0)
    said = []
    for samples in ("2", "3", "4"):
        found = besa(*words, "--method", "wanda", "--samples", samples, "--dry-run", "--json")
        assert found.code == 0, found.err
        said.append(json.loads(found.out)["memory"])
    hidden = AutoConfig.from_pretrained(workplace / "model").hidden_size
    states = 2 * 12 * hidden * 4
    assert all(states <= more - fewer < 20 * states for fewer, more in pairwise(said))


def test_what_would_be_refused_is_refused(besa: Besa, words: list[str], workplace: Path) -> None:
    for more, code, line in (
        (["--max-memory", "100MB"], 2, "--max-memory 0.1GB is too little"),
        (["--run", "text.txt"], 1, "text.txt"),
    ):
        found = besa(*words, *more, "--dry-run")
        assert (found.code, line in found.err) == (code, True), found.err
    assert besa(*words, "--sparsity", "0.4").code == 0
    found = besa(*words, "--dry-run")
    assert found.code == 1
    assert "holds a finished stage made with other options: sparsity 0.4 there, 0.5 asked" in found.err


def test_quantize_and_eval(besa: Besa, words: list[str], workplace: Path) -> None:
    assert besa(*words, "--method", "wanda").code == 0
    before = tiny_models.files(workplace, without=())
    quantized = besa("quantize", "--method", "gptq", "--group-size", "8", "--dtype", "float32", "--dry-run", "--json")
    assert quantized.code == 0, quantized.err
    assert json.loads(quantized.out)["left"] == 3
    measured = besa("eval", "ppl", "text.txt", "--seqlen", "12", "--dtype", "float32", "--dry-run", "--json")
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)["disk"] == 0
    assert tiny_models.files(workplace, without=()) == before
    table = besa("eval", "ppl", "text.txt", "--seqlen", "12", "--dtype", "float32", "--dry-run")
    assert "memory" in table.out
    assert "3 of 3 blocks are left" in table.out


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("pruned", ["--format", "hf", "--dtype", "float32"]),
        ("pruned", ["--format", "sparse"]),
        ("quantized", ["--format", "sparse"]),
        ("quantized", ["--format", "compressed-tensors"]),
    ],
)
def test_an_export_says_what_it_would_take_and_writes_nothing(
    stage: str, more: list[str], besa: Besa, words: list[str], workplace: Path
) -> None:
    assert besa(*words, "--method", "wanda").code == 0
    if stage == "quantized":
        assert besa("quantize", "--method", "rtn", "--group-size", "16", "--symmetric", "--dtype", "float32").code == 0
    before = tiny_models.files(workplace, without=())
    found = besa("export", *more, "--dry-run", "--json")
    assert found.code == 0, found.err
    assert tiny_models.files(workplace, without=()) == before
    said = json.loads(found.out)
    assert (said["done"], said["blocks"], said["left"], said["in_files"]) == (False, 3, 3, None)
    assert (
        said["memory"] >= 0.99 * compute.peak_resident()
    )  # what its trial has taken is in it; printing takes a little
    made = besa("export", *more, "--json")
    assert made.code == 0, made.err
    files = json.loads(made.out)["files"]
    written = sum(each["bytes"] for name, each in files.items() if name != "README.md")
    assert said["disk"] == pytest.approx(written, rel=0.01)
    again = besa("export", *more, "--dry-run", "--json")
    assert json.loads(again.out) == {"done": True}


def test_what_an_export_would_refuse_is_refused(besa: Besa, words: list[str], workplace: Path) -> None:
    assert besa(*words, "--method", "wanda").code == 0
    for more, line in (
        (["--format", "compressed-tensors"], "is not quantized"),
        (["--type", "F16"], "not an option of"),
    ):
        found = besa("export", *more, "--dry-run")
        assert found.code != 0
        assert line in found.err
    assert not (workplace / "besa-run" / "export").exists()


def test_a_half_done_stage_is_forecast_from_where_it_is(tmp_path: Path) -> None:
    model = tiny_models.local(tiny_models.checkpoint(tmp_path / "model", blocks=3))
    calibration, request = tiny_models.calibration_set(tiny_models.tokens(5, 12)), tiny_models.request("besa")
    found = []
    for done in (0, 2):
        blocks = StageJob(Run(tmp_path / "run"), model, calibration, request).blocks()
        for _ in range(done):
            next(blocks)
        before = tiny_models.files(tmp_path, without=())
        found.append(StageJob(Run(tmp_path / "run"), model, calibration, request).forecast())
        assert tiny_models.files(tmp_path, without=()) == before
    assert [each.left for each in found] == [3, 1]
    assert found[1].disk < 0.5 * found[0].disk


def test_the_age_of_a_process_is_what_the_system_says() -> None:
    began = psutil.Process().create_time()
    assert compute.age() == pytest.approx(time.time() - began, abs=1.0)


def test_a_trial_is_scaled_by_what_depends_on_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk with 2 s of other work, twice 0.5 s a sample of statistics, 3 s a learning step, 4 updates of 1 s."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def walk(samples: int) -> Iterator[tuple[float, int, int, Phase]]:
        yield from ((0.5, done, samples, "statistics") for done in range(1, samples + 1))
        yield from ((3.0, done, samples, "learning") for done in range(1, samples + 1))
        yield from ((1.0, done, 4, "update") for done in range(1, 5))
        yield from ((0.5, done, samples, "statistics") for done in range(1, samples + 1))

    def seconds(samples: int) -> tuple[float, forecast.Meter]:
        meter, began = forecast.Meter(), now[0]
        for spent, done, total, phase in walk(samples):
            now[0] += spent
            meter.step(done, total, phase)
        now[0] += 2.0
        return now[0] - began, meter

    few, meter = seconds(4)
    many, _ = seconds(40)
    assert meter.extrapolate(few, 10) == pytest.approx(many)
    assert meter.replay_seconds(10) == 0


def test_measured_budgets_take_the_memory_and_the_time_of_the_measurement(
    besa: Besa, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("resident", "peak_resident"):
        monkeypatch.setattr(compute, name, lambda: 0)
    monkeypatch.setattr(forecast, "seconds", lambda decoder, tokens, plan, finished, whole_passes: whole_passes)
    said = []
    for budget in ("uniform", "model"):
        found = besa(*words, "--method", "wanda", "--budget", budget, "--dry-run", "--json")
        assert found.code == 0, found.err
        said.append(json.loads(found.out))
    uniform, model = said
    assert model["memory"] >= uniform["memory"] + (3 + 3 - 2) * 5 * 12 * tiny_models.HIDDEN * 4  # inputs of all blocks
    assert model["seconds"] >= uniform["seconds"] + 8  # passes over all five samples
