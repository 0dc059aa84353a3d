"""`besa tune`: the same as plain torch, masks that stay, the choice of a pass, resuming, and what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_models
from support.tiny_models import stock
from torch import Tensor

from besa_cli.checkpoint import manifests, ownership, sealed
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.checkpoint.tuning_states import TuningStates
from besa_cli.errors import BesaError, UsageError
from besa_cli.jobs import quantize, tune
from besa_cli.jobs.stage import StageJob
from besa_cli.jobs.tune import TuneRequest
from besa_cli.jobs.tune_job import TuneJob
from besa_cli.stream import distillation, memory_model, tuning
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.block import OnStep
from besa_cli.system import compute

Besa = Callable[..., Any]  # conftest.Outcome
BLOCKS = 3
ROWS, HELD_OUT = tiny_models.tokens(6, 12), tiny_models.tokens(2, 12, seed=9)


def asked(epochs: int = 2, lr: float = 0.01, **placement: Any) -> TuneRequest:
    return tune.request(epochs=epochs, lr=lr, **{"device": "cpu", "dtype": "float32", **placement})


def pruned(place: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    """A pruned stage of a tiny model, in a run directory of its own."""
    dense = tiny_models.checkpoint(place / "dense", family, blocks=BLOCKS, dtype=dtype)
    rows = tiny_models.calibration_set(ROWS[:3])
    tiny_models.run(StageJob(Run(place / "source"), tiny_models.local(dense), rows, tiny_models.request(**how)))
    return place / "source" / "pruned"


def job(
    source: Path, run: Path, request: TuneRequest, rows: Tensor = ROWS, held_out: Tensor | None = HELD_OUT
) -> TuneJob:
    samples = tiny_models.calibration_set(rows, held_out)
    return TuneJob(Run(run), tiny_models.local(source), samples, request)


def to_the_end(made: TuneJob, on_step: OnStep = lambda number, total, phase: None) -> manifests.StageManifest:
    list(made.work(on_step))
    return made.finish()


def divergence(dense: Any, model: Any, rows: Tensor) -> Tensor:
    """Mean over the tokens of KL(dense ‖ model), by the formula."""
    with torch.no_grad():
        p = dense(rows, use_cache=False).logits.log_softmax(-1)
    q = model(rows, use_cache=False).logits.log_softmax(-1)
    mean: Tensor = (p.exp() * (p - q)).sum(-1).mean()
    return mean


def held_out_divergence(dense: Path, model: Path) -> float:
    return float(divergence(stock(dense, torch.float32), stock(model, torch.float32), HELD_OUT).detach())


def in_plain_torch(dense: Path, source: Path, rows: Tensor, rate: float, epochs: int) -> dict[str, Tensor]:
    """The kept weights of all linears as the whole model in memory learns them."""
    teacher, model = stock(dense, torch.float32), stock(source, torch.float32)
    model.requires_grad_(False)
    names = [name for block in tiny_models.linear_names(model, "model.layers") for name in block]
    weights = {name: model.get_parameter(name).requires_grad_() for name in names}
    kept = {name: (weight != 0).float() for name, weight in weights.items()}
    rates = [
        rate * math.sqrt(float(weight.detach().square().sum() / kept[name].sum())) for name, weight in weights.items()
    ]
    adam = torch.optim.Adam([{"params": [weight], "lr": 0.0} for weight in weights.values()], betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    order = [number for _ in range(epochs) for number in torch.randperm(len(rows), generator=generator).tolist()]
    for step, sample in enumerate(order):
        adam.zero_grad()
        (divergence(teacher, model, rows[sample : sample + 1]) * rows.shape[1]).backward()
        for (name, weight), group, own in zip(weights.items(), adam.param_groups, rates, strict=True):
            weight.grad = weight.grad * kept[name]
            group["lr"] = own * 0.5 * (1 + math.cos(math.pi * step / len(order)))
        adam.step()
    return {name: weight.detach() for name, weight in weights.items()}


def test_it_learns_what_the_whole_model_learns_in_plain_torch(tmp_path: Path) -> None:
    source, rows = pruned(tmp_path), ROWS[:5]
    manifest = to_the_end(job(source, tmp_path / "run", asked(lr=0.01), rows, rows))
    assert manifest["whole_model"]["kept"] == 2
    before, found = tiny_models.weights(source), tiny_models.weights(tmp_path / "run" / "tuned")
    learned = in_plain_torch(tmp_path / "dense", source, rows, 0.01, 2)
    part = manifest["whole_model"].get("part", 1.0)
    for name, expected in learned.items():
        moved = (expected - before[name]).abs().max()
        assert moved > 1e-4
        assert float((found[name] - before[name] - part * (expected - before[name])).abs().max()) < 0.02 * moved
    teacher, model = (stock(place, torch.float32) for place in (tmp_path / "dense", source))
    tried = {}
    for way in (1.0, 0.75, 0.5, 0.25):
        with torch.no_grad():
            for name, expected in learned.items():
                model.get_parameter(name).copy_(before[name] + way * (expected - before[name]))
            tried[way] = float(divergence(teacher, model, rows))
    assert part == min(tried, key=lambda way: tried[way])
    assert manifest["whole_model"]["divergence"][2] == pytest.approx(tried[part], rel=1e-3)


@given(start=st.floats(-1e4, 1e4, width=32), end=st.floats(-1e4, 1e4, width=32))
def test_both_ends_of_the_way_are_exact(start: float, end: float) -> None:
    ends = torch.tensor([start]), torch.tensor([end])
    assert torch.equal(tuning.part_of_the_way(*ends, 1.0), ends[1])
    assert torch.equal(tuning.part_of_the_way(*ends, 0.0), ends[0])
    assert float(tuning.part_of_the_way(*ends, 0.25)) == pytest.approx(0.75 * start + 0.25 * end, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("resident", [False, True])
def test_the_next_pass_goes_on_from_the_whole_way(
    resident: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TuneJob, "_is_roomy", lambda _: resident)
    source, learned = pruned(tmp_path), []
    for number, parts in enumerate((tuning.PARTS, (1.0,))):
        monkeypatch.setattr(tuning, "PARTS", parts)
        made = job(source, tmp_path / f"run-{number}", asked(lr=0.05))
        learned.append([report.learned for report in made.work()])
        made.finish()
    assert learned[0] == learned[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt_neox"])
def test_zeros_stay_and_the_divergence_is_that_of_the_stock_models(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = pruned(tmp_path, family, dtype, sparsity=0.4)
    made = job(source, tmp_path / "run", asked())
    reports = list(made.work())
    manifest = made.finish()
    before, after = tiny_models.weights(source), tiny_models.weights(tmp_path / "run" / "tuned")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    names = tiny_models.linear_names(
        tiny_models.built(tiny_models.config(family, blocks=BLOCKS)), tiny_models.blocks_of(family)
    )
    assert sorted(changed) == sorted(name for block in names for name in block)
    for name in changed:
        assert after[name].dtype == dtype
        assert torch.equal(before[name] == 0, after[name] == 0)
    assert manifest["counts"] == manifests.read_stage(source)["counts"]
    whole = manifest["whole_model"]
    assert whole["divergence"] == [report.held_out for report in reports]
    assert whole["kept"] == min(range(3), key=lambda number: whole["divergence"][number]) > 0
    dense, tuned = tmp_path / "dense", tmp_path / "run" / "tuned"
    assert whole["divergence"][whole["kept"]] == pytest.approx(held_out_divergence(dense, tuned), rel=1e-3)
    assert whole["divergence"][0] == pytest.approx(held_out_divergence(dense, source), rel=1e-3)


def test_a_weight_that_is_rounded_to_zero_is_not_counted_as_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pruned(tmp_path)
    read = TuningStates.block

    def first_is_zero(states: TuningStates, step: int, index: int) -> dict[str, Tensor]:
        found = read(states, step, index)
        for state in found.values():
            state[0, 0] = 0.0
        return found

    monkeypatch.setattr(TuningStates, "block", first_is_zero)
    manifest = to_the_end(job(source, tmp_path / "run", asked()))
    counts, before = manifest["counts"], manifests.read_stage(source)["counts"]
    assert counts["pruned"] == before["pruned"]
    assert counts["zeros"] == before["zeros"] + 7 * BLOCKS


@pytest.mark.parametrize("in_files", [False, True])
def test_a_linear_without_kept_weights_stays_empty(
    in_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TuneJob, "_is_roomy", lambda _: not in_files)
    dense = tiny_models.built(tiny_models.config("llama", blocks=BLOCKS))
    empty = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        dense.get_parameter(empty).zero_()
    dense.save_pretrained(tmp_path / "dense")
    rows, run = tiny_models.calibration_set(ROWS), Run(tmp_path / "source")
    tiny_models.run(StageJob(run, tiny_models.local(tmp_path / "dense"), rows, tiny_models.request(sparsity=0.6)))
    manifest = to_the_end(job(run.stage("pruned"), tmp_path / "run", asked()))
    assert manifest["whole_model"]["kept"] > 0
    assert not tiny_models.weights(tmp_path / "run" / "tuned")[empty].any()


def test_a_pass_that_makes_it_worse_is_not_kept(tmp_path: Path) -> None:
    source = pruned(tmp_path)
    manifest = to_the_end(job(source, tmp_path / "run", asked(lr=1.0)))
    assert manifest["whole_model"]["kept"] == 0
    assert manifest["whole_model"]["divergence"][1] > manifest["whole_model"]["divergence"][0]
    before, after = tiny_models.files(source), tiny_models.files(tmp_path / "run" / "tuned")
    same = {name for name in before if before[name] == after.get(name)}
    assert {name for name in before if name.startswith("model-")} <= same


def test_the_best_pass_is_kept_though_later_ones_are_worse(tmp_path: Path) -> None:
    source = pruned(tmp_path)
    made = job(source, tmp_path / "run", asked(epochs=3))
    held = iter([3.0, 2.0, 1.5, 1.0, 1.2, *[2.0] * 4, *[2.5] * 4])
    states: dict[int, dict[str, Tensor]] = {}

    def comparing(self: distillation.Distillation, blocks: Any) -> float:
        states[len(states)] = {
            name: linear.weight.clone() for index in range(BLOCKS) for name, linear in _loaded(made, blocks, index)
        }
        return next(held)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation.Distillation, "held_out_divergence", comparing)
        manifest = to_the_end(made)
    assert manifest["whole_model"]["kept"] == 1
    assert manifest["whole_model"]["divergence"] == [3.0, 1.0, 2.0, 2.5]
    assert manifest["whole_model"]["part"] == 0.5
    after = tiny_models.weights(tmp_path / "run" / "tuned")
    assert all(torch.equal(after[f"model.layers.{name}.weight"], weight) for name, weight in states[3].items())


def _loaded(made: TuneJob, blocks: Any, index: int) -> list[tuple[str, torch.nn.Linear]]:
    blocks.load(index)
    return [(f"{index}.{name}", linear) for name, linear in made._decoder.linears(index).items()]


@pytest.mark.parametrize("way", ["roomy", "in files", "one block"])
def test_where_the_learned_weights_lie_changes_no_byte(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pruned(tmp_path, dtype=torch.bfloat16)
    expected, dropped = to_the_end(job(source, tmp_path / "expected", asked()))["digest"], list[int]()
    monkeypatch.setattr(TuneJob, "_is_roomy", lambda _: way == "roomy")
    made = job(
        source, tmp_path / "run", asked(max_memory=compute.resident() + (2 << 30) if way == "one block" else None)
    )
    drop = made._decoder.drop

    def dropping(index: int) -> None:
        dropped.append(index)
        drop(index)

    monkeypatch.setattr(made._decoder, "drop", dropping)
    assert to_the_end(made)["digest"] == expected
    assert (made._memory.in_files, made._resident) == (way == "in files", way == "roomy")
    assert (len(dropped) > 24 * BLOCKS) == (way != "roomy")  # twice in each of 12 steps


def test_what_is_learned_takes_the_memory_and_the_disk_that_is_forecast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, allocated = pruned(tmp_path), list[Tensor]()
    monkeypatch.setattr(TuneJob, "_is_roomy", lambda _: False)
    empty = ActivationStore.empty

    def noting(store: ActivationStore, shape: Any, dtype: torch.dtype) -> Tensor:
        allocated.append(empty(store, shape, dtype))
        return allocated[-1]

    made = job(source, tmp_path / "run", asked(epochs=1))
    with monkeypatch.context() as patch:
        patch.setattr(ActivationStore, "empty", noting)
        list(made.work())
    counts = manifests.read_stage(source)["counts"]
    kept = counts["weights"] - counts["zeros"]
    learned = sum(each.nbytes for each in allocated if each.dim() == 1 or (len(each) == 3 and each.dim() == 2))
    assert learned == kept * memory_model.LEARNED_BYTES
    (state,) = (tmp_path / "run" / "tuned" / "tuning").iterdir()
    stored = sum(path.stat().st_size for path in state.glob("model-*"))
    assert kept * tuning.STATE_BYTES <= stored < 1.1 * kept * tuning.STATE_BYTES
    hidden = tiny_models.HIDDEN * 4 * (len(ROWS) + len(HELD_OUT) + 2) * ROWS.shape[1]
    assert made._demand(1).hidden == learned + hidden


class Killed(Exception):
    """Stands for a killed process."""


@pytest.fixture
def often_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is stored after every fourth of the twelve steps, and after each pass of six."""
    monkeypatch.setattr("besa_cli.stream.tuning.SAVED", 4)


