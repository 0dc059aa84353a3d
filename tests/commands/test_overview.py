"""`besa` without a command: what is here, and a next command that parses."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.written import digest_of, stage_manifest

from besa_cli.commands import prune as prune_command
from besa_cli.commands.overview import _FIRST

Besa = Callable[..., Any]  # conftest.Outcome

SET = {
    "format": 1, "stage": "calibration", "status": "complete", "options": {}, "sampling": "packed",
    "sources": [{"asked": "bundled", "source": "bundled", "file": "a", "sha256": digest_of("a")}],
    "tokenizer_digest": digest_of("t"), "tokens_digest": digest_of("tokens"), "samples": 3, "seqlen": 8, "seed": 0,
    "versions": {}, "model": {"name": "some/model", "kind": "hub", "revision": None},
}  # fmt: skip


def write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def result(run: Path, digest: str, name: str = "besa 50.00 %") -> None:
    figures = {"kind": "perplexity", "dataset": "wikitext2", "perplexity": 12.5, "model_digest": digest}
    write(run / "eval" / f"ppl-{name[:4]}.json", {**figures, "model": {"name": name}})


def said(besa: Besa) -> tuple[list[str], str]:
    """The lines on the parts of the run, and the next command."""
    outcome = besa()
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    (following,) = [line.removeprefix("next: ") for line in lines if line.startswith("next: ")]
    return lines, following


def test_in_an_empty_directory_it_is_the_help_and_the_first_command(besa: Besa) -> None:
    outcome = besa()
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(besa("--help").out)
    assert outcome.out.endswith(f"Begin with:\n  {_FIRST}\n")


def test_each_step_of_a_run_leads_to_the_next(besa: Besa) -> None:
    run = Path("besa-run")
    write(run / "calibration/besa.json", SET)
    lines, following = said(besa)
    assert "3 samples of 8 tokens from bundled" in lines[1]
    assert following == "besa prune --model some/model"

    write(run / "pruned/besa.json", stage_manifest(options={"method": "wanda", "sparsity": 0.3}))
    lines, following = said(besa)
    assert lines[0] == "besa-run: some/model"
    assert lines[2].split(maxsplit=1) == ["pruned", "unfinished, 0 of 2 blocks"]
    assert following == "besa prune --method wanda --sparsity 0.3 --model some/model"

    write(run / "pruned/besa.json", stage_manifest(status="complete"))
    result(run, digest_of("origin"), "dense")
    lines, following = said(besa)
    assert lines[2].split(maxsplit=1) == ["pruned", "50.00 % of the weights pruned"]
    assert not any("perplexity" in line for line in lines), "the dense model's result is not the run's"
    assert following == "besa eval ppl wikitext2"

    result(run, digest_of("an earlier stage"))
    assert said(besa)[1] == "besa eval ppl wikitext2"
    result(run, digest_of("stage"))
    lines, following = said(besa)
    assert any(line.endswith("besa 50.00 %: perplexity 12.5000 on wikitext2") for line in lines)
    assert following == "besa export"


def test_a_stored_continuation_is_no_figure(besa: Besa) -> None:
    run, manifest = Path("besa-run"), stage_manifest(status="complete")
    write(run / "pruned/besa.json", manifest)
    sample = {"kind": "continuation", "model_digest": manifest["digest"], "prompt": "p", "text": "t"}
    write(run / "eval/sample-1.json", {**sample, "model": {"name": "besa 50.00 %"}})
    lines, following = said(besa)
    assert not any("newest result" in line for line in lines)
    assert following == "besa eval ppl wikitext2"


def test_the_newest_result_may_be_that_of_a_task_and_other_files_are_not_results(besa: Besa) -> None:
    run = Path("besa-run")
    write(run / "pruned/besa.json", stage_manifest(status="complete"))
    result(run, digest_of("stage"))
    harness = {"results": {"piqa": {"alias": "piqa", "acc,none": 0.625}}}
    task = {"kind": "tasks", "task": "piqa", "harness": harness, "model_digest": digest_of("stage")}
    write(run / "eval/tasks-piqa.json", {**task, "model": {"name": "besa 50.00 %"}})
    others: list[dict[str, Any]] = [{"model": 3}, {}, {"model": {"name": "x"}}]
    for number, value in enumerate(others):
        write(run / f"eval/notes-{number}.json", value)
    for number, name in enumerate(("ppl-besa.json", "tasks-piqa.json", "notes-0.json")):
        os.utime(run / "eval" / name, (number, number))
    assert any(line.endswith("besa 50.00 %: task piqa: accuracy 62.50 %") for line in said(besa)[0])


@pytest.mark.parametrize("by_variable", [False, True])
def test_another_run_directory_is_named_in_the_command_where_it_must_be(
    besa: Besa, monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    write(Path("my run/pruned/besa.json"), stage_manifest(status="complete"))
    if by_variable:
        monkeypatch.setenv("BESA_RUN", "my run")
    following = said(besa)[1]
    assert shlex.split(following) == ["besa", "eval", "ppl", "wikitext2", *([] if by_variable else ["--run", "my run"])]


def test_a_stage_is_stale_once_the_one_it_was_made_from_has_changed(besa: Besa) -> None:
    run = Path("besa-run")
    write(run / "pruned/besa.json", stage_manifest(status="complete"))
    parent = {**stage_manifest()["model"], "stage": "pruned", "digest": digest_of("before")}
    grid = {"rounded_to_zero": 0, "groups": 1, "bits": 400, "bits_per_weight": 4.0}
    values = {"stage": "quantized", "command": "quantize", "model": parent}
    scales = {"bits": 4, "group_size": None, "symmetric": True}
    made = stage_manifest(status="complete", quantization=scales, **values)
    write(run / "quantized/besa.json", {**made, "counts": made["counts"] | grid, "digest": digest_of("codes")})
    lines, _ = said(besa)
    assert lines[2].split(maxsplit=1)[1] == (
        "50.00 % of the weights pruned, 4.00 bits per weight (stale: an earlier stage has changed)"
    )


def test_the_first_command_parses() -> None:
    assert _FIRST in (prune_command.prune.__doc__ or "")
