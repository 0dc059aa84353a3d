"""Copying of a model's small files: configuration, tokenizer, chat template and licence."""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from besa_cli.checkpoint import manifests
from besa_cli.errors import BesaError, reason_of
from besa_cli.models import cache, files
from besa_cli.system import disk
from besa_cli.system.disk import Json

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".index.json")
_OWN = (manifests.MANIFEST, manifests.EXPORT, cache.FILES)
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm")


def small_files(source: Path) -> list[str]:
    """List the names of configuration, tokenizer, chat template and licence files; none of them holds weights."""
    flat = [path.name for path in sorted(source.iterdir()) if path.is_file() and _is_copied(path.name)]
    inside = [path for folder in files.FOLDERS for path in sorted((source / folder).glob("*.jinja")) if path.is_file()]
    return [*flat, *(path.relative_to(source).as_posix() for path in inside)]


def copy_small_files(source: Path, target: Path, changed: Mapping[str, Json] | None = None) -> None:
    """Copy the files that `small_files` lists; besa's own files are not among them.

    JSON files named in `changed` are written with these contents instead.

    Raises
    ------
    BesaError
        A JSON file is invalid, for instance cut short.
    """
    for name in small_files(source):
        path = source / name
        if path.suffix == ".json":
            _require_json(path)
        if changed and name in changed:
            disk.write_json(target / name, changed[name])
        else:
            disk.publish(target / name, partial(_copy, path))


def _require_json(path: Path) -> None:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BesaError(
            f"{path} is damaged: {reason_of(error)}", "restore the file, or fetch the model again"
        ) from error


def _is_copied(name: str) -> bool:
    if name in _OWN or name.startswith((".", "model-")) or any(name.endswith(suffix) for suffix in _WEIGHTS):
        return False
    return name.endswith(_COPIED) or name.upper().startswith("LICENSE")


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