@pytest.mark.usefixtures("often_saved")
@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize(
    "at",
    [
        ("step", 1),
        ("step", 5),
        ("step", 10),
        ("state", 1),
        ("state", 7),
        ("write", 0),
        ("write", 2),
        ("end", 0),
    ],
)
def test_a_killed_run_ends_in_the_same_bytes(
    at: tuple[str, int], in_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pruned(tmp_path)
    monkeypatch.setattr(TuneJob, "_is_roomy", lambda _: not in_files)
    to_the_end(job(source, tmp_path / "whole", asked()))
    met = dict.fromkeys(("step", "state", "write", "end"), 0)

    def meet(kind: str) -> None:
        if (kind, met[kind]) == at:
            raise Killed
        met[kind] += 1

    def meeting(kind: str, act: Callable[..., None] = lambda *_: None) -> Callable[..., None]:
        def acting(*each: object) -> None:
            meet(kind)
            act(*each)

        return acting

    first = job(source, tmp_path / "run", asked())
    with monkeypatch.context() as patch:
        patch.setattr(sealed, "write", meeting("state", sealed.write))
        patch.setattr(Stage, "write", meeting("write", Stage.write))
        patch.setattr(TuningStates, "remove", meeting("end"))
        with pytest.raises(Killed):
            to_the_end(first, lambda number, total, phase: meet("step") if phase == "tuning" else None)
    again = job(source, tmp_path / "run", asked())
    to_the_end(again)
    assert tiny_models.files(tmp_path / "run" / "tuned") == tiny_models.files(tmp_path / "whole" / "tuned")


@pytest.mark.usefixtures("often_saved")
def test_a_resumed_run_does_only_what_is_left(tmp_path: Path) -> None:
    source, steps = pruned(tmp_path), list[int]()

    def stop(number: int, total: int, phase: str) -> None:
        if phase == "tuning" and number == 11:
            raise Killed

    with pytest.raises(Killed):
        list(job(source, tmp_path / "run", asked()).work(stop))
    home = tmp_path / "run" / "tuned" / "tuning"
    assert sorted(path.name for path in home.iterdir()) == ["00000006", "00000008"]  # the first pass is the best so far
    assert ownership.strangers(tmp_path / "run" / "tuned") == []
    again = job(source, tmp_path / "run", asked())
    reports = list(again.work(lambda number, total, phase: steps.append(number) if phase == "tuning" else None))
    assert steps == list(range(9, 13))
    assert [report.resumed for report in reports] == [True, True, False]
    again.finish()
    assert not home.exists()


def test_a_state_of_before_the_parts_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pruned(tmp_path)

    def stop(number: int, total: int, phase: str) -> None:
        if phase == "tuning" and number == 7:
            raise Killed

    whole = distillation.LearningProgress.tensors
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "PARTS", (1.0,))
        patch.setattr(
            distillation.LearningProgress,
            "tensors",
            lambda self: {name: value for name, value in whole(self).items() if name != "parts"},
        )
        with pytest.raises(Killed):
            list(job(source, tmp_path / "run", asked()).work(stop))
    again = job(source, tmp_path / "run", asked())
    reports = list(again.work())
    assert [report.part for report in reports[:2]] == [1.0, 1.0]
    assert again.finish()["whole_model"]["divergence"] == [report.held_out for report in reports]


