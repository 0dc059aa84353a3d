"""What may be replaced: directories that besa made, file by file, and nothing else."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support import exported, tiny_models, written

from besa_cli.checkpoint import ownership
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import HELD_OUT, Stage
from besa_cli.errors import BesaError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = exported.stage(tmp_path_factory.mktemp("owned"))
    exported.export(run, "sparse")
    return run


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    import shutil

    shutil.copytree(made.path, tmp_path / "run")
    return Run(tmp_path / "run")


def places(run: Run) -> tuple[Path, Path]:
    return run.stage("pruned"), run.exports / "sparse"


def test_a_stage_and_an_export_of_besa_may_be_replaced_and_go_whole(run: Run) -> None:
    for directory in places(run):
        assert ownership.strangers(directory) == []
        ownership.refuse_to_replace(directory)
        ownership.remove(directory)
        assert not directory.exists()


def test_what_a_killed_process_left_is_besas(run: Run) -> None:
    for directory, name in zip(places(run), ("model-00002-of-00003.safetensors", "config.json"), strict=True):
        (directory / f".{name}.4711.partial").write_text("half")
        ownership.refuse_to_replace(directory)


def test_the_held_out_streams_of_an_unfinished_stage_are_besas(run: Run) -> None:
    directory = run.stage("pruned")
    (directory / HELD_OUT).write_bytes(b"streams")
    (directory / f".{HELD_OUT}.4711.partial").write_bytes(b"half")
    ownership.refuse_to_replace(directory)
    ownership.remove(directory)
    assert not directory.exists()


def _write(name: str) -> Callable[[Path], str]:
    def put(directory: Path) -> str:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("mine")
        return name

    return put


def _link(directory: Path) -> str:
    (directory / "codes").symlink_to("/tmp")
    return "codes"


STRANGERS = {
    "notes": _write("notes.txt"),
    "hidden": _write(".git/HEAD"),
    "script": _write("train.py"),
    "backup": _write("model-00002-of-00003.safetensors.bak"),
    "other shards": _write("model-00002-of-00009.safetensors"),
    "a shard beyond the last": _write("model-00004-of-00003.safetensors"),
    "in a folder": _write("codes/mine.txt"),
    "line feed": _write("model-00002-of-00003.safetensors\n"),
    "link to a folder": _link,
}


@pytest.mark.parametrize("how", STRANGERS)
@pytest.mark.parametrize("which", ["stage", "export"])
def test_a_file_that_besa_did_not_write_is_named_and_stays(how: str, which: str, run: Run) -> None:
    directory = places(run)[which == "export"]
    name = STRANGERS[how](directory)
    with pytest.raises(BesaError) as caught:
        ownership.refuse_to_replace(directory)
    assert " ".join(name.split()) in caught.value.message
    ownership.remove(directory)
    left = [path for path in directory.rglob("*") if path.is_symlink() or path.is_file()]
    assert [path.relative_to(directory).as_posix() for path in left] == [name]


def test_small_files_that_older_stages_do_not_list_are_known_by_name_or_by_their_origin(run: Run) -> None:
    stage = run.stage("pruned")
    dense = Path(json.loads((stage / "besa.json").read_text())["model"]["directory"])
    for name in ("vocab.json", "LICENSE-MODEL", "special_tokens_map.json"):
        (stage / name).write_text("{}")
    ownership.refuse_to_replace(stage)
    (stage / "params.json").write_text('{"dim": 8}')
    (dense / "params.json").write_text('{"dim": 8}')
    ownership.refuse_to_replace(stage)
    (stage / "params.json").write_text('{"dim": 9}')
    with pytest.raises(BesaError, match=r"params\.json"):
        ownership.refuse_to_replace(stage)


def test_small_files_that_a_stage_lists_are_its_own(run: Run) -> None:
    stage = run.stage("pruned")
    manifest = json.loads((stage / "besa.json").read_text()) | {"files": ["USE_POLICY.txt"]}
    (stage / "besa.json").write_text(json.dumps(manifest))
    (stage / "USE_POLICY.txt").write_text("be kind")
    ownership.refuse_to_replace(stage)


@pytest.mark.parametrize("manifest", [None, {}, {"format": 1}, {"format": 1, "stage": "mine"}])
def test_without_a_manifest_of_besa_nothing_is_its_own(manifest: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    if manifest is not None:
        (tmp_path / "besa.json").write_text(json.dumps(manifest))
    before = tiny_models.files(tmp_path)
    with pytest.raises(BesaError):
        ownership.refuse_to_replace(tmp_path)
    if manifest:
        with contextlib.suppress(BesaError):
            ownership.remove(tmp_path)
    assert tiny_models.files(tmp_path) == before


def test_a_list_reaches_no_file_outside_the_directory(run: Run) -> None:
    export = run.exports / "sparse"
    manifest = json.loads((export / "export.json").read_text())
    manifest["files"] |= {"../../canary": {}, str(run.path / "canary"): {}}
    (export / "export.json").write_text(json.dumps(manifest))
    (run.path / "canary").write_text("mine")
    ownership.remove(export)
    assert (run.path / "canary").read_text() == "mine"


@pytest.mark.parametrize("how", ["inside", "file linked", "folder linked"])
def test_what_is_read_from_inside_is_not_replaced(how: str, run: Run, tmp_path: Path) -> None:
    stage, source = run.stage("pruned"), tmp_path / "source"
    shard = stage / "model-00002-of-00003.safetensors"
    if how == "inside":
        source = stage
    elif how == "file linked":
        source.mkdir()
        (source / "model.safetensors").symlink_to(os.path.relpath(shard, source))
    else:
        source.symlink_to(stage)
    with pytest.raises(BesaError, match="which is being read, is in it"):
        ownership.refuse_to_replace(stage, [source])


def test_of_a_link_the_link_alone_is_removed(run: Run, tmp_path: Path) -> None:
    stage = run.stage("pruned")
    stage.rename(tmp_path / "larger-disk")
    stage.symlink_to(tmp_path / "larger-disk")
    before = tiny_models.files(tmp_path / "larger-disk")
    ownership.refuse_to_replace(stage)
    ownership.remove(stage)
    assert not stage.is_symlink()
    assert tiny_models.files(tmp_path / "larger-disk") == before


def test_an_empty_directory_and_none_may_be_replaced(tmp_path: Path) -> None:
    ownership.refuse_to_replace(tmp_path / "nothing")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    ownership.refuse_to_replace(tmp_path / "empty")
    ownership.remove(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_a_file_in_the_place_of_a_directory_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BesaError, match="a file is in its place"):
        ownership.refuse_to_replace(tmp_path / "file")


def test_a_stage_lists_the_small_files_that_it_copied_whatever_their_names(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    names = {"USE_POLICY.txt", "params.json", "additional_chat_templates/tool_use.jinja"}
    for name in names:
        (source / name).write_text("{}")
    stage = Stage(tmp_path / "stage", 2)
    stage.begin(written.stage_manifest(), source)
    for name in names:
        (source / name).unlink()
    ownership.refuse_to_replace(stage.directory)
    (stage.directory / "notes.txt").write_text("mine")
    with pytest.raises(BesaError, match=r"notes\.txt"):
        ownership.refuse_to_replace(stage.directory)
