"""Code that a stranger hands over: in a checkpoint, in a pickle, and as a module of the current directory."""

import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hostile.base import FLOAT, PPL, PRUNE
from hostile.frame import RAN, Case, accepted, either, fine, line, refused
from hostile.models import PRUNE_TEXT, SAMPLE, as_stock

_MODULES = "modules of the current directory"
_YES = "y\n" * 9
_COMMANDS = (
    line(*PRUNE_TEXT, answers=_YES),
    line(*PPL, "--model", "m", answers=_YES),
    line(*SAMPLE, answers=_YES),
    line("simulate", "--model", "m", answers=_YES),
    line("quantize", "--model", "m", "--run", "r", *FLOAT, answers=_YES),
    line("show", "m", answers=_YES),
)


def cases(base: Path) -> Iterator[Case]:
    """All of them."""
    yield from _checkpoints()
    yield from _pickles()
    yield from _modules()


def _source(place: Path) -> str:
    """Python that leaves a mark, and defines what may be asked of it."""
    return f"open({str(place / RAN)!r}, 'w').close()\nclass Mine:\n    pass\ndef generate(*a, **k):\n    pass\n"


def _with_code(place: Path, changes: dict[str, dict[str, Any]]) -> None:
    """Modules in the checkpoint, and files that name them."""
    for name in ("modeling_mine.py", "configuration_mine.py", "tokenization_mine.py", "custom_generate/generate.py"):
        (place / "m" / name).parent.mkdir(exist_ok=True)
        (place / "m" / name).write_text(_source(place))
    for name, change in changes.items():
        path = place / "m" / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **change}))


_MODEL = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
_TOKENIZER = {"AutoTokenizer": ["tokenization_mine.Mine", "tokenization_mine.Mine"]}
_UNKNOWN = {"model_type": "mine", "auto_map": _MODEL}
_CHECKPOINTS: dict[str, tuple[bool, dict[str, dict[str, Any]]]] = {  # whether it has to be refused
    "an unknown type": (True, {"config.json": _UNKNOWN}),
    "an unknown type that trusts itself": (True, {"config.json": _UNKNOWN | {"trust_remote_code": True}}),
    "an unknown type of another repository": (
        True,
        {"config.json": {"model_type": "mine", "auto_map": {"AutoConfig": "org/other--configuration_mine.Mine"}}},
    ),
    "a known type": (False, {"config.json": {"auto_map": _MODEL}}),
    "a known type that trusts itself": (False, {"config.json": {"auto_map": _MODEL, "trust_remote_code": True}}),
    "no type": (True, {"config.json": {"model_type": None, "auto_map": _MODEL}}),
    "a tokenizer": (False, {"tokenizer_config.json": {"auto_map": _TOKENIZER}}),
    "a tokenizer of a class of its own": (
        False,
        {"tokenizer_config.json": {"auto_map": _TOKENIZER, "tokenizer_class": "Mine", "trust_remote_code": True}},
    ),
    "a tokenizer that config.json names": (False, {"config.json": {"auto_map": _TOKENIZER}}),
    "generation": (False, {"generation_config.json": {"custom_generate": "m", "trust_remote_code": True}}),
    "a processor": (False, {"processor_config.json": {"auto_map": {"AutoProcessor": "modeling_mine.Mine"}}}),
    "a quantizer": (True, {"config.json": {"quantization_config": {"quant_method": "mine", "auto_map": _MODEL}}}),
    "attention from the hub": (False, {"config.json": {"_attn_implementation": "org/mine", "use_kernels": True}}),
}


def _checkpoints() -> Iterator[Case]:
    for name, (refuses, changes) in _CHECKPOINTS.items():
        for each in _COMMANDS if refuses else (*_COMMANDS[:3], line(*PPL, "--model", "m", answers=_YES)):
            shown = each.words[0] == "show"
            yield Case(
                kind="code in a checkpoint",
                name=f"{name}: {' '.join(each.words[:2])}",
                harm=partial(_with_code, changes=changes),
                lines=(each,),
                expect=refused() if refuses and not shown else either(as_stock if each.words[:2] == PPL[:2] else fine),
            )


