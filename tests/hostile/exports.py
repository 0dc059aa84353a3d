"""Sparse exports that are imported: their records, their parts, files that no list names, links, and bombs."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hostile import safe, values
from hostile.base import EXPORT, FLOAT, IMPORT
from hostile.frame import Case, Judged, accepted, either, line, refused
from hostile.models import FILES

_PLACE = "done/export/sparse"
_INDEX = "sparse.safetensors.index.json"
_SHARD = "sparse-00002-of-00003.safetensors"
_LARGE = 2 << 30  # bytes that a bomb expands to
_IMPORTED = line(*IMPORT)

Parts = dict[str, Tensor]


def cases(base: Path) -> Iterator[Case]:
    """All of them; `base` is the material that they begin from."""
    for name in ("export.json", _INDEX, "config.json"):
        kind = "an export's records: a field"
        yield from values.cases(base, f"{_PLACE}/{name}", kind, _as_stage, _IMPORTED, said=_PLACE)
    yield from _formats()
    yield from _headers()
    yield from _parts()
    yield from _strangers()
    yield from _files()
    yield from _bombs()
    yield from _uploads()


def _as_stage(judged: Judged) -> str:
    """The weights are, to the bit, those of the stage that was exported; and no file is there that it does not have."""
    for path in sorted((judged.place / "r").rglob("*")):
        whole = judged.place / "done" / path.relative_to(judged.place / "r")
        if path.is_symlink() or not whole.exists():
            if not path.name.startswith("."):
                return f"{path.name} is in the stage"
        elif path.suffix == ".safetensors" and path.read_bytes() != whole.read_bytes():
            return f"{path.name} is another"
    return ""


def _edit(name: str, **changes: object) -> Callable[[Path], None]:
    def harm(place: Path) -> None:
        path = place / _PLACE / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return harm


def _formats() -> Iterator[Case]:
    """Records of another format, or of another thing."""
    told: dict[str, dict[str, object]] = {
        "export.json": {
            "format": 99,
            "status": "begun",
            "source": {"stage": "pruned", "digest": "0" * 64},
            "command": "prune",
        },
        "stage/besa.json": {"format": 99, "status": "running", "stage": "../x", "digest": "0" * 64, "blocks": 7},
    }
    for name, fields in told.items():
        for field, value in fields.items():
            harm = _edit(name, **{field: value})
            yield Case(
                kind="an export of another form",
                name=f"{name}: {field}",
                harm=harm,
                lines=(_IMPORTED,),
                expect=refused(_PLACE),
            )
    for name in (
        "export.json",
        _INDEX,
        "config.json",
        "stage",
        "stage/besa.json",
        "stage/model.safetensors.index.json",
        _SHARD,
        "stage/config.json",
    ):

        def drop(place: Path, name: str = name) -> None:
            path = place / _PLACE / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

        yield Case(
            kind="an export of another form",
            name=f"without {name}",
            harm=drop,
            lines=(_IMPORTED,),
            expect=either(_as_stage),
        )


def _told(place: Path, name: str) -> None:
    """Let the digests of an export follow what was changed in a file, as a forger does."""
    path = place / _PLACE / name
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for record in (_INDEX, "export.json"):
        document = json.loads((place / _PLACE / record).read_text())
        table = document["metadata"]["sha256"] if record == _INDEX else document["files"]
        table[name] = digest if record == _INDEX else {"bytes": path.stat().st_size, "sha256": digest}
        (place / _PLACE / record).write_text(json.dumps(document))
        if record == _INDEX:
            _told_index(place)


def _told_index(place: Path) -> None:
    path = place / _PLACE / _INDEX
    document = json.loads((place / _PLACE / "export.json").read_text())
    document["files"][_INDEX] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (place / _PLACE / "export.json").write_text(json.dumps(document))


def _headers() -> Iterator[Case]:
    """Headers that are wrong in a file whose digest was made to fit."""
    for name, change in safe.HEADERS.items():

        def harm(place: Path, change: Callable[[bytes], bytes] = change) -> None:
            path = place / _PLACE / _SHARD
            path.write_bytes(change(path.read_bytes()))
            _told(place, _SHARD)

        yield Case(
            kind="an export's header, forged",
            name=name,
            harm=harm,
            lines=(_IMPORTED,),
            expect=either(_as_stage, "sparse"),
        )


_UP = "model.layers.0.mlp.up_proj"


def _to(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Parts], object]:
    return lambda parts: parts.update({f"{_UP}.weight_{part}": change(parts[f"{_UP}.weight_{part}"])})


def _sizes(*sizes: float, dtype: torch.dtype = torch.int64) -> Callable[[Parts], object]:
    return _to("shape", lambda old: torch.tensor(sizes, dtype=dtype))


_PARTS: dict[str, Callable[[Parts], object]] = {
    **{
        f"without its {part}": lambda parts, part=part: parts.pop(f"{_UP}.weight_{part}")
        for part in ("mask", "values", "shape")
    },  # type: ignore[misc]
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


def _parts() -> Iterator[Case]:
    """Parts of a weight that do not belong together, in a file whose digest was made to fit."""
    for name, change in _PARTS.items():

        def harm(place: Path, change: Callable[[Parts], object] = change) -> None:
            path = place / _PLACE / _SHARD
            parts = load_file(path)
            change(parts)
            save_file({key: part.contiguous() for key, part in parts.items()}, path, metadata={"format": "pt"})
            _told(place, _SHARD)

        yield Case(kind="an export's parts, forged", name=name, harm=harm, lines=(_IMPORTED,), expect=refused("sparse"))


def _strangers() -> Iterator[Case]:
    """Files that no list names, and lists that name what lies elsewhere."""
    for name in (
        "notes.txt",
        "stage/notes.txt",
        "stage/.git/config",
        "stage/codes/x.safetensors",
        "stage/modeling_mine.py",
        "stage/model-00009-of-00009.safetensors",
        "stage/pytorch_model.bin",
    ):

        def put(place: Path, name: str = name) -> None:
            path = place / _PLACE / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("of a stranger")

        def link(place: Path, name: str = name) -> None:
            path = place / _PLACE / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(place / "mine" / "notes.txt")

        for said, harm in ((name, put), (f"{name}, a link", link)):
            yield Case(
                kind="files that an export does not name",
                name=said,
                harm=harm,
                lines=(_IMPORTED,),
                expect=either(_as_stage),
            )
    for target in (
        "../../pruned/config.json",
        "/etc/passwd",
        "../../../mine/notes.txt",
        "stage/../../../../mine/notes.txt",
    ):

        def named(place: Path, target: str = target) -> None:
            document = json.loads((place / _PLACE / "export.json").read_text())
            path = Path(os.path.normpath(place / _PLACE / target))
            entry = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            document["files"][target] = entry
            (place / _PLACE / "export.json").write_text(json.dumps(document))

        yield Case(
            kind="files that an export does not name",
            name=f"export.json: {target}",
            harm=named,
            lines=(_IMPORTED,),
            expect=either(_as_stage),
        )

        def weights(place: Path, target: str = target) -> None:
            path = place / _PLACE / _INDEX
            document = json.loads(path.read_text())
            document["metadata"]["sha256"][target] = "0" * 64
            document["weight_map"] = dict.fromkeys(document["weight_map"], target)
            path.write_text(json.dumps(document))
            _told_index(place)

        yield Case(
            kind="files that an export does not name",
            name=f"{_INDEX}: {target}",
            harm=weights,
            lines=(_IMPORTED,),
            expect=refused(_PLACE),
        )


def _files() -> Iterator[Case]:
    """Something else in the place of each file."""
    for name in (
        "export.json",
        _INDEX,
        _SHARD,
        "stage/besa.json",
        "stage/config.json",
        "stage/tokenizer.json",
        "stage/model-00002-of-00003.json",
    ):
        for kind, put in FILES.items():

            def harm(place: Path, name: str = name, put: Callable[[Path], None] = put) -> None:
                put(place / _PLACE / name)

            yield Case(
                kind="what a file of an export is",
                name=f"{name}: {kind}",
                harm=harm,
                lines=(_IMPORTED,),
                expect=either(_as_stage),
            )


def _packed(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """An export whose weights are compressed, one file of it otherwise than it was made; its digest fits."""

    def harm(place: Path) -> None:
        path = place / _PLACE / _SHARD
        packed = path.with_name(f"{_SHARD}.zst")
        packed.write_bytes(content(path.read_bytes()))
        path.unlink()
        for record in (_INDEX, "export.json"):
            text = (place / _PLACE / record).read_text().replace(_SHARD, packed.name)
            (place / _PLACE / record).write_text(text)
        _told(place, packed.name)

    return harm


def _zstd(content: bytes, repeated: int = 1) -> bytes:
    """A stream, written a piece at a time."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        for _ in range(repeated):
            stream.write(content)
    return bytes(sink.getvalue())


