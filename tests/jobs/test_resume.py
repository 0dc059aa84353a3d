"""Killed at named points and run again: the finished directory is, byte for byte, that of a run never interrupted."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models

import besa_cli
from besa_cli.checkpoint import ownership, stages
from besa_cli.checkpoint.runs import Run
from besa_cli.errors import BesaError
from besa_cli.evaluation import results
from besa_cli.jobs import prune
from besa_cli.jobs.request import StageRequest
from besa_cli.jobs.stage import StageJob, finish_exchange
from besa_cli.system import compute, disk

Besa = Callable[..., Any]  # conftest.Outcome

SHARDS = [f"model-{number:05d}-of-00003" for number in (1, 2, 3)]
WRITTEN = [  # every file of a run on two blocks, in the order in which it gets its name
    "besa.json",
    "config.json",
    "generation_config.json",
    "besa.json again",
    f"{SHARDS[0]}.safetensors",
    *[f"{shard}{ending}" for shard in SHARDS[1:] for ending in (".json", ".safetensors")],
    "model.safetensors.index.json",
    "besa.json finally",
]
POINTS = [f"{when} {name}" for name in WRITTEN for when in ("before", "after")]


class Killed(BaseException):
    """Nothing may catch it, as nothing can catch SIGKILL."""


class Fate:
    """Notes every renaming, and dies at one of them: before, the new file lies there under its temporary name."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.deadly: str | None = None
        self._replace, self._rename, self._rmtree = Path.replace, Path.rename, ownership.remove
        patch.setattr(Path, "replace", lambda path, target: self._around(self._replace, path, target))
        patch.setattr(Path, "rename", lambda path, target: self._around(self._rename, path, target))
        patch.setattr(ownership, "remove", self._remove)
        patch.setattr(disk, "_remove", lambda path: None)  # a killed process tidies nothing

    def _around(self, act: Callable[[Path, Path], Path], path: Path, target: Path) -> Path:
        seen = sum(event in (f"after {target.name}", f"after {target.name} again") for event in self.events)
        name = target.name + ("", " again", " finally")[seen]
        self._meet(f"before {name}")
        result = act(path, target)
        self._meet(f"after {name}")
        return result

    def _remove(self, path: Path) -> None:
        self._meet(f"before removing {path.name}")
        if self.deadly == f"halfway removing {path.name}":
            for inner in sorted(path.iterdir())[2::2]:  # not the manifest, which goes last
                inner.unlink()
            raise Killed
        self._rmtree(path)
        self._meet(f"after removing {path.name}")

    def _meet(self, event: str) -> None:
        self.events.append(event)
        if event == self.deadly:
            raise Killed

    def at(self, event: str | None) -> None:
        """Where to die from now on; None for never."""
        self.events.clear()
        self.deadly = event


