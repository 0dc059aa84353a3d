"""The header of a GGUF file: what it holds and whether it is whole, without reading a weight.

Written by hand because the `gguf` package takes seconds for the word list of a tokenizer.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from besa_cli.errors import BesaError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF file says about itself.

    Parameters
    ----------
    architecture : str
        llama.cpp's name for the architecture, e.g. ``"llama"``.
    fields : frozenset of str
        The names of all metadata fields.
    types : dict
        The storage type of each tensor by name, e.g. ``"Q4_1"``.
    """

    architecture: str
    fields: frozenset[str]
    types: dict[str, str]


def read(path: Path) -> Header:
    """Read the header and check that the file is as long as its tensors need.

    Raises
    ------
    BesaError
        The file is not GGUF, of a version unknown to us, or cut off.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BesaError(
                f"{path} is not a GGUF file", "name a checkpoint directory, a GGUF file or a hub name (org/name)"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read(_Cursor(data, 4), path)
            except (struct.error, UnicodeDecodeError) as error:
                raise _cut(path) from error


def _cut(path: Path) -> BesaError:
    return BesaError(f"{path} is cut off or damaged ({path.stat().st_size} bytes)", "fetch the file again")


class _Cursor:
    """A place in the mapped file that moves on with every read."""

    def __init__(self, data: mmap.mmap, place: int) -> None:
        self.data = data
        self.place = place

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.place)
        self.place += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.number("Q")
        text = self.data[self.place : self.place + length]
        if len(text) != length:
            raise struct.error("the file ends within a string")
        self.place += length
        return text.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """One metadata value; arrays are passed over and give None."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_code(kind))
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            self.place += count * struct.calcsize(f"<{_NUMBERS[inner]}")
        else:
            for _ in range(count):
                self.value(inner)
        return None


def _code(kind: int) -> str:
    if kind not in _NUMBERS:
        raise struct.error(f"unknown kind of value {kind}")
    return _NUMBERS[kind]


def _read(cursor: _Cursor, path: Path) -> Header:
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise BesaError(f"{path} is GGUF version {version}", "convert the model with a newer llama.cpp (version 3)")
    tensors, count = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.string()
        fields[name] = cursor.value(cursor.number("I"))
    types, length = _tensors(cursor, tensors, path)
    alignment = int(fields.get("general.alignment") or 32)
    if alignment <= 0 or not types:
        raise _cut(path)
    start = -(-cursor.place // alignment) * alignment
    if path.stat().st_size < start + length:
        raise _cut(path)
    return Header(architecture=str(fields.get("general.architecture", "")), fields=frozenset(fields), types=types)


def _tensors(cursor: _Cursor, count: int, path: Path) -> tuple[dict[str, str], int]:
    """The type of each tensor, and the bytes that all of them take."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    types: dict[str, str] = {}
    length = 0
    for _ in range(count):
        name = cursor.string()
        shape = [cursor.number("Q") for _ in range(cursor.number("I"))]
        code, offset = cursor.number("I"), cursor.number("Q")
        if code not in set(GGMLQuantizationType):
            raise BesaError(f"{path} stores {name} in type {code}, which is unknown", "install a newer gguf package")
        kind = GGMLQuantizationType(code)
        block, size = GGML_QUANT_SIZES[kind]
        types[name] = kind.name
        length = max(length, offset + prod(shape) // block * size)
    return types, length