_PIECE = 16 << 20


def _bombs() -> Iterator[Case]:
    """Compressed weights."""
    bad: dict[str, Callable[[bytes], bytes]] = {
        "zeros of 2 GB behind the weights": lambda content: _zstd(content) + _zstd(b"\0" * _PIECE, _LARGE // _PIECE),
        "zeros of 2 GB": lambda content: _zstd(b"\0" * _PIECE, _LARGE // _PIECE),
        "cut short": lambda content: _zstd(content)[:-20],
        "not packed": lambda content: content,
        "garbage": lambda content: b"\x28\xb5\x2f\xfd" + b"\xa5" * 999,
        "empty": lambda content: b"",
        "packed twice": lambda content: _zstd(_zstd(content)),
        "a window of 2 GB": lambda content: b"\x28\xb5\x2f\xfd\x00\xa8" + content[:99],
    }
    for name, content in {"as it is": _zstd, **bad}.items():
        expect = accepted(_as_stage) if name == "as it is" else refused("sparse")
        yield Case(kind="a compressed export", name=name, harm=_packed(content), lines=(_IMPORTED,), expect=expect)


def _uploads() -> Iterator[Case]:
    """What an export holds that is uploaded: nothing of this machine."""

    def bare(judged: Judged) -> str:
        root = str(judged.place.parent).encode()
        found = [
            path
            for path in (judged.place / "done" / "export").rglob("*")
            if path.is_file() and root in path.read_bytes()
        ]
        return f"a path of this machine in {found[0].name}" if found else ""

    def named(place: Path) -> None:
        (place / "config.yaml").write_text(f"model: {place / 'm'}\n")

    for words in (
        ("export", "--run", "done"),
        (*EXPORT, "--restart"),
        ("export", "--run", "done", "--dtype", "float16"),
    ):
        yield Case(
            kind="paths of the machine in an export",
            name=" ".join(words),
            harm=named,
            lines=(line(*words),),
            expect=accepted(bare),
        )
    far = line("quantize", "--method", "rtn", "--group-size", "16", "--symmetric", "--run", "done", *FLOAT)
    for name in ("compressed-tensors", "sparse"):
        lines = (far, line("export", "--format", name, "--run", "done", "--restart"))
        yield Case(
            kind="paths of the machine in an export",
            name=f"{name} of codes",
            harm=named,
            lines=lines,
            expect=accepted(bare),
        )