@pytest.mark.usefixtures("often_saved")
def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    source = pruned(tmp_path)

    def stop(number: int, total: int, phase: str) -> None:
        if phase == "tuning" and number == 5:
            raise Killed

    with pytest.raises(Killed):
        list(job(source, tmp_path / "run", asked()).work(stop))
    state = next((tmp_path / "run" / "tuned" / "tuning" / "00000004").glob("model-00002-*"))
    content = bytearray(state.read_bytes())
    content[-5] ^= 1
    state.write_bytes(bytes(content))
    with pytest.raises(BesaError, match=rf"{state.name} is damaged"):
        to_the_end(job(source, tmp_path / "run", asked()))
    state.unlink()
    with pytest.raises(BesaError, match=rf"{state.name} is missing"):
        to_the_end(job(source, tmp_path / "run", asked()))


def test_only_a_finished_pruned_stage_is_tuned(tmp_path: Path) -> None:
    source = pruned(tmp_path)
    grid = quantize.request(group_size="16", device="cpu", dtype="float32")
    rows, run = tiny_models.calibration_set(ROWS), Run(tmp_path / "source")
    tiny_models.run(StageJob(run, tiny_models.local(source), rows, grid))
    with pytest.raises(BesaError, match="quantized is quantized: tuning would move its weights off their grid"):
        job(run.stage("quantized"), tmp_path / "other", asked())
    with pytest.raises(BesaError, match="dense was not made by besa: only a pruned stage is tuned"):
        job(tmp_path / "dense", tmp_path / "other", asked())
    dense = next((tmp_path / "dense").glob("*.safetensors"))
    content = bytearray(dense.read_bytes())
    content[-5] ^= 1
    dense.write_bytes(bytes(content))
    with pytest.raises(BesaError, match=r"has changed since .*pruned was made from it"):
        job(source, tmp_path / "other", asked())


