"""Sparse exports measured from their packed weights, beside the stage that they were made from."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import exported, tiny_models
from support.task_files import data_dir
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from besa_cli.checkpoint.runs import Run
from besa_cli.evaluation import packed_perplexity
from besa_cli.inference import loading
from besa_cli.runtime.linear import PackedLinear

Besa = Callable[..., Any]  # conftest.Outcome

WORDS = " ".join(f"w{number}" for number in tiny_models.tokens(1, 16 * 7 + 5, seed=5)[0].tolist())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run directory with a stage and its sparse export."""
    made = exported.stage(tmp_path_factory.mktemp("sparse"))
    exported.export(made, "sparse")
    return made


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    return path


def plain_loop(directory: Path, seqlen: int, stride: int, limit: int) -> float:
    """Perplexity of a stage by stock transformers: windows of which only the tokens that are new in each count."""
    ids = torch.tensor(PreTrainedTokenizerFast.from_pretrained(directory)(WORDS)["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    total = count = 0.0
    with torch.no_grad():
        for start in range(0, limit * stride, stride):
            window = ids[None, start : start + seqlen]
            labels = window.clone()
            labels[:, : 0 if start == 0 else seqlen - stride] = -100
            new = int((labels[:, 1:] != -100).sum())
            total, count = total + float(model(window, labels=labels).loss) * new, count + new
    return math.exp(total / count)


def refused(outcome: Any, code: int, *words: str) -> None:
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert len([line for line in outcome.err.splitlines() if line.startswith("error: ")]) == 1
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize(("stride", "limit", "batch"), [(16, 7, 1), (16, 5, 2), (6, 9, 4)])
def test_the_perplexity_is_that_of_the_stage(
    stride: int, limit: int, batch: int, besa: Besa, run: Run, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    original = loading.load

    def load(*arguments: Any) -> Any:
        loaded.append(original(*arguments))
        return loaded[-1]

    monkeypatch.setattr(loading, "load", load)
    asked = ["--seqlen", 16, "--stride", stride, "--limit", limit, "--batch-size", batch, "--dtype", "float32"]
    outcome = besa("eval", "ppl", text, "--model", run.exports / "sparse", *asked, "--json")
    (result,) = json.loads(outcome.out)["results"]
    expected = plain_loop(run.stage("pruned"), 16, stride, limit)
    assert result["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert (result["windows"], result["dense"]) == (limit, None)
    assert any(isinstance(module, PackedLinear) for module in loaded[0].modules())


def test_results_are_kept_apart_from_those_of_the_stage(besa: Besa, run: Run, text: Path) -> None:
    asked = ["eval", "ppl", text, "--run", run.path, "--seqlen", 16, "--dtype", "float32", "--json"]
    stage = json.loads(besa(*asked, "--no-baseline").out)["results"][0]
    outcome = besa(*asked, "--model", run.exports / "sparse")
    assert "result taken from" not in outcome.err
    packed = json.loads(outcome.out)["results"][0]
    assert packed["model_digest"] != stage["model_digest"]
    assert packed["perplexity"] == pytest.approx(stage["perplexity"], rel=1e-5)
    again = besa(*asked, "--model", run.exports / "sparse")
    assert "result taken from" in again.err
    assert json.loads(again.out)["results"][0] == packed


def test_an_interrupted_measurement_resumes_after_its_last_batch(
    besa: Besa, run: Run, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logits, windows = packed_perplexity._logits, []

    def interrupted(model: Any, tokens: Any) -> Any:
        windows.append(len(tokens))
        if len(windows) == 3:
            raise KeyboardInterrupt
        return logits(model, tokens)

    monkeypatch.setattr(packed_perplexity, "_logits", interrupted)
    copied = exported.copy_of(run, tmp_path / "copy")
    asked = ["eval", "ppl", text, "--run", copied.path, "--model", run.exports / "sparse", "--seqlen", 16, "--json"]
    stopped = besa(*asked)
    assert stopped.code == 130
    assert "2 windows are measured and kept" in stopped.err
    finished = json.loads(besa(*asked).out)["results"][0]
    assert windows == [1] * (3 + 5)
    whole = besa("eval", "ppl", text, "--model", run.exports / "sparse", "--seqlen", 16, "--json")
    assert finished["perplexity"] == json.loads(whole.out)["results"][0]["perplexity"]


def test_a_forecast_measures_nothing(besa: Besa, run: Run, text: Path) -> None:
    asked = ["--model", run.exports / "sparse", "--seqlen", 16, "--dry-run", "--json"]
    record = json.loads(besa("eval", "ppl", text, *asked).out)
    assert (record["done"], record["blocks"]) == (False, 2)
    assert record["seconds"] > 0


def test_tasks_score_as_the_stage_in_memory(besa: Besa, run: Run, tmp_path: Path) -> None:
    data = data_dir(tmp_path / "data", tasks=("piqa", "boolq"))
    asked = ["eval", "tasks", "piqa,boolq", "--data-dir", data, "--dtype", "float32", "--json", "--model"]
    stage = besa(*asked, run.stage("pruned"), "--in-memory")
    packed = besa(*asked, run.exports / "sparse")
    assert packed.code == 0, packed.err
    scores = [
        [
            (score["task"], score["metric"], score["value"])
            for result in json.loads(outcome.out)["results"]
            for score in result["scores"]
        ]
        for outcome in (stage, packed)
    ]
    assert scores[0] == scores[1]
    assert len(scores[0]) >= 2
    assert "may be ignored" not in packed.err


def test_a_prompt_is_continued_as_by_the_stage(besa: Besa, run: Run) -> None:
    asked = ["eval", "sample", "w5 w9", "--tokens", 12, "--dtype", "float32", "--json", "--model"]
    texts = [
        list(json.loads(besa(*asked, directory).out)["continuations"].values())
        for directory in (run.stage("pruned"), run.exports / "sparse")
    ]
    assert texts[0] == texts[1]
    assert texts[0][0].startswith("w")


def test_what_a_packed_model_cannot_do_is_refused(besa: Besa, run: Run, text: Path, tmp_path: Path) -> None:
    sparse = run.exports / "sparse"
    refused(besa("eval", "ppl", text, "--model", sparse, "--device", "cuda"), 2, "packed weights, on the CPU")
    data = data_dir(tmp_path / "data", tasks=("piqa",))
    asked = ["eval", "tasks", "piqa", "--data-dir", data, "--model", sparse, "--streamed"]
    refused(besa(*asked), 2, "--streamed", "packed weights, in memory")
    refused(besa("simulate", "--model", sparse), 1, "already compressed (besa)")


def test_a_damaged_export_is_refused(besa: Besa, run: Run, text: Path, tmp_path: Path) -> None:
    copied = exported.export(exported.copy_of(run, tmp_path / "copy"), "sparse")
    (file,) = copied.glob("sparse-00002-*")
    file.write_bytes(file.read_bytes()[:-3])
    refused(besa("eval", "ppl", text, "--model", copied, "--seqlen", 16), 1, file.name, "is damaged")
