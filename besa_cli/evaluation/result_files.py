"""One file a result: what was measured, with the versions that it depends on."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import TypedDict

from besa_cli.checkpoint import manifests
from besa_cli.system import disk, records

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Result = TypeVar("Result", bound="DataclassInstance")


def save(
    result: "DataclassInstance", file: Path, kind: str, model: Mapping[str, Any], versions: Mapping[str, str]
) -> None:
    """Write one result with what it belongs to, while nobody else does; what killed processes left of it goes."""
    made = {"format": manifests.FORMAT, "kind": kind, "model": dict(model), **asdict(result)}
    disk.sweep(file)
    disk.write_json(file, {**made, "versions": versions})


def load(kind: type[Result], file: Path, versions: Mapping[str, str]) -> Result | None:
    """A result that was saved, or None where there is none of the same versions.

    Raises
    ------
    BesaError
        The file is damaged (the field is named).
    """
    if not file.exists():
        return None
    text, remedy = disk.read_text(file), f"delete {file}: it is measured again then"
    if records.parse(_Made, text, file, remedy)["versions"] != versions:
        return None
    return records.parse(kind, text, file, remedy)


@records.strict
class _Made(TypedDict):
    """What every result says of how it was made."""

    format: int
    versions: dict[str, str]
