"""Safetensors files whose header or tensors are wrong, and the index of several."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults.hostile.harms import cut
from safetensors.torch import load_file, save_file
from torch import Tensor

Header = dict[str, Any]

_INDEX = "model.safetensors.index.json"
_DEEP = b'{"a":' * 5000 + b"1" + b"}" * 5000


def index(model: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    table: dict[str, str] = json.loads((model / _INDEX).read_text())["weight_map"]
    return table


def write_index(model: Path, table: dict[str, str]) -> None:
    document = json.loads((model / _INDEX).read_text())
    (model / _INDEX).write_text(json.dumps(document | {"weight_map": table}))


def shard(model: Path) -> Path:
    """The file that holds the first block's MLP."""
    return model / index(model)["model.layers.0.mlp.up_proj.weight"]


def _parts(content: bytes) -> tuple[Header, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(text: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def _header(change: Callable[[Header], object]) -> Callable[[bytes], bytes]:
    """A change of the header's table."""

    def edit(content: bytes) -> bytes:
        header, data = _parts(content)
        change(header)
        return _joined(json.dumps(header).encode(), data)

    return edit


def _entry(**changes: object) -> Callable[[bytes], bytes]:
    """A change of one tensor's entry."""
    return _header(lambda header: _last(header).update(changes))


def _last(header: Header) -> dict[str, Any]:
    entry: dict[str, Any] = header[[name for name in header if name != "__metadata__"][-1]]
    return entry


def _twice(content: bytes) -> bytes:
    header, data = _parts(content)
    name = [name for name in header if name != "__metadata__"][-1]
    again = json.dumps({name: header[name]}).encode()
    return _joined(json.dumps(header).encode()[:-1] + b", " + again[1:], data)


def _overlapping(header: Header) -> None:
    names = [name for name in header if name != "__metadata__"]
    header[names[-1]]["data_offsets"] = header[names[0]]["data_offsets"]


def _length(number: int) -> Callable[[bytes], bytes]:
    return lambda content: struct.pack("<Q", number) + content[8:]


def _metadata(value: object) -> Callable[[bytes], bytes]:
    return _header(lambda header: header.update(__metadata__=value))


_DTYPES: tuple[object, ...] = ("F128", "", None, 7, [], "BOOL", "F32", "U8", "F8_E4M3", "\x1b[2J", "C64", "I64")
_SHAPES: tuple[object, ...] = (
    None, "54", [], [54], [-54, -32], [54.0, 32.0], [2**63, 2], [2**32, 2**32], {}, [[54, 32]], [0, 0],
)  # fmt: skip
_OFFSETS: tuple[object, ...] = (
    None, [], [0], [0, 0], [64, 0], [-64, 0], [0, 2**63], [2**63, 2**64], "0:64", [0.5, 64.5], [0, 1, 2],
)  # fmt: skip
_METADATA: tuple[object, ...] = (
    None, 7, [], {}, {"format": 7}, {"format": "tf"}, {"format": "\x1b[2J"}, {"x": "y" * 10**6},
)  # fmt: skip

HEADERS: dict[str, Callable[[bytes], bytes]] = {
    **{f"its length {number}": _length(number) for number in (0, 1, 7, 10**6, 2**31, 2**63, 2**64 - 1)},
    **{f"cut after {number} bytes": cut(number) for number in (1, 8, 9, 100, 9000)},
    "not JSON": lambda content: _joined(b"{" * 64, _parts(content)[1]),
    "an array": lambda content: _joined(b"[]", _parts(content)[1]),
    "null": lambda content: _joined(b"null", _parts(content)[1]),
    "deep": lambda content: _joined(_DEEP, _parts(content)[1]),
    "not UTF-8": lambda content: _joined(b'{"\xff\xfe": 1}', _parts(content)[1]),
    "a tensor twice": _twice,
    "two tensors on the same bytes": _header(_overlapping),
    "bytes at the end": lambda content: content + b"\0" * 64,
    "a last byte less": lambda content: content[:-1],
    "spaces": lambda content: _joined(json.dumps(_parts(content)[0]).encode() + b" " * 4096, _parts(content)[1]),
    **{f"dtype {value}": _entry(dtype=value) for value in _DTYPES},
    **{f"shape {str(value)[:30]}": _entry(shape=value) for value in _SHAPES},
    **{f"offsets {value}": _entry(data_offsets=value) for value in _OFFSETS},
    "an entry that is null": _header(lambda header: header.update({list(header)[-1]: None})),
    "an entry without dtype": _header(lambda header: _last(header).pop("dtype")),
    "an entry with another field": _entry(more="x"),
    **{f"metadata {str(value)[:20]}": _metadata(value) for value in _METADATA},
    "a control character in a name": _header(
        lambda header: header.update({"\x1b[2J\x07": header.pop(list(header)[-1])})
    ),
    "a name of a million letters": _header(lambda header: header.update({"a" * 10**6: header.pop(list(header)[-1])})),
}
HARMLESS = {name for name in HEADERS if name.startswith("metadata")} | {
    "spaces",
    "an entry with another field",
    "bytes at the end",
}


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """A change of a shard's tensors, in whole files."""

    def edit(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})

    return edit


_UP = "model.layers.0.mlp.up_proj.weight"
_NORM = "model.layers.0.input_layernorm.weight"


def _to(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return _tensors(lambda tensors: tensors.update({name: change(tensors[name])}))


def _more(path: Path, **tensors: Tensor) -> None:
    """Add tensors to a shard and to the index."""
    _tensors(lambda found: found.update(tensors))(path)
    write_index(path.parent, {**index(path.parent), **dict.fromkeys(tensors, path.name)})


def _in_two(path: Path) -> None:
    other = path.parent / index(path.parent)["lm_head.weight"]
    _tensors(lambda found: found.update({_UP: load_file(path)[_UP] * 2}))(other)


def _filled(value: float, name: str = _UP) -> Callable[[Path], None]:
    def fill(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[5] = value
        return changed

    return _to(name, fill)


def _fp8(path: Path) -> None:
    _to(_UP, lambda tensor: tensor.to(torch.float8_e4m3fn))(path)
    _more(path, **{f"{_UP}_scale": torch.tensor([0.5])})


def _side_file(path: Path) -> None:
    _fp8(path)
    (path.parent / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')


TENSORS: dict[str, Callable[[Path], None]] = {
    **{f"a weight {value}": _filled(value) for value in (float("nan"), float("inf"), float("-inf"), 3e38)},
    **{f"a norm's weight {value}": _filled(value, _NORM) for value in (float("nan"), float("inf"))},
    **{
        f"a weight in {dtype}": _to(_UP, lambda tensor, dtype=dtype: tensor.to(dtype))  # type: ignore[misc]
        for dtype in (torch.int8, torch.int64, torch.uint8, torch.bool, torch.float64, torch.float16, torch.complex64)
    },
    "a weight in 8-bit floats": _fp8,
    "8-bit floats that a side file tells": _side_file,
    "a row less": _to(_UP, lambda tensor: tensor[:-1]),
    "one row": _to(_UP, lambda tensor: tensor[:1]),
    "turned": _to(_UP, lambda tensor: tensor.T),
    "flat": _to(_UP, lambda tensor: tensor.reshape(-1)),
    "an axis more": _to(_UP, lambda tensor: tensor[None]),
    "a number": _to(_UP, lambda tensor: tensor[0, 0]),
    "nothing": _to(_UP, lambda tensor: tensor[:0]),
    "a weight of zeros": _to(_UP, torch.zeros_like),
    "a weight missing": _tensors(lambda tensors: tensors.pop(_UP)),
    "a tensor in two shards": _in_two,
    "a tensor that the model does not use": lambda path: _more(path, extra=torch.ones(3)),
    "a third block": lambda path: _more(path, **{_UP.replace(".0.", ".2."): torch.ones(54, 32)}),
    "a bias that the model lacks": lambda path: _more(path, **{_UP.replace("weight", "bias"): torch.ones(54)}),
    "a name with control characters": lambda path: _more(path, **{"\x1b[2J\x07": torch.ones(3)}),
    "packed weights of another program": lambda path: _more(path, **{_UP.replace("weight", "qweight"): torch.ones(3)}),
}
UNUSED = {"a tensor that the model does not use", "a weight of zeros", "a weight in torch.float16"}
