"""`--budget model`: exact counts with every method, what the manifest keeps, and what resumes from it."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models

from besa_cli.checkpoint import manifests
from besa_cli.checkpoint.reports import BlockReport
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.errors import BesaError, UsageError
from besa_cli.jobs import prune
from besa_cli.jobs.request import StageRequest
from besa_cli.jobs.stage import StageJob
from besa_cli.pruners import PRUNERS
from besa_cli.stream import effects

BLOCKS = 3
ROWS = tiny_models.tokens(3, 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.checkpoint(tmp_path_factory.mktemp("model"), blocks=BLOCKS, dtype=torch.bfloat16)


def request(
    method: str = "wanda", *, sparsity: float = 0.5, nm: tuple[int, int] | None = None, **options: Any
) -> StageRequest:
    return prune.request(
        method=method, sparsity=sparsity, nm=nm, budget="model", options=options, device="cpu", dtype="float32"
    )


def job(run: Path, model: Path, asked: StageRequest, notes: list[str] | None = None) -> StageJob:
    noted = [] if notes is None else notes
    return StageJob(Run(run), tiny_models.local(model), tiny_models.calibration_set(ROWS), asked, notify=noted.append)


def pruned(run: Path) -> list[int]:
    """Weights pruned in each block, by the reports."""
    reports: Sequence[BlockReport] = list(Stage(run / "pruned", BLOCKS).reports())
    return [sum(linear.pruned for linear in report.linears) for report in reports]


@pytest.mark.parametrize("sparsity", [0.3, 0.625])
@pytest.mark.parametrize("method", PRUNERS)
def test_every_method_meets_the_count_of_the_model_and_the_budget_of_each_block(
    method: str, sparsity: float, model: Path, tmp_path: Path
) -> None:
    notes: list[str] = []
    manifest = tiny_models.run(job(tmp_path, model, request(method, sparsity=sparsity), notes))
    counts, budgets = manifest["counts"], manifest["block_budgets"]
    assert counts["pruned"] == counts["zeros"] == round(Fraction(str(sparsity)) * counts["weights"])
    assert pruned(tmp_path) == budgets["pruned"]
    assert len(set(budgets["pruned"])) > 1
    assert sum(budgets["weights"]) == counts["weights"]
    assert [len(row) for row in budgets["effects"]] == [len(budgets["sparsities"])] * BLOCKS
    assert manifest["options"]["budget"] == "model"
    assert [note for note in notes if note.startswith("budget of the blocks: ")] == [
        manifests.describe_budgets(budgets)
    ]


@pytest.mark.parametrize("window", ["2", "attn-mlp"])
def test_windows_share_what_their_blocks_prune(window: str, model: Path, tmp_path: Path) -> None:
    manifest = tiny_models.run(job(tmp_path, model, request("besa", sparsity=0.6, window=window)))
    budgets, counts = manifest["block_budgets"]["pruned"], pruned(tmp_path)
    assert sum(counts) == sum(budgets) == round(Fraction("0.6") * manifest["counts"]["weights"])
    if window == "2":
        assert (sum(counts[:2]), counts[2]) == (sum(budgets[:2]), budgets[2])
    else:
        assert counts == budgets


def test_the_whole_model_starts_from_the_budgets_and_keeps_the_count(model: Path, tmp_path: Path) -> None:
    asked = prune.request(method="wanda", sparsity=0.6, budget="model", global_epochs=1, device="cpu", dtype="float32")
    work = job(tmp_path, model, asked)
    reports = list(work.blocks())
    list(work.passes())
    manifest = work.finish()
    started = [sum(linear.pruned for linear in report.linears) for report in reports]
    assert started == manifest["block_budgets"]["pruned"]
    assert manifest["counts"]["pruned"] == round(Fraction("0.6") * manifest["counts"]["weights"])


class Killed(BaseException):
    """Nothing may catch it."""


@pytest.mark.parametrize("method", ["besa", "magnitude"])
def test_killed_between_blocks_it_resumes_without_measuring_again(
    method: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tiny_models.run(job(whole, model, request(method)))
    for report in job(cut, model, request(method)).blocks():
        if report.index == 1:
            break
    monkeypatch.setattr(effects, "measure", lambda *args, **named: pytest.fail("measured again"))
    tiny_models.run(job(cut, model, request(method)))
    assert tiny_models.files(cut) == tiny_models.files(whole)


@pytest.mark.parametrize("point", ["measure", "record"])
def test_killed_before_the_budgets_are_recorded_it_measures_again(
    point: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tiny_models.run(job(whole, model, request()))

    def die(*args: object, **named: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        owner: object = effects if point == "measure" else Stage
        patch.setattr(owner, "measure" if point == "measure" else "record_budgets", die)
        with pytest.raises(Killed):
            tiny_models.run(job(cut, model, request()))
    tiny_models.run(job(cut, model, request()))
    assert tiny_models.files(cut) == tiny_models.files(whole)


def test_a_sparsity_of_zero_measures_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "measure", lambda *args, **named: pytest.fail("measured"))
    manifest = tiny_models.run(job(tmp_path, model, request("magnitude", sparsity=0.0)))
    assert manifest["counts"]["pruned"] == 0
    assert "block_budgets" not in manifest


def test_the_default_is_absent_from_the_manifest() -> None:
    uniform = prune.request(method="wanda")
    assert "budget" not in uniform.to_manifest()
    assert not uniform.measures_blocks


def test_another_budget_is_another_stage(model: Path, tmp_path: Path) -> None:
    tiny_models.run(job(tmp_path, model, request()))
    with pytest.raises(BesaError, match="budget model there, - asked"):
        job(tmp_path, model, tiny_models.request("wanda"))


def test_a_pattern_has_no_budget_to_decide() -> None:
    with pytest.raises(UsageError, match="--budget model cannot be combined with --nm 2:4"):
        request("wanda", nm=(2, 4))


def test_the_released_programs_preset_gets_only_what_it_can_learn(model: Path, tmp_path: Path) -> None:
    manifest = tiny_models.run(job(tmp_path, model, request("besa", preset="authors")))
    low, high = request("besa", preset="authors").method.options.sparsity_range()
    budgets = manifest["block_budgets"]
    for count, size in zip(budgets["pruned"], budgets["weights"], strict=True):
        assert low - 1 / size <= count / size <= high + 1 / size


def test_a_damaged_record_of_budgets_is_refused(model: Path, tmp_path: Path) -> None:
    for _ in job(tmp_path, model, request()).blocks():
        break
    path = tmp_path / "pruned" / "besa.json"
    text = path.read_text()
    start = text.index('"pruned": [')
    path.write_text(text[:start] + '"pruned": [1, 2], "before": [' + text[start + len('"pruned": [') :])
    with pytest.raises(BesaError, match="block_budgets"):
        tiny_models.run(job(tmp_path, model, request()))
