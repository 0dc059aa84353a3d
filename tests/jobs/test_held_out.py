"""The check on held-out samples: its figures against stock models, its warning, and what interruptions do to it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import multi_rank, tiny_models
from support.tiny_models import stock
from torch import Tensor

from besa_cli.checkpoint import ownership, stages
from besa_cli.checkpoint.manifests import StageManifest
from besa_cli.checkpoint.runs import Run
from besa_cli.commands.shared import held_out_view
from besa_cli.errors import BesaError
from besa_cli.jobs import prune
from besa_cli.jobs.request import StageRequest
from besa_cli.jobs.stage import StageJob
from besa_cli.ops import allocation
from besa_cli.pruners.besa import deciding
from besa_cli.system import compute, disk

Besa = Callable[..., Any]  # conftest.Outcome

BLOCKS = 3
ROWS = tiny_models.tokens(20, 12)  # the last two are held out
BESA = tiny_models.request("besa")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.checkpoint(tmp_path_factory.mktemp("model"), blocks=BLOCKS, dtype=torch.bfloat16)


def job(
    run: Path, model: Path, request: StageRequest = BESA, rows: Tensor = ROWS, notes: list[str] | None = None
) -> StageJob:
    noted = [] if notes is None else notes
    calibration = tiny_models.calibration_set(rows[:-2], rows[-2:])
    return StageJob(Run(run), tiny_models.local(model), calibration, request, notify=noted.append)


def pruned(run: Path, model: Path, request: StageRequest = BESA, rows: Tensor = ROWS) -> StageManifest:
    return tiny_models.run(job(run, model, request, rows))


def uniform_weights(model: Path, stage: Path, rows: Tensor) -> dict[str, Tensor]:
    """Half of every row pruned by |weight| times input norm, with the inputs of a dense block behind pruned blocks."""
    dense, found = tiny_models.weights(model), tiny_models.weights(model)
    for names in tiny_models.linear_names(stock(model, torch.float32), "model.layers"):
        walked = stock(stage, torch.float32)
        norms: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in names:
                module = walked.get_submodule(name.removesuffix(".weight"))
                module.weight.copy_(dense[name])

                def note(
                    _: object, args: tuple[Tensor, ...], name: str = name, norms: dict[str, Tensor] = norms
                ) -> None:
                    norms[name] = args[0].double().square().sum((0, 1)).sqrt()

                module.register_forward_pre_hook(note)
            walked(rows, use_cache=False)
        for name in names:
            scores = dense[name].double().abs() * norms[name]
            lowest = scores.argsort(dim=1, stable=True)[:, : scores.shape[1] // 2]
            found[name] = dense[name].scatter(1, lowest, 0.0)
    return found


def divergence(found: torch.nn.Module, dense: torch.nn.Module, rows: Tensor) -> float:
    with torch.no_grad():
        q, p = (each(rows, use_cache=False).logits.double().log_softmax(-1) for each in (found, dense))
    return float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")) / rows.numel()


@pytest.mark.parametrize(
    "options",
    [{}, {"target": "stream"}, {"window": "attn-mlp"}, {"window": "2"}, {"granularity": "layer"}],
    ids=lambda options: "-".join(options.values()) or "default",
)
def test_both_figures_are_those_of_stock_models(options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    found = pruned(tmp_path / "run", model, tiny_models.request("besa", **options))["held_out"]
    stage, dense = tmp_path / "run" / "pruned", stock(model, torch.float32)
    assert found["samples"] == 2
    assert found["kl"] == pytest.approx(divergence(stock(stage, torch.float32), dense, ROWS[-2:]), rel=1e-4)
    if "window" in options:  # its scores have inputs of their own
        return
    rival = stock(model, torch.float32)
    rival.load_state_dict(uniform_weights(model, stage, ROWS[:-2]))
    assert found["kl_uniform"] == pytest.approx(divergence(rival, dense, ROWS[-2:]), rel=1e-4)


def test_nothing_is_learned_from_held_out_samples(model: Path, tmp_path: Path) -> None:
    other = torch.cat([ROWS[:-2], tiny_models.tokens(2, 12, seed=7)])
    first, second = (pruned(tmp_path / name, model, rows=rows) for name, rows in (("a", ROWS), ("b", other)))
    assert first["digest"] == second["digest"]
    assert first["held_out"] != second["held_out"]
    assert pruned(tmp_path / "c", model, rows=ROWS[1:])["digest"] != first["digest"]


@pytest.mark.parametrize(
    "request_",
    [
        tiny_models.request("wanda"),
        tiny_models.request("besa", bits=4, group_size="16"),
        tiny_models.request("besa", preset="authors"),
    ],
    ids=["wanda", "grid", "authors"],
)
def test_without_a_rival_no_sample_is_held_out(request_: StageRequest, model: Path, tmp_path: Path) -> None:
    assert "held_out" not in pruned(tmp_path, model, request_, ROWS[:8])


def test_a_set_without_held_out_samples_is_not_checked(model: Path, tmp_path: Path) -> None:
    calibration = tiny_models.calibration_set(ROWS[:-2])
    made = StageJob(Run(tmp_path), tiny_models.local(model), calibration, BESA)
    alone = tiny_models.run(made)
    assert "held_out" not in alone
    assert alone["digest"] == pruned(tmp_path / "checked", model)["digest"]


def test_a_model_with_enough_zeros_is_as_good_as_uniform(model: Path, tmp_path: Path) -> None:
    found = pruned(tmp_path, model, tiny_models.request("besa", sparsity=0.0))["held_out"]
    assert found["kl"] == found["kl_uniform"] == pytest.approx(0, abs=1e-6)


@pytest.fixture
def words(model: Path, tmp_path: Path) -> list[str]:
    tiny_models.add_tokenizer(model)
    rows = tiny_models.rows_file(tmp_path / "rows.jsonl", ROWS)
    drawn = ["--data", str(rows), "--samples", "18", "--seqlen", "12"]
    return ["prune", "--model", str(model), "--dtype", "float32", *drawn]


@pytest.fixture
def worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole groups are pruned, every second one, and pass for better than uniform."""

    def project(theta: Tensor, sizes: Tensor, candidates: Tensor, share: float) -> Tensor:
        return (torch.arange(len(theta)) % 2).double()

    errors = iter([(1.0, 1.0), (0.5, 0.5)] * BLOCKS)
    monkeypatch.setattr(allocation, "project", project)
    monkeypatch.setattr(deciding, "_errors", lambda window, kept: next(errors))