@pytest.mark.parametrize(
    ("options", "said"),
    [({"epochs": 0}, "--epochs 0 is less than 1"), ({"lr": float("inf")}, "--lr inf is not a finite number")],
)
def test_nonsense_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tune.request(**options)


def sources(workplace: Path) -> tuple[Path, tuple[object, ...]]:
    """A model with a tokenizer, and the words that name its samples."""
    model = tiny_models.add_tokenizer(tiny_models.checkpoint(workplace / "model", blocks=BLOCKS, dtype=torch.bfloat16))
    rows = tiny_models.rows_file(workplace / "rows.jsonl", tiny_models.tokens(8, 12))
    (workplace / "text.txt").write_text("w3 w4 w5 w9 " * 60)
    return model, ("--data", rows, "--samples", "6", "--seqlen", "12")


def test_the_command_line(besa: Besa, workplace: Path) -> None:
    model, drawn = sources(workplace)
    none = besa("tune", "--run", "run")
    assert (none.code, "run has no pruned stage" in none.err) == (1, True)
    common = ("--dtype", "float32", "--run", "run")
    assert besa("prune", "--model", model, "--method", "wanda", *drawn, *common).code == 0
    assert besa("quantize", "--group-size", "16", *common).code == 0
    words = ("tune", "--lr", "0.01", *common)
    before = tiny_models.files(workplace, without=())
    forecast = besa(*words, "--dry-run", "--json")
    assert forecast.code == 0, forecast.err
    said = json.loads(forecast.out)
    assert tiny_models.files(workplace, without=()) == before
    assert (said["blocks"], said["left"], said["phase"]) == (BLOCKS, BLOCKS, "tuning")
    assert said["seconds"] > 0
    made = besa(*words, "--json")
    assert made.code == 0, made.err
    manifest = json.loads(made.out)
    assert (manifest["stage"], manifest["command"], manifest["options"]["lr"]) == ("tuned", "tune", 0.01)
    assert manifest["model"]["stage"] == "pruned"
    assert [entry["stage"] for entry in manifest["history"]] == ["pruned"]
    assert json.loads(besa(*words, "--dry-run", "--json").out) == {"done": True}
    assert Run(workplace / "run").stale("quantized")  # it was made without what the tuning learned
    assert Run(workplace / "run").newest() == workplace / "run" / "tuned"
    shown = besa("show", "run")
    assert "whole model: KL divergence to dense" in shown.out
    assert "besa tune --model run/pruned --epochs 1 --lr 0.01" in shown.out
    assert besa("simulate", "--func", "model", "--run", "run").code == 0
    assert besa("export", "--format", "sparse", "--run", "run").code == 0
    again = besa("quantize", "--group-size", "16", *common)
    assert (again.code, "made with other options" in again.err) == (1, True)
    assert besa("quantize", "--group-size", "16", *common, "--restart", "--json").code == 0
    assert manifests.read_stage(workplace / "run" / "quantized")["model"]["stage"] == "tuned"
    assert Run(workplace / "run").newest() == workplace / "run" / "quantized"
    other = besa("tune", "--lr", "0.02", *common)
    assert (other.code, "lr 0.01 there, 0.02 asked" in other.err) == (1, True)


def test_measurements_compare_with_the_dense_model_not_with_the_pruned_one(besa: Besa, workplace: Path) -> None:
    model, drawn = sources(workplace)
    common = ("--dtype", "float32", "--run", "run")
    assert besa("prune", "--model", model, "--method", "wanda", *drawn, *common).code == 0
    assert besa("tune", *common).code == 0
    asked = ("eval", "ppl", "text.txt", "--seqlen", "12", "--dtype", "float32", "--device", "cpu", "--json")
    measured = besa(*asked, "--run", "run")
    assert measured.code == 0, measured.err
    alone = besa(*asked, "--model", model)
    (row,), (dense,) = (json.loads(outcome.out)["results"] for outcome in (measured, alone))
    assert row["dense"]["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-6)  # not the pruned stage's
    compared = besa("eval", "compare", "run")
    assert (compared.code, "dense" in compared.out) == (0, True), compared.err
    assert besa("quantize", "--model", "run/tuned", "--dtype", "float32", "--run", "codes").code == 0
    shutil.rmtree(workplace / "run" / "pruned")
    lost = besa(*asked, "--run", "codes")
    assert (lost.code, "compared with the model that it was made from" in lost.err) == (0, True), lost.err
