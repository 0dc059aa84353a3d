"""The small files of a model that go with it: configuration, tokenizer, licence."""

import shutil
from functools import partial
from pathlib import Path

from besa_cli import disk
from besa_cli.checkpoint import manifests
from besa_cli.models import cache

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".index.json")
_OWN = (manifests.MANIFEST, manifests.EXPORT, cache.FILES)
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm")


def copy_small_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer and licence files of a model; nothing that holds weights, nothing of besa's own."""
    for path in sorted(source.iterdir()):
        if path.is_file() and _is_copied(path.name):
            disk.publish(target / path.name, partial(_copy, path))


def _is_copied(name: str) -> bool:
    if name in _OWN or name.startswith((".", "model-")) or any(name.endswith(suffix) for suffix in _WEIGHTS):
        return False
    return name.endswith(_COPIED) or name.upper().startswith("LICENSE")


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
