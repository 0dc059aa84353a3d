"""One file a result: what was measured, with the versions that it depends on."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from besa_cli import disk
from besa_cli.checkpoint import manifests

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Result = TypeVar("Result", bound="DataclassInstance")


def save(
    result: "DataclassInstance", file: Path, kind: str, model: Mapping[str, Any], versions: Mapping[str, str]
) -> None:
    """Write one result with what it belongs to."""
    made = {"format": manifests.FORMAT, "kind": kind, "model": dict(model), **asdict(result)}
    disk.write_json(file, {**made, "versions": versions})


def load(kind: type[Result], file: Path, versions: Mapping[str, str]) -> Result | None:
    """A result that was saved, or None where there is none of the same versions."""
    if not file.exists():
        return None
    record = disk.read_json(file)
    fields = inspect.signature(kind).parameters
    needed = [name for name, field in fields.items() if field.default is field.empty]
    if record.get("versions") != versions or not all(name in record for name in needed):
        return None
    return kind(**{name: record[name] for name in fields if name in record})
