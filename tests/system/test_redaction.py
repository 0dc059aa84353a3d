"""What an export tells of the machine that made it: of paths only their last part, in every file of every format."""

import json
from pathlib import Path

import pytest
from support import exported, llamas, quantized, tiny_models

from besa_cli.checkpoint.runs import Run
from besa_cli.errors import BesaError
from besa_cli.jobs import import_
from besa_cli.system import redaction

FORMATS = [
    ("hf", {}),
    ("hf", {"dtype": "float32"}),
    ("sparse", {}),
    ("sparse", {"compress": "zstd"}),
    ("gguf", {"type": "BF16"}),
    ("compressed-tensors", {}),
]
SETTINGS = {
    "special_tokens_map_file": "/home/jane/m/special_tokens_map.json",
    "name_or_path": "/home/jane/m",
    "x": "/y",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A quantized stage whose tokenizer's settings name paths, as transformers notes them."""
    place = tmp_path_factory.mktemp("home-of-jane") / "secret"
    run = quantized.stage(llamas.stage(place, intermediate_size=96, head_dim=24))
    for name in ("config.json", "tokenizer_config.json"):
        file = run.stage("quantized") / name
        told = json.loads(file.read_text()) | {"_name_or_path": str(run.path.parent / "dense")}
        file.write_text(json.dumps(told | (SETTINGS if name.startswith("tokenizer") else {})))
    return run


@pytest.mark.parametrize(("name", "options"), FORMATS)
def test_no_file_of_an_export_holds_a_path_of_the_machine(name: str, options: dict[str, str], run: Run) -> None:
    directory = exported.export(run, name, **options)
    names = ("home-of-jane", "secret", "/home/jane")
    assert "home-of-jane" in str(run.path)
    for path in directory.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not [each for each in names if each.encode() in content], path


def test_an_import_on_the_same_machine_gives_the_paths_back_and_elsewhere_their_last_parts(
    run: Run, tmp_path: Path
) -> None:
    directory = exported.export(run, "sparse", compress="zstd") if not (run.exports / "sparse").exists() else None
    directory = directory or run.exports / "sparse"
    whole = tiny_models.files(run.stage("quantized"))
    here = import_.ImportJob(directory, Run(tmp_path / "here"))
    list(here.shards())
    assert tiny_models.files(here.directory) == whole
    directory.rename(tmp_path / "sent")
    there = import_.ImportJob(tmp_path / "sent", Run(tmp_path / "there"))
    list(there.shards())
    found = tiny_models.files(there.directory)
    differing = {name for name in whole if found[name] != whole[name]}
    assert differing == {"besa.json", "config.json", "tokenizer_config.json"}
    assert json.loads(found["besa.json"])["model"]["name"] == "dense"
    settings = json.loads(found["tokenizer_config.json"])
    assert (settings["name_or_path"], settings["special_tokens_map_file"], settings["x"]) == (
        "m",
        "special_tokens_map.json",
        "/y",
    )


def test_files_kept_beside_an_export_are_taken_only_where_they_are_the_same(run: Run, tmp_path: Path) -> None:
    moved = exported.copy_of(run, tmp_path / "run")
    directory = exported.export(moved, "sparse")
    kept = moved.exports / ".sparse.private" / "config.json"
    kept.write_text(kept.read_text().replace('"vocab_size": ', '"vocab_size": 1'))
    job = import_.ImportJob(directory, Run(tmp_path / "back"))
    list(job.shards())
    back = json.loads((job.directory / "config.json").read_text())
    assert back["vocab_size"] == json.loads((directory / "config.json").read_text())["vocab_size"]


def test_a_file_that_besa_did_not_write_into_the_stage_does_not_go_out(run: Run, tmp_path: Path) -> None:
    moved = exported.copy_of(run, tmp_path / "run")
    (moved.stage("quantized") / "passwords.txt").write_text("secret")
    directory = exported.export(moved, "sparse")
    assert not (directory / "stage" / "passwords.txt").exists()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/jane/m", "m"),
        ("/home/jane/m/", "m"),
        ("~/m", "m"),
        ("../jane/m", "m"),
        ("C:\\Users\\jane\\m", "m"),
        ("file:///home/jane/m", "m"),
        ("/", "-"),
        ("org/name", "org/name"),
        ("m", "m"),
        (3, 3),
        (None, None),
        (["/a/b", {"c": "/d/e"}], ["b", {"c": "e"}]),
    ],
)
def test_of_a_path_on_a_machine_the_last_part_is_shown(value: object, shown: object) -> None:
    assert redaction.value(value) == shown


def test_settings_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(BesaError, match=r"config\.json"):
        list(redaction.rewrite(tmp_path))