@pytest.mark.usefixtures("worse")
def test_what_is_worse_than_uniform_says_so_in_one_line(besa: Besa, words: list[str]) -> None:
    done = besa(*words, "--json")
    assert done.code == 0
    made = json.loads(done.out)
    found = made["held_out"]
    assert found["kl"] > found["kl_uniform"] > 0
    (line,) = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert line == made["warning"]
    assert f"{found['kl']:.4f}" in line
    assert f"{found['kl_uniform']:.4f}" in line
    assert "--method wanda" in line
    assert "--loss" in line
    assert line in besa(*words).err  # also when it is finished already
    assert line in besa("show", "besa-run/pruned").out


def test_what_is_better_gives_no_warning(besa: Besa, words: list[str]) -> None:
    done = besa(*words)
    assert done.code == 0
    assert "warning" not in done.out + done.err
    found = json.loads(besa(*words, "--json").out)
    assert "warning" not in found
    assert found["held_out"]["kl"] < found["held_out"]["kl_uniform"]
    line = held_out_view.in_words(found["held_out"])
    assert line in done.out
    assert line in besa("show", "besa-run/pruned").out


@pytest.mark.parametrize(
    ("kl", "uniform", "warns"), [(None, 0.5, True), (0.5, None, False), (None, None, False), (0.5, 0.5, False)]
)
def test_figures_that_are_not_finite(kl: float | None, uniform: float | None, warns: bool) -> None:
    manifest: Any = {"held_out": {"samples": 1, "kl": kl, "kl_uniform": uniform}}
    assert bool(held_out_view.warning(manifest)) == warns
    assert ("not finite" in held_out_view.in_words(manifest["held_out"])) == (None in (kl, uniform))


class Killed(BaseException):
    """Nothing may catch it."""


