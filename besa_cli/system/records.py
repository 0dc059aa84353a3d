"""Validating reader of the files that besa itself wrote: manifests, reports, results, export records.

A damaged or hostile file becomes one line with the file, the field and what is wrong with it. Types alone describe
what a file holds (a dataclass, or the `TypedDict` of typing_extensions); pydantic compares strictly, so that no text is
taken for a number.
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
    """Class decorator: read a record type strictly, NaN and infinity refused; a `TypedDict` keeps unknown fields."""
    extra = "allow" if is_typeddict(kind) else "ignore"
    kind.__pydantic_config__ = {"strict": True, "extra": extra, "allow_inf_nan": False}  # type: ignore[attr-defined]
    return kind


def read(kind: type[Record], path: Path, hint: str = "restore the file, or make its directory anew") -> Record:
    """Read a JSON file that holds one record of a kind.

    Parameters
    ----------
    kind : type
        A `TypedDict` or a dataclass. Fields that it does not name are kept in a `TypedDict`, and left out of a
        dataclass.
    path : Path
    hint : str
        The remedy where the file is not such a record.

    Raises
    ------
    BesaError
        The file cannot be read, or a field is missing or has another type; the field is named.
    """
    return parse(kind, disk.read_text(path), path, hint)


def parse(kind: type[Record], text: str, place: Path | str, hint: str = "") -> Record:
    """Validate a JSON text as a record of a kind; `place` is where it was found. See `read`."""
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
    """The first field that is wrong, what is wrong with it, and what it holds."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return str(first["msg"])
    field = ".".join(str(step) for step in first["loc"]) or "it"
    found = repr(first["input"])
    if first["type"] == "missing":
        return f"{field} is missing"
    return (
        f"{field}: {first['msg'][:1].lower()}{first['msg'][1:]}, not {found if len(found) <= 80 else found[:79] + '…'}"
    )
