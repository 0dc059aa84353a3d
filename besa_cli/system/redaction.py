"""What others may read of this machine: of a path on it only the last part, in values and in files that go out."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from besa_cli.system import disk

Value = TypeVar("Value")

_ON_A_MACHINE = re.compile(r"/|~|\.\./|[A-Za-z]:[\\/]|\\\\|file:", re.IGNORECASE)
_SETTINGS = "config.json"  # how the names of files of settings end
_PATHS = {"_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file"}


def text(value: object) -> str:
    """A value in words; of a path on this machine the last part."""
    whole = str(value)
    if not _ON_A_MACHINE.match(whole):
        return whole
    return re.split(r"[\\/]", whole.rstrip("\\/"))[-1] or "-"


def value(found: Value) -> Value:
    """A JSON value in which every text that is a path on this machine is its last part."""
    if isinstance(found, str):
        return text(found)  # type: ignore[return-value]
    if isinstance(found, list):
        return [value(each) for each in found]  # type: ignore[return-value]
    if isinstance(found, dict):
        return {name: value(each) for name, each in found.items()}  # type: ignore[return-value]
    return found


def content(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What others may read of a JSON file: of besa's own all but paths, of settings all but those transformers notes.

    Parameters
    ----------
    name : str
        The file's name.
    found : dict
        What it holds.
    """
    if name == disk.MANIFEST:
        return value(found)
    if name.endswith(_SETTINGS):
        return {key: value(each) if key in _PATHS else each for key, each in found.items()}
    return found


def rewrite(directory: Path) -> Iterator[tuple[Path, bytes]]:
    """Rewrite those JSON files of a directory and its folders that name paths; yields each and what it was.

    Raises
    ------
    BesaError
        One of them cannot be read, or written.
    """
    for path in sorted([*directory.rglob(f"*{_SETTINGS}"), *directory.rglob(disk.MANIFEST)]):
        there = disk.read_json(path)
        others = content(path.name, there)
        if others != there:
            before = path.read_bytes()
            disk.write_json(path, others)
            yield path, before
