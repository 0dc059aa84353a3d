"""Stages that are damaged, exchanged or begun elsewhere: refused in one line, and nothing of the user's is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models

from besa_cli.checkpoint import manifests, preflight, swap, weights
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.errors import BesaError
from besa_cli.jobs.stage import StageJob, finish_exchange
from besa_cli.ops import kernels

ROWS = tiny_models.tokens(3, 12)
REQUEST = tiny_models.request("wanda")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished")
    tiny_models.run(job(run, model))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a run with a finished stage."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def job(run: Path, model: Path, request: Any = REQUEST, *, restart: bool = False) -> StageJob:
    finish_exchange(Run(run), request.stage)
    return StageJob(Run(run), tiny_models.local(model), tiny_models.calibration_set(ROWS), request, restart=restart)


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))


def shard(stage: Path, index: int, ending: str = "safetensors") -> Path:
    return stage / f"model-{index + 2:05d}-of-00003.{ending}"


def exchange_paths(one: Path, other: Path) -> None:
    one.rename(one.with_suffix(".swap"))
    other.rename(one)
    one.with_suffix(".swap").rename(other)


def swap_shards(stage: Path) -> None:
    exchange_paths(shard(stage, 0), shard(stage, 1))


def swap_blocks(stage: Path) -> None:
    swap_shards(stage)
    exchange_paths(shard(stage, 0, "json"), shard(stage, 1, "json"))


def swap_blocks_with_their_index(stage: Path) -> None:
    swap_blocks(stage)
    for index in (0, 1):
        edit(shard(stage, index, "json"), lambda told, index=index: told.update(index=index))  # type: ignore[misc]


def change_a_bit(stage: Path) -> None:
    content = bytearray(shard(stage, 1).read_bytes())
    content[-5] ^= 1
    shard(stage, 1).write_bytes(content)


def change_a_count(stage: Path) -> None:
    edit(shard(stage, 1, "json"), lambda told: told["linears"][0].update(pruned=told["linears"][0]["pruned"] - 1))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a shard is gone": lambda stage: shard(stage, 0).unlink(),
    "a shard is another": change_a_bit,
    "the shards of two blocks are exchanged": swap_shards,
    "two blocks are exchanged": swap_blocks,
    "two blocks are exchanged and told so": swap_blocks_with_their_index,
    "a report is gone": lambda stage: shard(stage, 0, "json").unlink(),
    "a report has another count": change_a_count,
    "a report is of another block": lambda stage: shutil.copy(shard(stage, 0, "json"), shard(stage, 1, "json")),
    "a report has no digest": lambda stage: edit(shard(stage, 1, "json"), lambda told: told.pop("digest")),
    "a report has no seal": lambda stage: edit(shard(stage, 1, "json"), lambda told: told.pop("seal")),
    "the rest is gone": lambda stage: shard(stage, -1).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_finished_stage_is_not_finished_already(damage: str, run: Path, model: Path) -> None:
    DAMAGES[damage](run / "pruned")
    with pytest.raises(BesaError, match=r"pruned"):
        job(run, model)
    with pytest.raises(BesaError, match=r"pruned"):
        preflight.refuse_damaged(run / "pruned", weights.check(weights.Weights(run / "pruned")))


def unfinished(run: Path) -> None:
    """Make the stage one that was interrupted before its last block."""
    shard(run / "pruned", 1).unlink()
    (run / "pruned" / "model.safetensors.index.json").unlink()
    edit(
        run / "pruned" / "besa.json",
        lambda told: [told.pop("digest"), told.pop("counts"), told.update(status="running")],
    )


@pytest.mark.parametrize("damage", ["pruned", "zeros"])
def test_an_interrupted_stage_does_not_believe_a_changed_report(damage: str, run: Path, model: Path) -> None:
    unfinished(run)
    edit(shard(run / "pruned", 0, "json"), lambda told: told["linears"][1].update({damage: 3}))
    with pytest.raises(BesaError, match=r"00002-of-00003\.json"):
        tiny_models.run(job(run, model))


def test_zeros_are_counted_where_a_shard_is_read_anyway(run: Path) -> None:
    stage = Stage(run / "pruned", 2)
    report = stage.report(0)
    tensors = stage.read(0)
    first = report.linears[0]
    name = next(name for name in tensors if name.endswith(f".{first.name}.weight"))
    tensors[name][tensors[name] == 0] = 1.0
    stage.write(report, tensors, {})  # digest and seal agree, the counts do not
    with pytest.raises(BesaError, match=rf"states {first.zeros} zeros in {first.name} .*, its shard holds 0"):
        stage.read(0)


WRONG_MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown status": (lambda told: told.update(status="done"), "status: "),
    "no status": (lambda told: told.pop("status"), "status is missing"),
    "other format": (lambda told: told.update(format=99), "has format 99"),
    "format is a text": (lambda told: told.update(format="1"), "format: "),
    "no digest": (lambda told: told.pop("digest"), "digest is missing"),
    "no counts": (lambda told: told.pop("counts"), "counts is missing"),
    "more pruned than there are": (lambda told: told["counts"].update(pruned=10**9), "pruned and"),
    "another sparsity": (lambda told: told["counts"].update(sparsity=0.75), "not the share that was pruned"),
    "negative count": (lambda told: told["counts"].update(pruned=-1), "counts.pruned: "),
    "blocks without end": (lambda told: told.update(blocks=10**18), "blocks: "),
    "threads without end": (lambda told: told["compute"].update(threads=10**9), "compute.threads: "),
    "batch 0": (lambda told: told["compute"].update(batch=0), "compute.batch: "),
    "model is a list": (lambda told: told.update(model=[]), "model: "),
    "model without digest": (lambda told: told["model"].update(digest=None), "model.digest: "),
    "options is a text": (lambda told: told.update(options="x"), "options: "),
    "NaN": (lambda told: told["counts"].update(sparsity=float("nan")), "counts.sparsity: "),
    "bits that are a text": (lambda told: told["counts"].update(bits="many"), "counts.bits: "),
    "a calibration set": (lambda told: told.update(stage="calibration"), "stage: "),
    "another stage": (lambda told: told.update(stage="../../x"), "stage: "),
    "history": (lambda told: told.update(history=[{"stage": 1}]), "history.0"),
    "sources": (lambda told: told["calibration"].update(sources=[{"source": 3}]), "calibration.sources.0"),
}


@pytest.mark.parametrize("wrong", WRONG_MANIFESTS)
def test_a_wrong_manifest_is_one_line_with_its_field(wrong: str, run: Path, model: Path) -> None:
    change, said = WRONG_MANIFESTS[wrong]
    edit(run / "pruned" / "besa.json", change)
    with pytest.raises(BesaError) as caught:
        job(run, model)
    assert str(run / "pruned" / "besa.json") in caught.value.message
    assert said in caught.value.message
    with pytest.raises(BesaError):
        Run(run).newest()


def test_what_would_compute_otherwise_is_refused_with_both_values(
    run: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(run)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    with pytest.raises(BesaError, match="MKL_CBWR unset there, COMPATIBLE here"):
        job(run, model)
    monkeypatch.delenv("MKL_CBWR")
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "name", lambda device, dtype: "other")
        with pytest.raises(BesaError, match=r"inner loops \w+ there, other here"):
            job(run, model)
        patch.setattr(manifests, "versions", lambda: {**tiny_versions, "torch": "1.0"})
        with pytest.raises(BesaError, match=r"torch \S+ there, 1.0 here"):
            job(run, model)
    tiny_models.run(job(run, model))


tiny_versions = manifests.versions()


@pytest.mark.parametrize("threads", [1, 2])
def test_another_number_of_threads_ends_in_the_same_bytes(threads: int, run: Path, finished: Path, model: Path) -> None:
    unfinished(run)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tiny_models.run(job(run, model))
    finally:
        torch.set_num_threads(before)
    assert tiny_models.files(run) == tiny_models.files(finished)


def test_a_stage_of_before_is_read_and_gone_on_with(run: Path, model: Path) -> None:
    manifest = run / "pruned" / "besa.json"
    for index in (0, 1):
        edit(shard(run / "pruned", index, "json"), lambda told: told.pop("seal"))
    edit(manifest, lambda told: [told["compute"].pop("processor"), told["compute"].pop("environment")])
    assert job(run, model).done
    unfinished(run)
    tiny_models.run(job(run, model))
    assert job(run, model).done


FOREIGN = {"notes": "notes.txt", "hidden": ".git/HEAD", "model": "model-00009-of-00009.safetensors"}


@pytest.mark.parametrize("name", FOREIGN.values())
@pytest.mark.parametrize("state", ["finished", "unfinished", "without manifest"])
def test_restart_loses_nothing_of_the_users(name: str, state: str, run: Path, model: Path) -> None:
    if state == "unfinished":
        unfinished(run)
    if state == "without manifest":
        shutil.rmtree(run / "pruned")
    (run / "pruned" / name).parent.mkdir(parents=True, exist_ok=True)
    (run / "pruned" / name).write_text("mine")
    before = tiny_models.files(run, without=())
    with pytest.raises(BesaError, match=name):
        job(run, model, restart=True)
    assert tiny_models.files(run, without=()) == before


@pytest.mark.parametrize("how", ["inside", "linked"])
def test_a_source_inside_the_stage_is_not_replaced(how: str, run: Path, model: Path, tmp_path: Path) -> None:
    if how == "inside":
        source = run / "pruned" / "dense"
        shutil.copytree(model, source)
    else:
        source = tmp_path / "linked"
        shutil.copytree(model, source)
        weight = source / "model.safetensors"
        weight.replace(run / "pruned" / "model.safetensors")
        weight.symlink_to(run / "pruned" / "model.safetensors")
    before = tiny_models.files(run, without=())
    with pytest.raises(BesaError, match="is not replaced"):
        job(run, source, restart=True)
    assert tiny_models.files(run, without=()) == before


def test_the_only_copy_of_a_finished_stage_is_put_back(run: Path, model: Path, finished: Path) -> None:
    (run / "pruned").rename(run / ".pruned.replaced")  # killed before the new stage took the place
    assert Run(run).newest() == run / ".pruned.replaced"
    assert job(run, model).done
    assert tiny_models.files(run) == tiny_models.files(finished)


def test_what_is_left_of_an_exchange_is_removed_but_for_what_besa_did_not_write(run: Path) -> None:
    shutil.copytree(run / "pruned", run / ".pruned.replaced")
    (run / ".pruned.replaced" / "mine.txt").write_text("mine")
    swap.recover(run / "pruned", run / "pruned.next")
    assert [path.name for path in (run / ".pruned.replaced").iterdir()] == ["mine.txt"]