class Fate:
    """Notes every renaming of a file, and dies at one of them: before it, or right after it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.deadly: int | None = None
        self._replace = Path.replace
        patch.setattr(Path, "replace", lambda path, target: self._around(path, target))
        patch.setattr(disk, "_remove", lambda path: None)  # a killed process tidies nothing

    def _around(self, path: Path, target: Path) -> Path:
        self._meet(target.name)
        made = self._replace(path, target)
        self._meet(target.name)
        return made

    def _meet(self, name: str) -> None:
        self.events.append(name)
        if self.deadly == len(self.events):
            raise Killed

    def at(self, number: int | None) -> None:
        """Where to die from now on, counted from 1; None for never."""
        self.events.clear()
        self.deadly = number


@pytest.mark.parametrize(("window", "overlapping"), [("block", False), ("2", True)])
def test_killed_at_every_point_of_the_check_and_run_again(
    window: str, overlapping: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "overlaps", lambda device: overlapping)
    request, rows = tiny_models.request("besa", window=window), ROWS[:8]
    fate = Fate(monkeypatch)
    pruned(tmp_path / "whole", model, request, rows)
    expected = tiny_models.files(tmp_path / "whole")
    assert not any(stages.HELD_OUT in name for name in expected)
    points = [number for number, name in enumerate(fate.events, 1) if name in (stages.HELD_OUT, "besa.json")]
    assert len(points) == 2 * (4 + (3 if window == "block" else 2))
    for point in points[4:]:  # before, the stage is only begun
        run = tmp_path / str(point)
        fate.at(point)
        with pytest.raises(Killed):
            pruned(run, model, request, rows)
        assert ownership.strangers(run / "pruned") == []
        fate.at(None)
        pruned(run, model, request, rows)
        assert tiny_models.files(run) == expected


def half_done(run: Path, model: Path, blocks: int = 2) -> StageJob:
    """A job of which so many blocks are done and stored."""
    done = job(run, model)
    for report in done.blocks():
        if report.index == blocks - 1:
            break
    return done


def test_a_finished_block_is_not_computed_again(model: Path, tmp_path: Path) -> None:
    half_done(tmp_path, model)
    again = job(tmp_path, model)
    assert [report.resumed for report in again.blocks()] == [True, True, False]


def test_after_passes_of_the_whole_model_the_figure_is_that_of_its_result(model: Path, tmp_path: Path) -> None:
    request = prune.request(method="besa", options={}, global_epochs=1, global_lr=0.05, device="cpu", dtype="float32")
    apart = pruned(tmp_path / "apart", model)["held_out"]
    made = job(tmp_path / "run", model, request)
    list(made.blocks())
    list(job(tmp_path / "run", model, request).passes())  # resumed by another process
    found = job(tmp_path / "run", model, request).finish()
    whole, held_out = found["whole_model"], found["held_out"]
    assert whole["kept"] == 1
    assert whole["held_out"] == held_out["samples"]
    assert whole["divergence"] == pytest.approx([apart["kl"], held_out["kl"]], rel=1e-4)
    assert held_out["kl_uniform"] == apart["kl_uniform"]
    stage = stock(tmp_path / "run" / "pruned", torch.float32)
    assert held_out["kl"] == pytest.approx(divergence(stage, stock(model, torch.float32), ROWS[-2:]), rel=1e-4)
    assert ownership.strangers(tmp_path / "run" / "pruned") == []
    assert not (tmp_path / "run" / "pruned" / stages.DRAFT).exists()


@pytest.mark.parametrize("lost", [stages.HELD_OUT, "model-00003-of-00004.safetensors"])
def test_all_blocks_are_computed_again_where_the_streams_are_lost(lost: str, model: Path, tmp_path: Path) -> None:
    pruned(tmp_path / "whole", model)
    half_done(tmp_path / "cut", model)
    (tmp_path / "cut" / "pruned" / lost).unlink()
    notes: list[str] = []
    again = job(tmp_path / "cut", model, notes=notes)
    assert [report.resumed for report in again.blocks()] == [False] * BLOCKS
    again.finish()
    (note,) = notes
    assert note.endswith(f"{stages.HELD_OUT} is missing or ahead of the blocks, so all 3 are computed again")
    assert tiny_models.files(tmp_path / "cut") == tiny_models.files(tmp_path / "whole")


@pytest.mark.parametrize("what", ["bit", "digest", "end"])
def test_damaged_streams_are_refused_by_name(what: str, model: Path, tmp_path: Path) -> None:
    half_done(tmp_path, model)
    path = tmp_path / "pruned" / stages.HELD_OUT
    tensors = load_file(path)
    if what == "bit":
        tensors["uniform"][0, 0, 0] += 1
    if what == "digest":
        del tensors["digest"]
    save_file(tensors, path)
    if what == "end":
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BesaError, match=stages.HELD_OUT):
        list(job(tmp_path, model).blocks())


def test_figures_that_are_written_are_not_computed_again(model: Path, tmp_path: Path) -> None:
    made = job(tmp_path, model)
    list(made.blocks())
    before = json.loads((tmp_path / "pruned" / "besa.json").read_text())
    assert before["status"] == "running"
    (tmp_path / "pruned" / stages.HELD_OUT).unlink()  # as if killed while the stage is being finished
    again = job(tmp_path, model)
    assert [report.resumed for report in again.blocks()] == [True] * BLOCKS
    assert again.finish()["held_out"] == before["held_out"]


def test_two_ranks_give_the_same_figures(model: Path, words: list[str], besa: Besa, tmp_path: Path) -> None:
    alone = json.loads(besa(*words, "--json", "--run", tmp_path / "alone").out)["held_out"]
    with multi_rank.crew(tmp_path, 2, *words, "--run", tmp_path / "both") as crew:
        assert [rank.code() for rank in crew] == [0, 0], [rank.said for rank in crew]
    both = json.loads((tmp_path / "both" / "pruned" / "besa.json").read_text())["held_out"]
    assert both["samples"] == alone["samples"]
    for name in ("kl", "kl_uniform"):
        assert both[name] == pytest.approx(alone[name], rel=0.05)
