"""What a safetensors file says of itself: its header, and a checkpoint's index, read without believing them."""

import math
import struct
from pathlib import Path
from typing import Any, TypedDict

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
    """One tensor in a header."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def entries(path: Path) -> dict[str, TensorEntry]:
    """What the header of one file says of each tensor, by name, in the order of the data.

    The tensors lie one after the other, without holes, each as long as its shape and dtype make it, and together they
    fill the file.

    Raises
    ------
    BesaError
        The file is missing, not an ordinary file, cut short or not safetensors; a tensor is named twice, or its entry
        and the data do not belong together.
    """
    text, data = _header(path)
    found = disk.parse_json(text, f"the header of {path}", unique=True)
    found.pop("__metadata__", None)
    for name, entry in found.items():
        wrong = _wrong(entry)
        if wrong:
            raise BesaError(f"{path} is not a safetensors file: the tensor {_short(name)} has {wrong}", _REMEDY)
    ordered: dict[str, TensorEntry] = dict(sorted(found.items(), key=lambda item: item[1]["data_offsets"]))
    end = 0
    for name, entry in ordered.items():
        start, stop = entry["data_offsets"]
        if start != end:
            what = "overlaps the one before it" if start < end else f"leaves {start - end} bytes before it unused"
            raise BesaError(f"{path} is damaged: the tensor {_short(name)} {what}", _REMEDY)
        end = stop
    if end != data:
        what = "is cut short" if data < end else "is damaged"
        raise BesaError(f"{path} {what}: {data} bytes of tensors where its header promises {end}", _REMEDY)
    return ordered


def _header(path: Path) -> tuple[bytes, int]:
    """The text of a header, and how many bytes follow it."""
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


def _wrong(entry: Any) -> str:
    """What is wrong with a tensor's entry, seen alone; nothing where nothing is."""
    if not isinstance(entry, dict):
        return "no entry"
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        return f"the dtype {_short(dtype)}"
    if not isinstance(shape, list) or not _are_counts(shape) or len(shape) > _DIMENSIONS:
        return f"the shape {_short(shape)}"
    if not isinstance(offsets, list) or not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"the offsets {_short(offsets)}"
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        return f"{offsets[1] - offsets[0]} bytes, where {dtype} of the shape {_short(shape)} takes {(bits + 7) // 8}"
    return ""


def _are_counts(values: list[Any]) -> bool:
    """Whether these are whole numbers from 0 on that fit into 64 bits."""
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def weight_map(index: Path) -> dict[str, str]:
    """Which file of its directory holds which tensor, as an index says.

    Raises
    ------
    BesaError
        The index cannot be read, has no such map, names a tensor twice, or a file that is not one of its directory.
    """
    told = disk.read_json(index, unique=True)
    listed, about = told.get("weight_map"), told.get("metadata")
    if about is not None and not isinstance(about, dict):
        raise BesaError(f"{index} has metadata that are not an object, but {_short(about)}", _AGAIN)
    if not isinstance(listed, dict) or not listed:
        raise BesaError(f"{index} has no weight_map", _AGAIN)
    for name, file in listed.items():
        if not isinstance(file, str) or not file or "\0" in file or len(file.encode(errors="replace")) > 255:
            raise BesaError(f"{index} names no file for {_short(name)}, but {_short(file)}", _AGAIN)
        if Path(file).name != file or file == "..":
            raise BesaError(f"{index} names the file {_short(file)} outside its directory", _AGAIN)
    return listed


_AGAIN = "copy or fetch the directory again"
