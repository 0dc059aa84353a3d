"""Safetensors headers and checkpoint indexes, validated before use."""

import math
import struct
from pathlib import Path
from typing import TypedDict

from besa_cli.errors import BesaError, reading
from besa_cli.system import disk

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_REMEDY = "fetch or copy the file again"
_LONGEST = 100_000_000  # bytes of a header; the safetensors library reads no longer one
_DIMENSIONS = 64  # that a tensor may have
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


class TensorEntry(TypedDict):
    """One tensor's entry in a header."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def entries(path: Path) -> dict[str, TensorEntry]:
    """Read the tensor entries in the header of one file, by name, in the order of the data.

    Check that the tensors are contiguous, as long as their shapes and dtypes require, and fill the file together.

    Raises
    ------
    BesaError
        The file is missing, not an ordinary file, cut short or not safetensors; or a tensor is named twice, or its
        entry does not fit the data.
    """
    text, data = _header(path)
    listed = disk.parse_json(text, f"the header of {path}", unique=True)
    listed.pop("__metadata__", None)
    for name, entry in listed.items():
        problem = _problem(entry)
        if problem:
            raise BesaError(f"{path} is not a safetensors file: the tensor {_short(name)} has {problem}", _REMEDY)
    ordered: dict[str, TensorEntry] = dict(sorted(listed.items(), key=lambda item: item[1]["data_offsets"]))
    end = 0
    for name, entry in ordered.items():
        start, stop = entry["data_offsets"]
        if start != end:
            fault = "overlaps the previous one" if start < end else f"leaves {start - end} unused bytes before it"
            raise BesaError(f"{path} is damaged: the tensor {_short(name)} {fault}", _REMEDY)
        end = stop
    if end != data:
        fault = "is cut short" if data < end else "is damaged"
        raise BesaError(f"{path} {fault}: {data} bytes of tensors, but its header declares {end}", _REMEDY)
    return ordered


def _header(path: Path) -> tuple[bytes, int]:
    """Read the text of a header, and the number of bytes after it."""
    if not path.exists():
        raise BesaError(f"{path} is missing", _REMEDY)
    disk.require_regular(path)
    with reading(path, _REMEDY), path.open("rb") as file:
        size = path.stat().st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _LONGEST):
            raise BesaError(f"{path} is cut short or not a safetensors file ({size} bytes)", _REMEDY)
        return file.read(length), size - 8 - length


def _problem(entry: object) -> str:
    """Describe the problem of a single tensor entry; empty if it is valid."""
    if not isinstance(entry, dict):
        return "an entry that is not an object"
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        return f"the dtype {_short(dtype)}"
    if not isinstance(shape, list) or not _are_counts(shape) or len(shape) > _DIMENSIONS:
        return f"the shape {_short(shape)}"
    if not isinstance(offsets, list) or not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"the offsets {_short(offsets)}"
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        return f"{offsets[1] - offsets[0]} bytes, but {dtype} of the shape {_short(shape)} takes {(bits + 7) // 8}"
    return ""


def _are_counts(values: list[object]) -> bool:
    """Check that all values are integers from 0 to 2^63 − 1."""
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def weight_map(index: Path) -> dict[str, str]:
    """Read the map from tensor name to file name in a checkpoint's index.

    Raises
    ------
    BesaError
        The index cannot be read, has no weight_map, names a tensor twice, or a file outside its directory.
    """
    fields = disk.read_json(index, unique=True)
    listed, metadata = fields.get("weight_map"), fields.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise BesaError(f"{index}: metadata is {_short(metadata)}, not an object", _FETCH_DIRECTORY)
    if not isinstance(listed, dict) or not listed:
        raise BesaError(f"{index} has no weight_map", _FETCH_DIRECTORY)
    for name, file in listed.items():
        if not isinstance(file, str) or not file or "\0" in file or len(file.encode(errors="replace")) > 255:
            raise BesaError(f"{index} names an invalid file for {_short(name)}: {_short(file)}", _FETCH_DIRECTORY)
        if Path(file).name != file or file == "..":
            raise BesaError(f"{index} names a file outside its directory: {_short(file)}", _FETCH_DIRECTORY)
    return listed


_FETCH_DIRECTORY = "copy or fetch the directory again"
