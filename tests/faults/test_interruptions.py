"""Harm at named points: nothing is lost, one clear line, and the same command goes on (`make faults`: at random)."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import fault_injection
from support import tiny_models

from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.checkpoint.weights import Weights
from besa_cli.errors import BesaError
from besa_cli.jobs.stage import StageJob
from besa_cli.system import compute, disk

Besa = Callable[..., Any]  # conftest.Outcome

ROWS = tiny_models.tokens(3, 12)
REQUEST = tiny_models.request("wanda")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    return tiny_models.add_tokenizer(tiny_models.checkpoint(place, blocks=3, dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    run = tmp_path_factory.mktemp("whole")
    tiny_models.run(job(run, model))
    return tiny_models.files(run)


def job(run: Path, model: Path) -> StageJob:
    return StageJob(Run(run), tiny_models.local(model), tiny_models.calibration_set(ROWS), REQUEST)


def half_done(run: Path, model: Path) -> Stage:
    """A stage of which one block is finished."""
    next(iter(job(run, model).blocks()))
    return Stage(run / "pruned", 3)


@pytest.mark.parametrize("kind", ["cut short", "bit flipped"])
def test_a_damaged_block_of_a_half_done_stage_is_named_and_made_again(
    kind: str, model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    shard = half_done(tmp_path, model).shard(0)
    random.seed(0)
    fault_injection.KINDS[kind](shard)
    with pytest.raises(BesaError, match=shard.name):
        tiny_models.run(job(tmp_path, model))
    shard.unlink()  # what the hint says
    tiny_models.run(job(tmp_path, model))
    assert tiny_models.files(tmp_path) == whole


def test_a_block_damaged_after_the_last_one_was_made_is_found_too(model: Path, tmp_path: Path) -> None:
    made = job(tmp_path, model)
    list(made.blocks())  # killed before `finish`
    fault_injection.flip_a_bit(Stage(tmp_path / "pruned", 3).shard(1))
    with pytest.raises(BesaError, match="does not hold what was written"):
        tiny_models.run(job(tmp_path, model))


def test_a_finished_stage_with_a_flipped_bit_is_not_read_by_the_next_command(
    besa: Besa, model: Path, workplace: Path
) -> None:
    tiny_models.run(job(workplace / "run", model))
    shard = Stage(workplace / "run" / "pruned", 3).shard(2)
    content = shard.read_bytes()
    (workplace / "text.txt").write_text("w3 w4 w5 " * 30)
    fault_injection.flip_a_bit(shard)
    rows = tiny_models.rows_file(workplace / "rows.jsonl", ROWS)
    drawn = ["--data", rows, "--samples", "3", "--seqlen", "12"]
    for words in (
        ["quantize", "--run", "run"],
        ["quantize", "--method", "gptq", "--run", "run", *drawn],
        ["export", "--run", "run"],
        ["export", "--format", "sparse", "--run", "run"],
        ["eval", "ppl", "text.txt", "--seqlen", "12", "--run", "run", "--no-baseline"],
        ["eval", "sample", "w3 w4", "--tokens", "2", "--run", "run"],
    ):
        found = besa(*words)
        assert found.code == 1
        assert "error: run/pruned is damaged or was changed since it was made: digest " in found.err
    shard.write_bytes(content)
    assert besa("quantize", "--run", "run").code == 0
    stage = Stage(workplace / "run" / "quantized", 3)
    assert stage.codes(1)
    fault_injection.flip_a_bit(workplace / "run" / "quantized" / "codes" / stage.shard(1).name)
    with pytest.raises(BesaError, match=r"codes/model-00003-of-00004.safetensors is damaged"):
        stage.codes(1)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_stage_that_lost_a_small_file_is_not_finished_already(name: str, model: Path, tmp_path: Path) -> None:
    tiny_models.run(job(tmp_path, model))
    lost = tmp_path / "pruned" / name
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(BesaError, match=f"pruned lacks {name}"):
        job(tmp_path, model)
    lost.write_bytes(content)
    assert job(tmp_path, model).done


def test_what_belongs_to_no_block_is_compared_with_the_source_before_a_run_goes_on(
    model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    shard = half_done(tmp_path, model).shard(-1)
    fault_injection.flip_a_bit(shard)
    with pytest.raises(BesaError, match=f"{shard.name} is damaged"):
        next(job(tmp_path, model).blocks())
    shard.unlink()  # what the hint says
    tiny_models.run(job(tmp_path, model))
    assert tiny_models.files(tmp_path) == whole


def test_codes_with_a_flipped_bit_are_not_exported(besa: Besa, model: Path, workplace: Path) -> None:
    tiny_models.run(job(workplace / "run", model))
    quantized = besa("quantize", "--method", "rtn", "--symmetric", "--group-size", "16", "--run", "run")
    assert quantized.code == 0, quantized.err
    stage = Stage(workplace / "run" / "quantized", 3)
    codes = workplace / "run" / "quantized" / "codes" / stage.shard(1).name
    fault_injection.flip_a_bit(codes)
    found = besa("export", "--format", "compressed-tensors", "--run", "run")
    assert (found.code, f"codes/{codes.name} is damaged" in found.err) == (1, True), found.err


def test_a_cut_tokenizer_is_not_handed_on(besa: Besa, model: Path, workplace: Path) -> None:
    tiny_models.run(job(workplace / "run", model))
    fault_injection.cut_short(workplace / "run" / "pruned" / "tokenizer.json")
    found = besa("export", "--run", "run")
    assert (found.code, "tokenizer.json is damaged" in found.err) == (1, True), found.err
    assert not (workplace / "run" / "export" / "hf").exists()


@pytest.mark.parametrize("state", ["half-done", "finished"])
def test_a_manifest_of_a_newer_format_is_left_alone(
    state: str, model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    if state == "finished":
        tiny_models.run(job(tmp_path, model))
    else:
        half_done(tmp_path, model)
    manifest = tmp_path / "pruned" / "besa.json"
    content = manifest.read_bytes()
    fault_injection.newer_format(manifest)
    before = tiny_models.files(tmp_path, without=())
    with pytest.raises(BesaError, match=r"has format 2, this besa .* reads 1"):
        job(tmp_path, model)
    assert tiny_models.files(tmp_path, without=()) == before
    manifest.write_bytes(content)
    tiny_models.run(job(tmp_path, model))
    assert tiny_models.files(tmp_path) == whole


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_disk_that_is_full_from_any_file_on(
    overlapping: bool, model: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "overlaps", lambda device: overlapping)
    said: list[str] = []
    for number in range(1, len(whole) + 3):
        run = tmp_path / str(number)
        with monkeypatch.context() as patch:
            for name in ("save_tensors", "_write_text"):
                patch.setattr(disk, name, getattr(disk, name))  # put back at the end
            fault_injection.full_disk(number)
            try:
                tiny_models.run(job(run, model))
            except BesaError as error:
                said.append(error.message)
        tiny_models.run(job(run, model))
        assert tiny_models.files(run) == whole
    assert len(said) > 8
    assert all(line.startswith("cannot write ") and line.endswith("No space left on device") for line in said)


def test_a_clock_that_jumps_changes_the_timing_file_alone(
    model: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("time", "gmtime"):
        monkeypatch.setattr(time, name, getattr(time, name))
    fault_injection.jumping_clock(3)
    half_done(tmp_path, model)
    tiny_models.run(job(tmp_path, model))
    assert tiny_models.files(tmp_path) == whole


def test_a_source_that_changes_between_two_runs_is_refused(whole: dict[str, bytes], tmp_path: Path) -> None:
    source = tiny_models.checkpoint(tmp_path / "source", blocks=3, dtype=torch.bfloat16)
    shard = source / "model.safetensors"
    content = shard.read_bytes()
    half_done(tmp_path / "run", source)
    fault_injection.flip_a_bit(shard)
    with pytest.raises(BesaError, match=r"made with other options: model [0-9a-f]{12} there, [0-9a-f]{12} asked"):
        job(tmp_path / "run", source)
    shard.write_bytes(content)
    tiny_models.run(job(tmp_path / "run", source))
    weights = {name: data for name, data in tiny_models.files(tmp_path / "run").items() if name.endswith("safetensors")}
    assert weights == {name: whole[name] for name in weights}


def test_a_source_that_changes_under_a_run_stops_it(tmp_path: Path) -> None:
    source = tiny_models.checkpoint(tmp_path / "source", blocks=3, dtype=torch.bfloat16)
    blocks = iter(job(tmp_path / "run", source).blocks())
    next(blocks)
    fault_injection.flip_a_bit(source / "model.safetensors")
    with pytest.raises(BesaError, match=r"model.safetensors was written to while it was in use"):
        list(blocks)
    assert Stage(tmp_path / "run" / "pruned", 3).finished() == 1


def test_a_file_replaced_by_an_equal_one_is_another_file(tmp_path: Path) -> None:
    source = tiny_models.checkpoint(tmp_path / "source")
    before = Weights(source)
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(BesaError, match="was written to"):
        Weights(source).refuse_change(before)


@pytest.mark.parametrize(
    ("words", "place"),
    [(["simulate", "--func", "model"], "simulate"), (["eval", "ppl", "text.txt", "--seqlen", "12"], "eval")],
)
def test_what_a_killed_process_left_of_a_result_goes_with_the_next_one(
    words: list[str], place: str, besa: Besa, model: Path, workplace: Path
) -> None:
    tiny_models.run(job(workplace / "run", model))
    (workplace / "text.txt").write_text("w3 w4 w5 " * 30)
    assert besa(*words, "--run", "run").code == 0
    whole = tiny_models.files(workplace / "run" / place)
    for name in whole:
        (workplace / "run" / place / name).unlink()
        for ending in (".json", ".windows")[: 1 + (place == "eval")]:
            left = Path(name).with_suffix(ending)
            (workplace / "run" / place / f".{left}.7.partial").write_text("{")  # as process 7 was writing it
    assert besa(*words, "--run", "run").code == 0
    assert tiny_models.files(workplace / "run" / place) == whole
