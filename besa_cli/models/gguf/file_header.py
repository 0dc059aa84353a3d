"""The header of a GGUF file, read and validated without reading any weight.

Own code, because the `gguf` package takes seconds for the vocabulary of a tokenizer and does not validate the file.
"""

import mmap
import struct
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn

from besa_cli.errors import BesaError
from besa_cli.system.disk import require_regular

Scalar = bool | int | float | str
Value = Scalar | Sequence[str] | Sequence[int] | Sequence[float]

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_DIMENSIONS = 4  # most dimensions of a tensor
_USE_SAFETENSORS = "use the same model in the safetensors format"
_FETCH_AGAIN = "fetch the file again"


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Location and storage of a tensor in the file.

    Parameters
    ----------
    kind : str
        The storage type, e.g. ``"Q4_1"``.
    shape : tuple of int
        Rows first, as in PyTorch; a stack of experts has the experts before them.
    place, size : int
        Offset of the first byte in the file, and size in bytes.
    """

    kind: str
    shape: tuple[int, ...]
    place: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """Metadata and tensors of a GGUF file.

    Parameters
    ----------
    path : Path
        The file.
    architecture : str
        llama.cpp's name for the architecture, e.g. ``"llama"``.
    fields : mapping
        All metadata by name.
    tensors : mapping
        All tensors by name.
    """

    path: Path
    architecture: str
    fields: Mapping[str, Value]
    tensors: Mapping[str, Tensor]


class _DamagedError(Exception):
    """Damage in the file; the caller adds the file's name."""


def read(path: Path) -> Header:
    """Read the header and check that all tensors lie within the file and do not overlap.

    Raises
    ------
    BesaError
        The file is not an ordinary file, not GGUF, of an unknown version, cut off, or contradicts itself.
    """
    require_regular(path)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BesaError(
                f"{path} is not a GGUF file", "name a checkpoint directory, a GGUF file or a hub name (org/name)"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read(_Cursor(data, 4), path)
            except struct.error as error:
                raise BesaError(f"{path} is cut off or damaged ({len(data)} bytes)", _FETCH_AGAIN) from error
            except _DamagedError as error:
                raise BesaError(f"{path} is cut off or damaged: {error}", _FETCH_AGAIN) from error


class _Cursor:
    """Reading position in the mapped file."""

    def __init__(self, data: mmap.mmap, place: int) -> None:
        self.data = data
        self.place = place

    def bytes(self, length: int) -> bytes:
        if length > len(self.data) - self.place:
            raise struct.error("the file ends within a value")
        self.place += length
        return self.data[self.place - length : self.place]

    def whole(self, code: str) -> int:
        (value,) = struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))
        return int(value)

    def string(self) -> str:
        return self.bytes(self.whole("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Value:
        """Read one metadata value."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.values(self.whole("I"), self.whole("Q"))
        code = _code(kind)
        (value,) = struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))
        scalar: Scalar = value
        return scalar

    def values(self, kind: int, count: int) -> Value:
        """Read an array; arrays of arrays are refused, since no key has one."""
        if kind == _ARRAY:
            raise _DamagedError("it holds an array of arrays, which no key has")
        if kind == _STRING:
            if count > (len(self.data) - self.place) // 8:  # every string has a length of 8 bytes before it
                raise struct.error("the file ends within an array")
            return [self.string() for _ in range(count)]
        code = _code(kind)
        numbers = array("B" if code == "?" else code)
        numbers.frombytes(self.bytes(count * numbers.itemsize))
        return numbers


def _code(kind: int) -> str:
    if kind not in _NUMBERS:
        raise _DamagedError(f"it holds a value of the unknown type {kind}")
    return _NUMBERS[kind]


def _read(cursor: _Cursor, path: Path) -> Header:
    version = cursor.whole("I")
    if version not in _VERSIONS:
        raise BesaError(f"{path} is GGUF version {version}", "convert the model with a newer llama.cpp (version 3)")
    tensors, count = cursor.whole("Q"), cursor.whole("Q")
    fields: dict[str, Value] = {}
    for _ in range(count):
        name = cursor.string()
        if name in fields:
            raise _DamagedError(f"{_short(name)} is given twice")
        fields[name] = cursor.value(cursor.whole("I"))
    architecture = fields.get("general.architecture", "")
    if not isinstance(architecture, str):
        raise _DamagedError(f"general.architecture is {architecture!r:.80}, not a name")
    return Header(
        path=path, architecture=architecture, fields=fields, tensors=_tensors(cursor, tensors, _alignment(fields), path)
    )


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:79]}…"


def _alignment(fields: Mapping[str, Value]) -> int:
    alignment = fields.get("general.alignment", 32)
    if (
        not isinstance(alignment, int)
        or isinstance(alignment, bool)
        or alignment <= 0
        or alignment % 8
        or alignment > 1 << 20
    ):
        raise _DamagedError(f"general.alignment is {alignment!r:.80}, not a multiple of 8")
    return alignment


def _tensors(cursor: _Cursor, count: int, alignment: int, path: Path) -> dict[str, Tensor]:
    """Read all tensors; each must be complete, within the file, and right after the previous one."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    known = set(GGMLQuantizationType)
    listed: list[tuple[str, Tensor]] = []
    for _ in range(count):
        name = cursor.string()
        dimensions = cursor.whole("I")
        if not 1 <= dimensions <= _DIMENSIONS:
            raise _DamagedError(f"{_short(name)} has {dimensions} dimensions")
        shape = tuple(reversed([cursor.whole("Q") for _ in range(dimensions)]))
        code, offset = cursor.whole("I"), cursor.whole("Q")
        if code not in known:
            raise BesaError(f"{path} stores {_short(name)} in the unknown type {code}", "install a newer gguf package")
        kind = GGMLQuantizationType(code)
        block, size = GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[-1] % block or offset % alignment:
            raise _DamagedError(
                f"{_short(name)} of shape {shape} at {offset} cannot be {kind.name} in blocks of {block}"
            )
        listed.append((name, Tensor(kind=kind.name, shape=shape, place=offset, size=prod(shape) // block * size)))
    if not listed:
        raise _DamagedError("it holds no tensors")
    start = -(-cursor.place // alignment) * alignment
    tensors = {name: _shifted(tensor, start) for name, tensor in listed}
    if len(tensors) < len(listed):
        ((twice, _),) = Counter(name for name, _ in listed).most_common(1)
        raise _DamagedError(f"{_short(twice)} is given twice")
    _require_packed(tensors, start, alignment, len(cursor.data))
    return tensors


def _shifted(tensor: Tensor, start: int) -> Tensor:
    return Tensor(kind=tensor.kind, shape=tensor.shape, place=tensor.place + start, size=tensor.size)


def _require_packed(tensors: Mapping[str, Tensor], end: int, alignment: int, length: int) -> None:
    """Refuse tensors that overlap or leave gaps, as llama.cpp does: they were written for another type or shape."""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].place):
        if tensor.place < end:
            raise _DamagedError(f"{_short(name)} overlaps another tensor")
        if tensor.place - end >= alignment:
            raise _DamagedError(f"{tensor.place - end} bytes before {_short(name)} belong to no tensor")
        end = tensor.place + tensor.size
        if end > length:
            raise _DamagedError(f"{_short(name)} ends at byte {end} of {length}")


def refuse(header: Header, key: str, reason: str) -> NoReturn:
    """Raise the error for a file, naming one of its keys or tensors.

    Raises
    ------
    BesaError
        Always.
    """
    raise BesaError(f"{header.path}: {_short(key)} {reason}", _USE_SAFETENSORS)
