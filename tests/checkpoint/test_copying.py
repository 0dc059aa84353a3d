"""Which files of a model go with it."""

from pathlib import Path

import pytest

from besa_cli.checkpoint import copying
from besa_cli.errors import BesaError

CONFIGURATION = {"config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt", "LICENSE.md"}
WEIGHTS = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "model.gguf"}
OWN = {"besa.json", "export.json", "besa-cache.json", "model-00001-of-00002.json"}
OTHERS = {".gitattributes", "README.md", "picture.png"}


def test_configuration_goes_along_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "original").mkdir(parents=True)
    target.mkdir()
    for name in CONFIGURATION | WEIGHTS | OWN | OTHERS:
        (source / name).write_text(f'"{name}"')
    copying.copy_small_files(source, target)
    assert {path.name: path.read_text() for path in target.iterdir()} == {name: f'"{name}"' for name in CONFIGURATION}


def test_additional_chat_templates_go_along_in_their_folder(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    folder = source / "additional_chat_templates"
    folder.mkdir(parents=True)
    target.mkdir()
    (folder / "tool_use.jinja").write_text("TOOLS")
    (folder / "run.py").write_text("print()")
    copying.copy_small_files(source, target)
    copied = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert copied == {"additional_chat_templates/tool_use.jinja": "TOOLS"}


def test_json_that_is_nested_too_deeply_is_refused_by_name(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "notes.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(BesaError, match=r"source/notes.json is damaged: maximum recursion"):
        copying.copy_small_files(source, tmp_path)


def test_a_cut_json_file_is_refused_by_name(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer_config.json").write_text('{"bos_token": "<s')
    with pytest.raises(BesaError, match=r"source/tokenizer_config.json is damaged: Unterminated string"):
        copying.copy_small_files(source, tmp_path)
    assert not (tmp_path / "tokenizer_config.json").exists()
