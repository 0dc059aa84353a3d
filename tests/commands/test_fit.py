"""`besa fit` from beginning to end on a tiny model: the answer, resuming, and targets out of reach."""

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from support import tiny_models

from besa_cli.app import main
from besa_cli.commands.shared import subcommand

Besa = Callable[..., Any]  # conftest.Outcome
WORDS = ("fit", "--model", "m", "--data", "text.txt", "--samples", 4, "--seqlen", 16, "--pack", "--dtype", "float32")
MEASURED = ("--eval-text", "text.txt", "--eval-limit", 4, "--eval-seqlen", 16, "--method", "wanda", "--step", 0.2)


def call_here(words: Sequence[str], *, output: str = "shown") -> str:
    """What `subcommand.call` does, in this process: a process of its own takes seconds to start."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = main(words)
    if code:
        raise typer.Exit(code)
    return text.getvalue() if output == "returned" else ""


@pytest.fixture
def place(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model with a tokenizer, and a text."""
    monkeypatch.setattr(subcommand, "call", call_here)
    tiny_models.add_tokenizer(tiny_models.checkpoint(workplace / "m"))
    (workplace / "text.txt").write_text(" ".join(f"w{number % 60}" for number in range(4000)), encoding="utf-8")
    return workplace


def test_the_answer_is_a_run_and_its_sparser_neighbour_misses(place: Path, besa: Besa) -> None:
    outcome = besa(*WORDS, *MEASURED, "--max-kl", 0.1, "--bits", "none", "--bits", 8, "--json")
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)
    answer, attempts = told["answer"], told["attempts"]
    assert answer["kl"] <= 0.1
    assert 0 < answer["sparsity"] < 0.9
    sparser = [
        attempt
        for attempt in attempts
        if attempt["bits"] == answer["bits"] and attempt["sparsity"] == pytest.approx(answer["sparsity"] + 0.2)
    ]
    assert [attempt["kl"] > 0.1 for attempt in sparser] == [True], attempts
    results = [json.loads(path.read_text()) for path in Path(answer["run"], "eval").glob("ppl-*.json")]
    assert answer["kl"] in [result["kl"] for result in results]
    stage = "pruned" if answer["bits"] is None else "quantized"
    manifest = json.loads(Path(answer["run"], stage, "besa.json").read_text())
    assert manifest["counts"]["sparsity"] == pytest.approx(answer["sparsity"], abs=1e-3)

    assert told["cost"]["models"] == len(attempts)
    assert told["cost"]["seconds"] == pytest.approx(sum(attempt["seconds"] for attempt in attempts))

    record = (place / "besa-fit/fit.json").read_bytes()
    again = besa(*WORDS, *MEASURED, "--max-kl", 0.1, "--bits", "none", "--bits", 8, "--json")
    assert (again.code, again.out) == (0, outcome.out)
    assert (place / "besa-fit/fit.json").read_bytes() == record

    looser = besa(*WORDS, *MEASURED, "--max-kl", 0.3, "--bits", "none", "--bits", 8, "--json")
    assert looser.code == 0
    assert json.loads(looser.out)["attempts"][: len(attempts)] == [
        {**attempt, "meets": attempt["kl"] <= 0.3} for attempt in attempts
    ]

    other = besa(*WORDS, *MEASURED, "--max-kl", 0.1, "--seed", 1)
    assert other.code == 1
    assert "besa-fit holds a search with seed 0, not 1" in other.err


def test_a_search_killed_between_two_attempts_goes_on_with_the_next(place: Path, besa: Besa) -> None:
    words = (*WORDS, *MEASURED, "--max-kl", 0.1, "--bits", "none", "--json")
    whole = json.loads(besa(*words).out)
    file = place / "besa-fit/fit.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "attempts": record["attempts"][:1]}))
    stages = {path: path.stat().st_mtime_ns for path in place.glob("besa-fit/*/pruned/*.safetensors")}
    resumed = json.loads(besa(*words).out)
    assert resumed["answer"] == whole["answer"]
    assert [{**attempt, "seconds": 0} for attempt in resumed["attempts"]] == [
        {**attempt, "seconds": 0} for attempt in whole["attempts"]
    ]
    assert stages == {path: path.stat().st_mtime_ns for path in place.glob("besa-fit/*/pruned/*.safetensors")}


def test_targets_that_no_candidate_meets_name_the_nearest(place: Path, besa: Besa) -> None:
    outcome = besa(*WORDS, *MEASURED, "--max-kl", 1e-9, "--bits", 3, "--bits", 2)
    assert outcome.code == 1
    assert "the nearest, sparsity 0.00 %, 3 bits, has perplexity" in outcome.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no target is given"),
        (("--size", "1KB"), "--size 1 kB cannot be met: the smallest candidate, sparsity 90.00 %, 3 bits"),
        (("--bits-per-weight", 0.1), "--bits-per-weight 0.1 cannot be met"),
        (("--max-kl", 0), "--max-kl 0.0 is not a positive number"),
        (("--max-ppl", "inf"), "--max-ppl inf is not a positive number"),
        (("--max-kl", 1, "--bits", 5), "--bits 5 is not one of"),
        (("--max-kl", 1, "--bits", "few"), "--bits 'few' is neither"),
        (("--max-kl", 1, "--bits", 4, "--bits", 4), "--bits 4 is given twice"),
        (("--max-kl", 1, "--step", 0.003), "--step 0.003"),
        (("--max-kl", 1, "--method", "wandas"), "unknown method 'wandas'"),
        (("--max-kl", 1, "--method", "wanda", "--preset", "best"), "exclude each other"),
        (("--size", "large"), "--size 'large' is not a size"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_work(
    words: tuple[object, ...], said: str, place: Path, besa: Besa
) -> None:
    outcome = besa("fit", "--model", "m", *words)
    assert outcome.code in (1, 2)
    assert said in outcome.err
    assert not (place / "besa-fit").exists()


def test_a_dry_run_shows_the_candidates_and_writes_nothing(place: Path, besa: Besa) -> None:
    outcome = besa("fit", "--model", "m", "--bits-per-weight", 4, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    listed = json.loads(outcome.out)["candidates"]
    assert listed
    assert all(candidate["bits_per_weight"] <= 4 for candidate in listed)
    assert not (place / "besa-fit").exists()


def test_a_command_that_fails_ends_the_search_with_its_code(workplace: Path, besa: Besa) -> None:
    tiny_models.checkpoint(workplace / "m")  # without a tokenizer, which calibrate misses
    outcome = besa(*WORDS, *MEASURED, "--max-kl", 0.1)
    assert outcome.code == 1
    assert "tokenizer" in outcome.err
    assert not (workplace / "besa-fit/fit.json").exists()
