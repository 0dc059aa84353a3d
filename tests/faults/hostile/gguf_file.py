"""GGUF files byte by byte, so that anything in them can be wrong; written from the format's description."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT, ARRAY, UINT32, INT32, FLOAT32, BOOL, UINT64 = 8, 9, 4, 5, 6, 7, 10
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

Value = tuple[int, Any]  # the number of a type, and a number, a text, or for an array (type, items)


@dataclass(kw_only=True)
class Tensor:
    """One entry of the table of tensors: dimensions (columns first), the number of a type, where its data begins."""

    dims: list[int]
    kind: int
    offset: int


@dataclass(kw_only=True)
class Gguf:
    """All of a file: metadata by name, tensors by name, and their data with the padding before it."""

    values: dict[str, Value]
    tensors: dict[str, Tensor]
    data: bytes
    version: int = 3
    alignment: int = 32

    def bytes(self, *, values: int | None = None, tensors: int | None = None) -> bytes:
        """The file; with other counts than it has if they are given."""
        counts = (len(self.tensors) if tensors is None else tensors, len(self.values) if values is None else values)
        parts = [b"GGUF", struct.pack("<IQQ", self.version, *counts)]
        for name, value in self.values.items():
            parts += [_text(name), struct.pack("<I", value[0]), _packed(*value)]
        for name, tensor in self.tensors.items():
            sizes = struct.pack(f"<I{len(tensor.dims)}Q", len(tensor.dims), *tensor.dims)
            parts += [_text(name), sizes, struct.pack("<IQ", tensor.kind, tensor.offset)]
        head = b"".join(parts)
        return head + b"\0" * (-len(head) % self.alignment) + self.data


def _text(text: str) -> bytes:
    content = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(content)) + content


def _packed(kind: int, value: Any) -> bytes:
    if isinstance(value, bytes):  # as it is
        return value
    if kind == TEXT:
        return _text(value)
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_packed(inner, item) for item in items)
    return struct.pack(f"<{_CODES[kind]}", value)


def read(path: Path) -> Gguf:
    """A file that is right."""
    content = path.read_bytes()
    reader = _Reader(content)
    version, count, fields = reader.numbers("4xIQQ")
    values = dict(reader.field() for _ in range(fields))
    tensors = dict(reader.tensor() for _ in range(count))
    return Gguf(values=values, tensors=tensors, data=content[-(-reader.place // 32) * 32 :], version=version)


class _Reader:
    def __init__(self, content: bytes) -> None:
        self._content, self.place = content, 0

    def numbers(self, codes: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{codes}", self._content, self.place)
        self.place += struct.calcsize(f"<{codes}")
        return found

    def text(self) -> str:
        (length,) = self.numbers("Q")
        self.place += length
        return self._content[self.place - length : self.place].decode()

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            inner, count = self.numbers("IQ")
            return inner, [self.value(inner) for _ in range(count)]
        return self.numbers(_CODES[kind])[0]

    def field(self) -> tuple[str, Value]:
        name = self.text()
        (kind,) = self.numbers("I")
        return name, (kind, self.value(kind))

    def tensor(self) -> tuple[str, Tensor]:
        name = self.text()
        (axes,) = self.numbers("I")
        *dims, kind, offset = self.numbers(f"{axes}QIQ")
        return name, Tensor(dims=dims, kind=kind, offset=offset)


def wrong_values(value: Value) -> Iterator[tuple[str, Value | None]]:
    """What may stand in the place of a value, by words; None: it is missing."""
    yield "missing", None
    yield "an empty text", (TEXT, "")
    yield "control characters", (TEXT, "\x1b[2J\x07")
    yield "true", (BOOL, True)
    yield "zero", (UINT32, 0)
    yield "negative", (INT32, -7)
    yield "huge", (UINT64, 2**64 - 1)
    yield "NaN", (FLOAT32, float("nan"))
    yield "an empty array", (ARRAY, (UINT32, []))
    yield "an array of 10^18", (ARRAY, struct.pack("<IQ", UINT32, 10**18))
    yield "arrays in arrays", (ARRAY, struct.pack("<IQ", ARRAY, 1) * 3000 + struct.pack("<IQ", UINT32, 0))
    yield "a text without end", (TEXT, struct.pack("<Q", 2**63) + b"x")
    yield "of an unknown type", (99, b"\0" * 8)
    if value[0] == ARRAY:
        inner, items = value[1]
        yield "an item less", (ARRAY, (inner, items[:-1]))
        yield "an item twice", (ARRAY, (inner, [*items, items[-1]]))
        yield "of other items", (ARRAY, (FLOAT32, [0.5] * len(items)))