class _Call:
    """An object whose pickle calls something."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._called = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._called


def _pickled(save: Callable[[dict[str, torch.Tensor], Path], object]) -> Callable[[Path], None]:
    """A model whose weights are in one pickle."""

    def harm(place: Path) -> None:
        model = place / "m"
        tensors = {}
        for shard in sorted(model.glob("*.safetensors")):
            tensors |= load_file(shard)
            shard.unlink()
        (model / "model.safetensors.index.json").unlink()
        save(tensors, model / "pytorch_model.bin")

    return harm


def _saved(change: Callable[[dict[str, Any], Path], object], **how: Any) -> Callable[[Path], None]:
    """What `torch.save` writes of changed tensors."""

    def save(tensors: dict[str, Any], path: Path) -> None:
        found = change(tensors, path)
        torch.save(tensors if found is None else found, path, **how)

    return _pickled(save)


def _raw(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Another content than what `torch.save` wrote."""

    def save(tensors: dict[str, Any], path: Path) -> None:
        torch.save(tensors, path)
        path.write_bytes(content(path.read_bytes()))

    return _pickled(save)


def _member(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Another pickle in the archive."""

    def save(tensors: dict[str, Any], path: Path) -> None:
        torch.save(tensors, path)
        with zipfile.ZipFile(path) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, change(data) if name.endswith("data.pkl") else data)

    return _pickled(save)


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
    "a number for a name": lambda tensors, path: tensors.update({7: torch.ones(2)}),
    "a control character in a name": lambda tensors, path: tensors.update({"\x1b[2J": torch.ones(2)}),
    "tensors in a dictionary below": lambda tensors, path: {"state_dict": dict(tensors)},
    "lists, 500 deep": lambda tensors, path: {**tensors, "more": _nested(500)},
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


def _pickles() -> Iterator[Case]:
    """A checkpoint in pickles alone."""
    lines = (line(*PRUNE), line(*PPL, "--model", "m"))
    good = {"as it is": _saved(lambda tensors, path: None), "as it was written before 2020": _old()}
    for name, harm in good.items():
        yield Case(kind="pickled weights", name=name, harm=harm, lines=lines, expect=accepted(as_stock))
    for name, change in _TENSORS.items():
        yield Case(kind="pickled weights", name=name, harm=_saved(change), lines=lines, expect=either(as_stock))
    damaged = {
        **{
            f"cut after {length} bytes": _raw(lambda content, length=length: content[:length])
            for length in (0, 2, 999, -99)
        },  # type: ignore[misc]
        "zeros": _raw(lambda content: b"\0" * 9999),
        "a text of 2^60 bytes": _member(_claims),
        "opcodes that nobody knows": _member(lambda content: b"\x80\x02\xff\xfe."),
        "a pickle without end": _member(lambda content: b"\x80\x02" + b"(" * 10**6),
        "memos that are missing": _member(lambda content: b"\x80\x02h\x07."),
        "an empty pickle": _member(lambda content: b""),
        "a bare pickle": _pickled(lambda tensors, path: path.write_bytes(pickle.dumps({"a": 1}))),
    }
    for name, harm in damaged.items():
        yield Case(kind="pickled weights", name=name, harm=harm, lines=lines, expect=refused("pytorch_model.bin"))
    for old in (False, True):
        for name, change in _CODE.items():
            harm = _saved(change, _use_new_zipfile_serialization=not old)
            said = f"{name}{', in the old form' * old}"
            yield Case(kind="code in a pickle", name=said, harm=harm, lines=lines, expect=refused("pytorch_model.bin"))


def _old() -> Callable[[Path], None]:
    return _saved(lambda tensors, path: None, _use_new_zipfile_serialization=False)


def _modules() -> Iterator[Case]:
    """Modules of the current directory that are named as those of libraries, beside commands that start processes."""
    experiment = "run: r\nprune:\n  model: m\n  method: magnitude\n  data: rows.jsonl\n  samples: 2\n  seqlen: 16\n"
    for name in ("pip", "yaml", "torch", "random", "numpy", "besa_cli", "sitecustomize", "typer", "encodings"):

        def harm(place: Path, name: str = name) -> None:
            (place / f"{name}.py").write_text(_source(place))
            (place / "e.yaml").write_text(experiment)

        lines = (line("run", "e.yaml"),)
        yield Case(kind=_MODULES, name=f"{name}: run", harm=harm, lines=lines, expect=accepted())
    fetch = line("prune", "--method", "magnitude", "--run", "r")
    for name in ("pip", "random"):

        def put(place: Path, name: str = name) -> None:
            (place / f"{name}.py").write_text(_source(place))

        said = f"{name}: the demo model's first fetch"
        yield Case(kind=_MODULES, name=said, harm=put, lines=(fetch,), expect=refused())
