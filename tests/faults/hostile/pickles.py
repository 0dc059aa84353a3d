"""Checkpoints in pickles: tensors that are none, damage, and code."""

import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from faults.hostile.base import PPL, PRUNE
from faults.hostile.frame import RAN, Case, Harm, accepted, either, line, refused, several
from faults.hostile.harms import cut
from faults.hostile.models import as_stock
from safetensors.torch import load_file
from torch import Tensor


def cases(base: Path) -> Iterator[Case]:
    """All of them."""
    lines = (line(*PRUNE), line(*PPL, "--model", "m"))
    good = {name: _saved(lambda tensors, path: None, **how) for name, how in _FORMS.items()}
    yield from several("pickled weights", good, *lines, expect=accepted(as_stock))
    changed = {name: _saved(change) for name, change in _TENSORS.items()}
    yield from several("pickled weights", changed, *lines, expect=either(as_stock))
    yield from several("pickled weights", _DAMAGED, *lines, expect=refused("pytorch_model.bin"))
    for form, how in _FORMS.items():
        harms = {f"{name}, {form}": _saved(change, **how) for name, change in _CODE.items()}
        yield from several("code in a pickle", harms, *lines, expect=refused("pytorch_model.bin"))


_FORMS = {"as it is": {}, "as it was written before 2020": {"_use_new_zipfile_serialization": False}}


class _Call:
    """An object whose pickle calls something."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._called = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._called


def in_one(save: Callable[[dict[str, torch.Tensor], Path], object] = torch.save) -> Harm:
    """A model whose weights are in one pickle."""

    def harm(place: Path) -> None:
        model = place / "m"
        tensors: dict[str, Tensor] = {}
        for shard in sorted(model.glob("*.safetensors")):
            tensors |= load_file(shard)
            shard.unlink()
        (model / "model.safetensors.index.json").unlink()
        save(tensors, model / "pytorch_model.bin")

    return harm


def _saved(change: Callable[[dict[str, Any], Path], object], **how: Any) -> Harm:
    """What `torch.save` writes of changed tensors."""

    def save(tensors: dict[str, Any], path: Path) -> None:
        found = change(tensors, path)
        torch.save(tensors if found is None else found, path, **how)

    return in_one(save)


def _raw(content: Callable[[bytes], bytes]) -> Harm:
    """Another content than what `torch.save` wrote."""

    def save(tensors: dict[str, Any], path: Path) -> None:
        torch.save(tensors, path)
        path.write_bytes(content(path.read_bytes()))

    return in_one(save)


def _member(change: Callable[[bytes], bytes]) -> Harm:
    """Another pickle in the archive."""

    def save(tensors: dict[str, Any], path: Path) -> None:
        torch.save(tensors, path)
        with zipfile.ZipFile(path) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, change(data) if name.endswith("data.pkl") else data)

    return in_one(save)


def _ran(path: Path) -> tuple[str, str]:
    return str(path.parents[1] / RAN), "w"


def _mine(path: Path) -> str:
    return f"open({str(path.parents[1] / RAN)!r}, 'w')"


def _nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


_UP = "model.layers.0.mlp.up_proj.weight"
_TENSORS: dict[str, Callable[[dict[str, Any], Path], object]] = {
    "a sparse tensor": lambda tensors, path: tensors.update({_UP: tensors[_UP].float().to_sparse()}),
    "a tensor without data": lambda tensors, path: tensors.update({_UP: tensors[_UP].to("meta")}),
    "a tensor of complex numbers": lambda tensors, path: tensors.update({_UP: tensors[_UP].to(torch.complex64)}),
    "a tensor spread from one number": lambda tensors, path: tensors.update({_UP: torch.ones(1, 1).expand(54, 32)}),
    "a tensor of 2^60 spread numbers": lambda tensors, path: tensors.update({_UP: torch.ones(1).expand(2**60)}),
    "a list": lambda tensors, path: list(tensors.values()),
    "a tensor alone": lambda tensors, path: tensors[_UP],
    "a number": lambda tensors, path: 7,
    "nothing": lambda tensors, path: {},
    "a list for a tensor": lambda tensors, path: tensors.update({_UP: [1.0, 2.0]}),
    "a missing tensor": lambda tensors, path: {name: tensors[name] for name in tensors if name != _UP},
    "a number for a name": lambda tensors, path: dict([*tensors.items(), (7, torch.ones(2))]),
    "a control character in a name": lambda tensors, path: tensors.update({"\x1b[2J": torch.ones(2)}),
    "tensors in a dictionary below": lambda tensors, path: {"state_dict": dict(tensors)},
    "lists, 150 deep": lambda tensors, path: {**tensors, "more": _nested(150)},
    "NaN": lambda tensors, path: tensors.update({_UP: tensors[_UP] * float("nan")}),
}
_CODE: dict[str, Callable[[dict[str, Any], Path], object]] = {
    "open": lambda tensors, path: {**tensors, "x": _Call(open, *_ran(path))},
    "exec": lambda tensors, path: {**tensors, "x": _Call(exec, _mine(path))},
    "eval": lambda tensors, path: _Call(eval, _mine(path)),
    "Path.touch": lambda tensors, path: {**tensors, "x": _Call(Path.touch, Path(_ran(path)[0]))},
    "torch's own load": lambda tensors, path: {**tensors, "x": _Call(torch.load, _ran(path)[0])},
    "a class of the standard library": lambda tensors, path: {
        **tensors,
        "x": _Call(shutil.copy, "/bin/true", _ran(path)[0]),
    },
}


def _claims(content: bytes) -> bytes:
    """A pickle that says its text is 2^60 bytes long."""
    return b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x."


_DAMAGED: dict[str, Harm] = {
    **{f"cut after {length} bytes": _raw(cut(length)) for length in (0, 2, 999, -99)},
    "zeros": _raw(lambda content: b"\0" * 9999),
    "a text of 2^60 bytes": _member(_claims),
    "opcodes that nobody knows": _member(lambda content: b"\x80\x02\xff\xfe."),
    "a pickle without end": _member(lambda content: b"\x80\x02" + b"(" * 10**6),
    "memos that are missing": _member(lambda content: b"\x80\x02h\x07."),
    "an empty pickle": _member(lambda content: b""),
    "a bare pickle": in_one(lambda tensors, path: path.write_bytes(pickle.dumps({"a": 1}))),
}
