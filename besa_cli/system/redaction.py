"""Redaction of local paths in published values and files: only the last part of a path is kept."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from besa_cli.system import disk
from besa_cli.system.disk import JsonObject

Value = TypeVar("Value")

_ON_A_MACHINE = re.compile(r"/|~|\.\./|[A-Za-z]:[\\/]|\\\\|file:", re.IGNORECASE)
_SETTINGS = "config.json"  # suffix of the names of configuration files
_PATHS = {"_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file"}


def text(value: object) -> str:
    """Return a value as text; of a local path only the last part."""
    string = str(value)
    if not _ON_A_MACHINE.match(string):
        return string
    return re.split(r"[\\/]", string.rstrip("\\/"))[-1] or "-"


def value(data: Value) -> Value:
    """Replace every local path in a JSON value by its last part."""
    if isinstance(data, str):
        return text(data)  # type: ignore[return-value]
    if isinstance(data, list):
        return [value(item) for item in data]  # type: ignore[return-value]
    if isinstance(data, dict):
        return {name: value(item) for name, item in data.items()}  # type: ignore[return-value]
    return data


def content(name: str, data: JsonObject) -> JsonObject:
    """Redact a JSON file: in besa's own all local paths, in configuration files those that transformers records.

    Parameters
    ----------
    name : str
        The file's name.
    data : dict
        The file's content.
    """
    if name == disk.MANIFEST:
        return value(data)
    if name.endswith(_SETTINGS):
        return {key: value(item) if key in _PATHS else item for key, item in data.items()}
    return data


def rewrite(directory: Path) -> Iterator[tuple[Path, bytes]]:
    """Redact the JSON files of a directory and its subdirectories that hold local paths; yield each with its old bytes.

    Raises
    ------
    BesaError
        A file cannot be read or written.
    """
    for path in sorted([*directory.rglob(f"*{_SETTINGS}"), *directory.rglob(disk.MANIFEST)]):
        original = disk.read_json(path)
        redacted = content(path.name, original)
        if redacted != original:
            before = path.read_bytes()
            disk.write_json(path, redacted)
            yield path, before