@pytest.fixture
def fate() -> Iterator[Fate]:
    with pytest.MonkeyPatch.context() as patch:
        yield Fate(patch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


ROWS = tiny_models.tokens(3, 12)
METHODS = {
    "wanda": tiny_models.request("wanda"),
    "sparsegpt": tiny_models.request("sparsegpt", nm=(2, 4)),
    "besa": tiny_models.request("besa", sparsity=0.4),
    "besa-sensitivity": tiny_models.request("besa", loss="sensitivity"),
    "besa-stream": tiny_models.request("besa", target="stream", granularity="layer", epochs=2),
}


def job(
    run: Path, model: Path, request: StageRequest, *, restart: bool = False, notes: list[str] | None = None
) -> StageJob:
    noted = [] if notes is None else notes
    finish_exchange(Run(run), request.stage)
    return StageJob(
        Run(run),
        tiny_models.local(model),
        tiny_models.calibration_set(ROWS),
        request,
        restart=restart,
        notify=noted.append,
    )


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """The files of a finished run, by method."""
    made: dict[str, dict[str, bytes]] = {}

    def of(name: str) -> dict[str, bytes]:
        if name not in made:
            run = tmp_path_factory.mktemp(name)
            tiny_models.run(job(run, model, METHODS[name]))
            made[name] = tiny_models.files(run)
        return made[name]

    return of


def left_in(run: Path) -> dict[str, bytes]:
    return tiny_models.files(run)


def test_the_points_are_all_there_are(fate: Fate, model: Path, tmp_path: Path) -> None:
    tiny_models.run(job(tmp_path, model, METHODS["wanda"]))
    assert fate.events == POINTS


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point_and_run_again(
    point: str, fate: Fate, model: Path, uninterrupted: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    expected = uninterrupted("wanda")
    fate.at(point)
    with pytest.raises(Killed):
        tiny_models.run(job(tmp_path, model, METHODS["wanda"]))
    fate.at(None)
    manifest = tiny_models.run(job(tmp_path, model, METHODS["wanda"]))
    assert manifest["status"] == "complete"
    assert left_in(tmp_path) == expected


@pytest.mark.parametrize("point", ["before sensitivity.safetensors", "after sensitivity.safetensors", *POINTS[6:]])
def test_killed_at_a_point_with_the_sensitivity_of_channels(
    point: str, fate: Fate, model: Path, uninterrupted: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    expected = uninterrupted("besa-sensitivity")
    fate.at(point)
    with pytest.raises(Killed):
        tiny_models.run(job(tmp_path, model, METHODS["besa-sensitivity"]))
    fate.at(None)
    tiny_models.run(job(tmp_path, model, METHODS["besa-sensitivity"]))
    assert left_in(tmp_path) == expected


@pytest.mark.parametrize("name", [name for name in METHODS if name != "wanda"])
@pytest.mark.parametrize("point", [f"after {SHARDS[1]}.safetensors", f"before {SHARDS[2]}.safetensors"])
def test_every_method_goes_on_as_if_nothing_had_happened(
    name: str, point: str, fate: Fate, model: Path, uninterrupted: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    expected = uninterrupted(name)
    fate.at(point)
    with pytest.raises(Killed):
        tiny_models.run(job(tmp_path, model, METHODS[name]))
    fate.at(None)
    again = job(tmp_path, model, METHODS[name])
    assert [report.resumed for report in again.blocks()] == [True, False]
    again.finish()
    assert left_in(tmp_path) == expected


def test_killed_again_and_again(
    fate: Fate, model: Path, uninterrupted: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    expected = uninterrupted("besa")
    for point in (POINTS[3], *[f"before {name}" for name in WRITTEN[3:-1]], "before besa.json"):
        fate.at(point)
        with pytest.raises(Killed):
            tiny_models.run(job(tmp_path, model, METHODS["besa"]))
    fate.at(None)
    tiny_models.run(job(tmp_path, model, METHODS["besa"]))
    assert left_in(tmp_path) == expected


def test_only_the_timing_file_knows_of_the_interruption(fate: Fate, model: Path, tmp_path: Path) -> None:
    fate.at(f"before {SHARDS[2]}.safetensors")
    with pytest.raises(Killed):
        tiny_models.run(job(tmp_path, model, METHODS["wanda"]))
    fate.at(None)
    notes: list[str] = []
    tiny_models.run(job(tmp_path, model, METHODS["wanda"], notes=notes))
    assert notes == [f"{tmp_path / 'pruned'}: 1 of 2 blocks are done, resuming from there"]
    lines = [json.loads(line) for line in (tmp_path / "pruned" / "timing.jsonl").read_text().splitlines()]
    assert [(line["block"], line["resumed"]) for line in lines] == [(0, False), (0, True), (1, False)]


def test_what_was_auto_is_resolved_once(
    fate: Fate, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = prune.request(method="besa", options={})  # device and dtype auto
    monkeypatch.setattr(compute, "dtype", lambda name, on: torch.bfloat16)
    tiny_models.run(job(tmp_path / "whole", model, request))
    fate.at(f"before {SHARDS[2]}.safetensors")
    with pytest.raises(Killed):
        tiny_models.run(job(tmp_path / "cut", model, request))
    fate.at(None)
    monkeypatch.setattr(compute, "dtype", lambda name, on: torch.float32)  # another machine goes on
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        manifest = tiny_models.run(job(tmp_path / "cut", model, request))
    finally:
        torch.set_num_threads(before)
    assert (manifest["compute"]["dtype"], manifest["compute"]["threads"]) == ("bfloat16", before)
    assert left_in(tmp_path / "cut") == left_in(tmp_path / "whole")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (tiny_models.request("wanda", sparsity=0.6), "sparsity 0.5 there, 0.6 asked"),
        (tiny_models.request("magnitude"), "method wanda there, magnitude asked"),
        (tiny_models.request("wanda", nm=(2, 4)), "sparsity 0.5 there, - asked; nm - there, 2:4 asked"),
        (
            prune.request(method="wanda", options={}, device="cpu", dtype="bfloat16"),
            "dtype float32 there, bfloat16 asked",
        ),
        (prune.request(method="wanda", options={}, device="cpu", dtype="float32", seed=3), "seed 0 there, 3 asked"),
    ],
)
@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_other_options_are_refused_with_both_values(
    state: str, other: StageRequest, said: str, fate: Fate, model: Path, tmp_path: Path
) -> None:
    fate.at(f"after {SHARDS[1]}.safetensors" if state == "unfinished" else None)
    try:
        tiny_models.run(job(tmp_path, model, METHODS["wanda"]))
    except Killed:
        assert state == "unfinished"
    fate.at(None)
    before = tiny_models.files(tmp_path, without=())
    with pytest.raises(BesaError) as caught:
        job(tmp_path, model, other)
    article = "an" if state == "unfinished" else "a"
    assert f"holds {article} {state} stage made with other options: " in caught.value.message
    assert said in caught.value.message
    assert "--run NAME" in caught.value.hint
    assert "--restart" in caught.value.hint
    assert tiny_models.files(tmp_path, without=()) == before


def test_another_model_and_other_tokens_are_refused(model: Path, tmp_path: Path) -> None:
    tiny_models.run(job(tmp_path / "run", model, METHODS["wanda"]))
    other = tiny_models.checkpoint(tmp_path / "other", dtype=torch.bfloat16, seed=9)
    with pytest.raises(BesaError, match=r"model [0-9a-f]{12} there, [0-9a-f]{12} asked"):
        job(tmp_path / "run", other, METHODS["wanda"])
    with pytest.raises(BesaError, match=r"calibration [0-9a-f]{12} there, [0-9a-f]{12} asked"):
        StageJob(
            Run(tmp_path / "run"),
            tiny_models.local(model),
            tiny_models.calibration_set(tiny_models.tokens(3, 12, seed=8)),
            METHODS["wanda"],
        )


@pytest.mark.parametrize("point", ["after besa.json", "after generation_config.json", "before besa.json again"])
def test_a_stage_killed_while_it_begins_has_no_block_and_takes_the_model_that_is_there_then(
    point: str, fate: Fate, model: Path, tmp_path: Path
) -> None:
    other = tiny_models.checkpoint(tmp_path / "other", seed=1, dtype=torch.bfloat16)
    fate.at(point)
    with pytest.raises(Killed):
        tiny_models.run(job(tmp_path / "cut", model, METHODS["wanda"]))
    fate.at(None)
    tiny_models.run(job(tmp_path / "cut", other, METHODS["wanda"]))
    tiny_models.run(job(tmp_path / "whole", other, METHODS["wanda"]))
    assert left_in(tmp_path / "cut") == left_in(tmp_path / "whole")


def test_a_stage_that_has_begun_takes_no_other_model(fate: Fate, model: Path, tmp_path: Path) -> None:
    other = tiny_models.checkpoint(tmp_path / "other", seed=1, dtype=torch.bfloat16)
    fate.at("after besa.json again")
    with pytest.raises(Killed):
        tiny_models.run(job(tmp_path / "cut", model, METHODS["wanda"]))
    fate.at(None)
    with pytest.raises(BesaError, match=r"made with other options: model [0-9a-f]{12} there, [0-9a-f]{12} asked"):
        job(tmp_path / "cut", other, METHODS["wanda"])


def test_a_finished_stage_is_not_made_again(model: Path, tmp_path: Path, fate: Fate) -> None:
    first = job(tmp_path, model, METHODS["wanda"])
    reports = list(first.blocks())
    manifest = first.finish()
    before = tiny_models.files(tmp_path, without=())
    fate.at(None)
    again = job(tmp_path, model, METHODS["wanda"])
    assert again.done
    assert [report.linears for report in again.blocks()] == [report.linears for report in reports]
    assert again.finish() == manifest
    assert tiny_models.files(tmp_path, without=()) == before
    assert fate.events == []


RESTART_POINTS = [
    *[point for name in WRITTEN for point in (f"before {name}", f"after {name}")],
    "before .pruned.replaced",
    "after .pruned.replaced",
    "before pruned",
    "after pruned",
    "before removing .pruned.replaced",
    "halfway removing .pruned.replaced",
    "after removing .pruned.replaced",
]


def test_the_points_of_a_restart(fate: Fate, model: Path, tmp_path: Path) -> None:
    tiny_models.run(job(tmp_path, model, METHODS["sparsegpt"]))
    fate.at(None)
    tiny_models.run(job(tmp_path, model, METHODS["wanda"], restart=True))
    assert fate.events == [point for point in RESTART_POINTS if not point.startswith("halfway")]


@pytest.mark.parametrize("again", ["with --restart", "without it"])
@pytest.mark.parametrize("point", ["after besa.json again", *RESTART_POINTS[9:]])
def test_killed_while_replacing_a_finished_stage(
    point: str, again: str, fate: Fate, model: Path, uninterrupted: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    expected, old = uninterrupted("wanda"), uninterrupted("sparsegpt")
    for name, content in old.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    fate.at(point)
    with pytest.raises(Killed):
        tiny_models.run(job(tmp_path, model, METHODS["wanda"], restart=True))
    fate.at(None)
    whole = [directory for directory in tmp_path.iterdir() if checkpoint_is_whole(directory)]
    assert whole, "at no moment may there be neither the old stage nor the new one"
    tiny_models.run(job(tmp_path, model, METHODS["wanda"], restart=again == "with --restart"))
    assert left_in(tmp_path) == expected


def checkpoint_is_whole(directory: Path) -> bool:
    try:
        return bool(stages.require_finished(directory))
    except BesaError:
        return False


def test_a_finished_stage_serves_until_its_replacement_is_finished(fate: Fate, model: Path, tmp_path: Path) -> None:
    tiny_models.run(job(tmp_path, model, METHODS["sparsegpt"]))
    before = left_in(tmp_path / "pruned")
    fate.at(f"after {SHARDS[1]}.safetensors")
    with pytest.raises(Killed):
        tiny_models.run(job(tmp_path, model, METHODS["wanda"], restart=True))
    assert left_in(tmp_path / "pruned") == before
    assert Run(tmp_path).newest() == tmp_path / "pruned"


@pytest.mark.parametrize(
    "point", ["before .pruned.replaced", "before removing .pruned.replaced", "halfway removing .pruned.replaced"]
)
def test_killed_while_throwing_an_unfinished_stage_away(
    point: str, fate: Fate, model: Path, uninterrupted: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    expected = uninterrupted("wanda")
    fate.at("before besa.json finally")
    with pytest.raises(Killed):
        tiny_models.run(job(tmp_path, model, METHODS["sparsegpt"]))
    fate.at(point)
    with pytest.raises(Killed):
        tiny_models.run(job(tmp_path, model, METHODS["wanda"], restart=True))
    fate.at(None)
    tiny_models.run(job(tmp_path, model, METHODS["wanda"], restart=True))
    assert left_in(tmp_path) == expected


def test_what_has_no_manifest_is_not_written_over(model: Path, tmp_path: Path) -> None:
    tiny_models.run(job(tmp_path, model, METHODS["sparsegpt"]))
    (tmp_path / "pruned" / "besa.json").unlink()
    before = left_in(tmp_path)
    with pytest.raises(BesaError, match=r"pruned was not made by besa: it holds config.json and no besa.json"):
        job(tmp_path, model, METHODS["wanda"])
    assert left_in(tmp_path) == before


def test_the_model_itself_is_not_written_over(model: Path, tmp_path: Path) -> None:
    tiny_models.run(job(tmp_path, model, METHODS["wanda"]))
    before = left_in(tmp_path)
    for restart in (False, True):
        with pytest.raises(BesaError, match="both the model and the directory to write to"):
            job(tmp_path, tmp_path / "pruned", METHODS["wanda"], restart=restart)
    assert left_in(tmp_path) == before


def test_an_interrupted_restart_goes_on_with_the_same_command(
    fate: Fate, model: Path, uninterrupted: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    expected = uninterrupted("wanda")
    tiny_models.run(job(tmp_path, model, METHODS["sparsegpt"]))
    fate.at(f"before {SHARDS[2]}.safetensors")
    with pytest.raises(Killed):
        tiny_models.run(job(tmp_path, model, METHODS["wanda"], restart=True))
    fate.at(None)
    again = job(tmp_path, model, METHODS["wanda"], restart=True)
    assert [report.resumed for report in again.blocks()] == [True, False]
    again.finish()
    assert left_in(tmp_path) == expected


def test_a_gap_is_filled(
    model: Path, uninterrupted: Callable[[str], dict[str, bytes]], tmp_path: Path, fate: Fate
) -> None:
    """A shard is lost: its block and all that follow are made again."""
    expected = uninterrupted("besa")
    fate.at("before besa.json finally")
    with pytest.raises(Killed):
        tiny_models.run(job(tmp_path, model, METHODS["besa"]))
    fate.at(None)
    (tmp_path / "pruned" / f"{SHARDS[1]}.safetensors").unlink()
    tiny_models.run(job(tmp_path, model, METHODS["besa"]))
    assert left_in(tmp_path) == expected


# --- through the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def words(model: Path, workplace: Path) -> list[str]:
    rows = tiny_models.rows_file(workplace / "rows.jsonl", ROWS)
    drawn = ["--data", str(rows), "--samples", "3", "--seqlen", "12"]
    return ["prune", "--model", str(model), "--method", "wanda", "--dtype", "float32", *drawn]


def test_the_same_command_again(besa: Besa, words: list[str], fate: Fate) -> None:
    whole = besa(*words, "--run", "whole")
    assert whole.code == 0, whole.err
    fate.at(f"before {SHARDS[2]}.json")
    with pytest.raises(Killed):
        besa(*words, "--run", "cut")
    fate.at(None)
    unfinished = besa("eval", "ppl", "--run", "cut")
    assert unfinished.code == 1
    error, hint = unfinished.err.splitlines()[-2:]
    assert error == "error: cut/pruned is unfinished: 1 of 2 blocks are done"
    assert hint == "hint: run the same 'besa prune' again to finish it"
    again = besa(*words, "--run", "cut")
    assert again.code == 0, again.err
    noise = (".lock", ".holder.json", "timing.jsonl")
    assert tiny_models.files(Path("cut"), without=noise) == tiny_models.files(Path("whole"), without=noise)
    assert tiny_models.files(Path("cut", "pruned")).keys() == tiny_models.files(Path("whole", "pruned")).keys()
    refused = besa(*words, "--run", "cut", "--sparsity", "0.25")
    assert refused.code == 1
    assert "sparsity 0.5 there, 0.25 asked" in refused.err


HOLDER = """
import sys, time
from pathlib import Path
from besa_cli.system import lock
with lock.hold(Path(sys.argv[1]), "besa prune --run shared"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_process_says_who_holds_the_run(besa: Besa, words: list[str], workplace: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(workplace / "shared")]
    environment = {**os.environ, "PYTHONPATH": str(Path(besa_cli.__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            refused = besa(*words, "--run", "shared")
            assert refused.code == 1
            error, hint = refused.err.splitlines()
            assert error.startswith(f"error: shared is in use by 'besa prune --run shared' (process {holder.pid} on ")
            assert "--run" in hint
            assert not (workplace / "shared" / "pruned").exists()
        finally:
            holder.send_signal(signal.SIGKILL)
    outcome = besa(*words, "--run", "shared")  # a dead process holds nothing
    assert outcome.code == 0, outcome.err


def test_a_damaged_finished_shard_is_named(model: Path, fate: Fate, tmp_path: Path) -> None:
    fate.at(f"after {SHARDS[1]}.safetensors")
    with pytest.raises(Killed):
        tiny_models.run(job(tmp_path, model, METHODS["wanda"]))
    fate.at(None)
    shard = tmp_path / "pruned" / f"{SHARDS[1]}.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(BesaError, match=f"{shard} is cut short"):
        tiny_models.run(job(tmp_path, model, METHODS["wanda"]))


def test_no_command_takes_a_stage_whose_shards_are_exchanged(besa: Besa, words: list[str], workplace: Path) -> None:
    assert besa(*words, "--run", "whole").code == 0
    stage = workplace / "whole" / "pruned"
    one, other = (stage / f"{name}.safetensors" for name in SHARDS[1:])
    one.rename(stage / "swap")
    other.rename(one)
    (stage / "swap").rename(other)
    for command in (["eval", "sample", "Hello", "--tokens", "2"], ["eval", "ppl"], ["quantize"], ["export"], words):
        refused = besa(*command, "--run", "whole")
        assert (refused.code, command, refused.err.count("error: ")) == (1, command, 1)
        assert one.name in refused.err


def test_a_cached_result_is_whole_or_absent(fate: Fate, tmp_path: Path) -> None:
    """A result file that another version wrote is not used; a temporary one is none."""
    (tmp_path / ".ppl.json.partial").write_text("{")
    assert results.load(tmp_path / "ppl.json") is None
