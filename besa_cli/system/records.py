"""Validating reader of the JSON files that besa writes: manifests, reports, results, export records.

A damaged or forged file gives a one-line error with the file, the field and the fault. Types alone describe a file (a
dataclass, or the `TypedDict` of typing_extensions); pydantic validates in strict mode, so that no string passes for a
number.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import is_typeddict

from besa_cli.errors import BesaError
from besa_cli.system import disk

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

Record = TypeVar("Record")


def strict(kind: type[Record]) -> type[Record]:
    """Decorate a record type to be read strictly: refuse NaN and infinity, and keep unknown fields of a `TypedDict`."""
    extra = "allow" if is_typeddict(kind) else "ignore"
    kind.__pydantic_config__ = {"strict": True, "extra": extra, "allow_inf_nan": False}  # type: ignore[attr-defined]
    return kind


def read(kind: type[Record], path: Path, hint: str = "restore the file, or make its directory again") -> Record:
    """Read a JSON file that holds one record.

    Parameters
    ----------
    kind : type
        A `TypedDict`, which keeps unknown fields, or a dataclass, which drops them.
    path : Path
    hint : str
        The remedy if the file is not such a record.

    Raises
    ------
    BesaError
        The file cannot be read, or a field is missing or has another type; the field is named.
    """
    return parse(kind, disk.read_text(path), path, hint)


def parse(kind: type[Record], text: str, place: Path | str, hint: str = "") -> Record:
    """Validate a JSON text as a record; `place` names its origin in errors.

    Parameters
    ----------
    kind : type
        A `TypedDict` or a dataclass.
    text : str
    place : Path or str
    hint : str
        The remedy if the text is not such a record.

    Raises
    ------
    BesaError
        A field is missing or has another type; the field is named.
    """
    from pydantic import ValidationError

    adapter: TypeAdapter[Record] = _adapter(kind)  # type: ignore[arg-type]  # a class is hashable
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        raise BesaError(f"{place} is not what besa wrote: {_reason(error)}", hint) from error


@functools.cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _reason(error: "ValidationError") -> str:
    """Describe the first invalid field, its fault and its value."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return str(first["msg"])
    field = ".".join(str(step) for step in first["loc"]) or "it"
    value = repr(first["input"])
    if first["type"] == "missing":
        return f"{field} is missing"
    return (
        f"{field}: {first['msg'][:1].lower()}{first['msg'][1:]}, not {value if len(value) <= 80 else value[:79] + '…'}"
    )
