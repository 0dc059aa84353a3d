"""Which files of a model go with it."""

from pathlib import Path

from besa_cli.checkpoint import copying

CONFIGURATION = {"config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt", "LICENSE.md"}
WEIGHTS = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "model.gguf"}
OWN = {"besa.json", "export.json", "besa-cache.json", "model-00001-of-00002.json"}
OTHERS = {".gitattributes", "README.md", "picture.png"}


def test_configuration_goes_along_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "original").mkdir(parents=True)
    target.mkdir()
    for name in CONFIGURATION | WEIGHTS | OWN | OTHERS:
        (source / name).write_text(name)
    copying.copy_small_files(source, target)
    assert {path.name: path.read_text() for path in target.iterdir()} == {name: name for name in CONFIGURATION}
