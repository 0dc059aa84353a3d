"""Sparse exports whose digests were made to fit: headers, parts that do not belong together, compressed weights."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import torch
from faults.hostile import safe
from faults.hostile.exports import IMPORTED, INDEX, PLACE, SHARD, as_stage, told_again
from faults.hostile.frame import Case, Harm, accepted, either, refused, several
from safetensors.torch import load_file, save_file
from torch import Tensor

Parts = dict[str, Tensor]

_LARGE = 2 << 30  # bytes that a bomb expands to
_PIECE = 16 << 20


def cases(base: Path) -> Iterator[Case]:
    """All of them."""
    headers = {name: _forged(_content(change)) for name, change in safe.HEADERS.items()}
    yield from several("an export's header, forged", headers, IMPORTED, expect=either(as_stage, "sparse"))
    parts = {name: _forged(_parts(change)) for name, change in _PARTS.items()}
    yield from several("an export's parts, forged", parts, IMPORTED, expect=refused("sparse"))
    yield from several("a compressed export", {"as it is": _packed(_zstd)}, IMPORTED, expect=accepted(as_stage))
    bad = {name: _packed(content) for name, content in _BAD.items()}
    yield from several("a compressed export", bad, IMPORTED, expect=refused("sparse"))


def _forged(change: Callable[[Path], object]) -> Harm:
    """A file of weights that is changed, and its digest with it."""

    def harm(place: Path) -> None:
        change(place / PLACE / SHARD)
        told_again(place, SHARD)

    return harm


def _content(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def _parts(change: Callable[[Parts], object]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        parts = load_file(path)
        change(parts)
        save_file({key: part.contiguous() for key, part in parts.items()}, path, metadata={"format": "pt"})

    return edit


_UP = "model.layers.0.mlp.up_proj"


def _without(part: str) -> Callable[[Parts], object]:
    return lambda parts: parts.pop(f"{_UP}.weight_{part}")


def _to(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Parts], object]:
    return lambda parts: parts.update({f"{_UP}.weight_{part}": change(parts[f"{_UP}.weight_{part}"])})


def _sizes(*sizes: float, dtype: torch.dtype = torch.int64) -> Callable[[Parts], object]:
    return _to("shape", lambda old: torch.tensor(sizes, dtype=dtype))


_PARTS: dict[str, Callable[[Parts], object]] = {
    **{f"without its {part}": _without(part) for part in ("mask", "values", "shape")},
    "a value less": _to("values", lambda old: old[:-1]),
    "a value more": _to("values", lambda old: torch.cat([old, old[:1]])),
    "no values": _to("values", lambda old: old[:0]),
    "values in rows": _to("values", lambda old: old[None]),
    "values of whole numbers": _to("values", lambda old: old.to(torch.int32)),
    "values of more bits": _to("values", lambda old: old.double()),
    "values that are NaN": _to("values", lambda old: old * float("nan")),
    "other values": _to("values", lambda old: old * 2),
    "a mask of ones": _to("mask", lambda old: torch.full_like(old, 255)),
    "a mask of zeros": _to("mask", torch.zeros_like),
    "a mask turned round": _to("mask", lambda old: ~old),
    "a mask of a row less": _to("mask", lambda old: old[:-1]),
    "a mask in one row": _to("mask", lambda old: old.reshape(-1)),
    "a mask of booleans": _to("mask", lambda old: old.bool()),
    "a mask of floats": _to("mask", lambda old: old.float()),
    "a bit in the padding": _to("mask", lambda old: old | 128),
    "a shape of one number": _sizes(54),
    "a shape of three": _sizes(54, 32, 1),
    "an empty shape": _sizes(),
    "a negative shape": _sizes(-54, -32),
    "a huge shape": _sizes(2**62, 2**62),
    "a shape of 10^12 rows": _sizes(10**12, 32),
    "a shape of floats": _sizes(54.0, 32.0, dtype=torch.float32),
    "a shape turned": _sizes(32, 54),
    "a shape of zero": _sizes(0, 32),
    "codes of another program": lambda parts: parts.update({f"{_UP}.weight_codes": torch.ones(3, dtype=torch.uint8)}),
    "codes with a grid of zero": lambda parts: parts.update(
        {
            f"{_UP}.weight_codes": torch.ones(3, dtype=torch.uint8),
            f"{_UP}.weight_grid": torch.tensor([0, 0]),
            f"{_UP}.weight_scale": torch.ones(54, 1),
        }
    ),
    "the weight beside its parts": lambda parts: parts.update({f"{_UP}.weight": torch.ones(54, 32)}),
    "parts of a weight more": lambda parts: parts.update({"x.weight_values": torch.ones(3)}),
    "a tensor more": lambda parts: parts.update({"extra": torch.ones(3)}),
    "a name with control characters": lambda parts: parts.update({"\x1b[2J": torch.ones(3)}),
    "nothing": lambda parts: parts.clear(),
}


def _packed(content: Callable[[bytes], bytes]) -> Harm:
    """An export whose weights are compressed, one file of it otherwise than it was made; its digest fits."""

    def harm(place: Path) -> None:
        path = place / PLACE / SHARD
        packed = path.with_name(f"{SHARD}.zst")
        packed.write_bytes(content(path.read_bytes()))
        path.unlink()
        for record in (INDEX, "export.json"):
            text = (place / PLACE / record).read_text().replace(SHARD, packed.name)
            (place / PLACE / record).write_text(text)
        told_again(place, packed.name)

    return harm


def _zstd(content: bytes, repeated: int = 1) -> bytes:
    """A stream, written a piece at a time."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        for _ in range(repeated):
            stream.write(content)
    return bytes(sink.getvalue())


_BAD: dict[str, Callable[[bytes], bytes]] = {
    "zeros of 2 GB behind the weights": lambda content: _zstd(content) + _zstd(b"\0" * _PIECE, _LARGE // _PIECE),
    "zeros of 2 GB": lambda content: _zstd(b"\0" * _PIECE, _LARGE // _PIECE),
    "cut short": lambda content: _zstd(content)[:-20],
    "not packed": lambda content: content,
    "garbage": lambda content: b"\x28\xb5\x2f\xfd" + b"\xa5" * 999,
    "empty": lambda content: b"",
    "packed twice": lambda content: _zstd(_zstd(content)),
    "a window of 2 GB": lambda content: b"\x28\xb5\x2f\xfd\x00\xa8" + content[:99],
}
