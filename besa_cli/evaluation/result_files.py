"""Result files: one JSON file per result, with the versions of the programs that it depends on."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from typing_extensions import TypedDict

from besa_cli.checkpoint import manifests
from besa_cli.system import disk, records
from besa_cli.system.disk import Json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Result = TypeVar("Result", bound="DataclassInstance")


def save(result: "DataclassInstance", file: Path, kind: str, model: Json, versions: Mapping[str, str]) -> None:
    """Write a result with its model; the caller holds the lock. Temporary files of killed processes are deleted."""
    record = {"format": manifests.FORMAT, "kind": kind, "model": dict(model), **asdict(result)}
    disk.sweep(file)
    disk.write_json(file, {**record, "versions": versions})


def load(kind: type[Result], file: Path, versions: Mapping[str, str]) -> Result | None:
    """Load a result, or return None if there is no file or it was made by other versions.

    Raises
    ------
    BesaError
        The file is damaged; the message names the field.
    """
    if not file.exists():
        return None
    text, remedy = disk.read_text(file), f"delete {file}; it will be measured again"
    if records.parse(_Header, text, file, remedy)["versions"] != versions:
        return None
    return records.parse(kind, text, file, remedy)


@records.strict
class _Header(TypedDict):
    """Fields of every result that say how it was made."""

    format: int
    versions: dict[str, str]
