"""Sparse exports that are imported: their records, files that no list names, and what lies in a file's place."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from faults.hostile import values
from faults.hostile.base import FLOAT, IMPORT
from faults.hostile.frame import Case, Harm, Judged, accepted, either, line, refused, several
from faults.hostile.harms import edited, in_place_of, linked, nothing, written

PLACE = "done/export/sparse"
INDEX = "sparse.safetensors.index.json"
SHARD = "sparse-00002-of-00003.safetensors"
IMPORTED = line(*IMPORT)


def cases(base: Path) -> Iterator[Case]:
    """All of them; `base` is the material that they begin from."""
    for name in ("export.json", INDEX, "config.json"):
        kind = "an export's records: a field"
        yield from values.cases(base, f"{PLACE}/{name}", kind, as_stage, IMPORTED, said=PLACE)
    yield from _formats()
    yield from _strangers()
    yield from _elsewhere()
    yield from _files()
    yield from _uploads()


def as_stage(judged: Judged) -> str:
    """The weights are, to the bit, those of the stage that was exported; and no file is there that it does not have."""
    for path in sorted((judged.place / "r").rglob("*")):
        whole = judged.place / "done" / path.relative_to(judged.place / "r")
        if path.is_symlink() or not whole.exists():
            if not path.name.startswith("."):
                return f"{path.name} is in the stage"
        elif path.suffix == ".safetensors" and path.read_bytes() != whole.read_bytes():
            return f"{path.name} is another"
    return ""


def _formats() -> Iterator[Case]:
    """Records of another format, or of another thing; and none at all."""
    kind = "an export of another form"
    source = {"stage": "pruned", "digest": "0" * 64}
    told: dict[str, dict[str, object]] = {
        "export.json": {"format": 99, "status": "begun", "source": source, "command": "prune"},
        "stage/besa.json": {"format": 99, "status": "running", "stage": "../x", "digest": "0" * 64, "blocks": 7},
    }
    for name, fields in told.items():
        harms = {f"{name}: {field}": edited(f"{PLACE}/{name}", **{field: value}) for field, value in fields.items()}
        yield from several(kind, harms, IMPORTED, expect=refused(PLACE))
    names = (
        "export.json", INDEX, "config.json", "stage/besa.json", "stage/model.safetensors.index.json", SHARD,
        "stage/config.json",
    )  # fmt: skip
    dropped = {f"without {name}": _without(name) for name in names}
    yield from several(kind, dropped, IMPORTED, expect=either(as_stage))
    bare = {"without its stage": lambda place: shutil.rmtree(place / PLACE / "stage")}
    yield from several(kind, bare, IMPORTED, expect=refused(PLACE))


def _without(name: str) -> Harm:
    return lambda place: (place / PLACE / name).unlink()


def _strangers() -> Iterator[Case]:
    """Files that no list names."""
    names = (
        "notes.txt", "stage/notes.txt", "stage/.git/config", "stage/codes/x.safetensors", "stage/modeling_mine.py",
        "stage/model-00009-of-00009.safetensors", "stage/pytorch_model.bin",
    )  # fmt: skip
    harms = {name: written(f"{PLACE}/{name}", "of a stranger") for name in names}
    harms |= {f"{name}, a link": linked(f"{PLACE}/{name}", "mine/notes.txt") for name in names}
    yield from several("files that an export does not name", harms, IMPORTED, expect=either(as_stage))


def _named(target: str) -> Harm:
    """A list of files that names one elsewhere, with its right digest."""

    def harm(place: Path) -> None:
        document = json.loads((place / PLACE / "export.json").read_text())
        document["files"][target] = entry(Path(os.path.normpath(place / PLACE / target)))
        (place / PLACE / "export.json").write_text(json.dumps(document))

    return harm


def _indexed(target: str) -> Harm:
    """An index whose weights are all in a file elsewhere."""

    def harm(place: Path) -> None:
        path = place / PLACE / INDEX
        document = json.loads(path.read_text())
        document["metadata"]["sha256"][target] = "0" * 64
        document["weight_map"] = dict.fromkeys(document["weight_map"], target)
        path.write_text(json.dumps(document))
        told_again(place, INDEX)

    return harm


def _elsewhere() -> Iterator[Case]:
    """Lists that name what lies elsewhere."""
    kind = "files that an export does not name"
    targets = ("../../pruned/config.json", "/etc/passwd", "../../../mine/notes.txt", "stage/../../../../mine/notes.txt")
    listed = {f"export.json: {target}": _named(target) for target in targets}
    yield from several(kind, listed, IMPORTED, expect=either(as_stage))
    held = {f"{INDEX}: {target}": _indexed(target) for target in targets}
    yield from several(kind, held, IMPORTED, expect=refused(PLACE))


def _files() -> Iterator[Case]:
    """Something else in the place of each file."""
    stage = ("besa.json", "config.json", "tokenizer.json", "model-00002-of-00003.json")
    for name in ("export.json", INDEX, SHARD, *(f"stage/{name}" for name in stage)):
        harms = in_place_of(f"{PLACE}/{name}")
        yield from several("what a file of an export is", harms, IMPORTED, expect=either(as_stage))


def _bare(judged: Judged) -> str:
    """No file of the exports holds a path of this machine; what is hidden beside them is not part of them."""
    root = str(judged.place.parent).encode()
    files = [path for path in (judged.place / "done" / "export").glob("[!.]*/**/*") if path.is_file()]
    found = [path.name for path in files if root in path.read_bytes()]
    return f"a path of this machine in {found[0]}" if found else ""


def _uploads() -> Iterator[Case]:
    """What an export holds that is uploaded: nothing of this machine."""
    export = ("export", "--run", "done", "--restart")
    codes = line("quantize", "--method", "rtn", "--group-size", "16", "--symmetric", "--run", "done", *FLOAT)
    typed = {
        "hf": (line(*export),),
        "hf in another dtype": (line(*export, "--dtype", "float16"),),
        "sparse": (line(*export, "--format", "sparse"),),
        "sparse, of codes": (codes, line(*export, "--format", "sparse")),
        "compressed-tensors": (codes, line(*export, "--format", "compressed-tensors")),
    }
    for name, lines in typed.items():
        yield from several("paths of the machine in an export", {name: nothing}, *lines, expect=accepted(_bare))


def entry(path: Path) -> dict[str, object]:
    """What `export.json` tells of a file."""
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def told_again(place: Path, name: str) -> None:
    """Let the digests of an export follow what was changed in a file, as a forger does."""
    path, record, index = (place / PLACE / each for each in (name, "export.json", INDEX))
    if name != INDEX:
        document = json.loads(index.read_text())
        document["metadata"]["sha256"][name] = entry(path)["sha256"]
        index.write_text(json.dumps(document))
    document = json.loads(record.read_text())
    document["files"] |= {name: entry(path), INDEX: entry(index)}
    record.write_text(json.dumps(document))
