"""Run directories: every field of manifests, reports and results, and the weights of a finished stage."""

import filecmp
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from faults.hostile import safe, values
from faults.hostile.base import AGAIN, FLOAT, PPL
from faults.hostile.frame import Case, Judged, either, fine, line, refused, several
from faults.hostile.harms import edited, in_place_of

STAGE = "done/pruned"
_FIRST = f"{STAGE}/model-00002-of-00003"
READERS = {
    "prune again": line(*AGAIN),
    "eval ppl": line(*PPL, "--run", "done"),
    "eval sample": line("eval", "sample", "w5 w6", "--run", "done", "--tokens", "3", *FLOAT),
    "quantize": line("quantize", "--method", "rtn", "--group-size", "16", "--run", "done", *FLOAT),
    "export": line("export", "--run", "done"),
    "simulate": line("simulate", "--run", "done"),
    "eval compare": line("eval", "compare", "done"),
    "show": line("show", "done"),
}


def cases(base: Path) -> Iterator[Case]:
    """All of them; `base` is the material that they begin from."""
    yield from _fields(base, f"{STAGE}/besa.json", "a stage's manifest: a field", ("prune again", "export"))
    yield from _fields(base, f"{_FIRST}.json", "a block's report: a field", ("show", "export"))
    yield from _fields(base, "done/calibration/besa.json", "a calibration set's manifest: a field", ("prune again",))
    result = next((base / "done" / "eval").glob("*.json"))
    yield from _results(base, f"done/eval/{result.name}")
    yield from _statuses()
    yield from _shards()
    yield from _files()


def _fields(base: Path, name: str, kind: str, readers: tuple[str, ...]) -> Iterator[Case]:
    for reader in readers:
        for case in values.cases(base, name, kind, unchanged, READERS[reader], said=str(Path(name).parent)):
            yield replace(case, name=f"{case.name}: {reader}")


def unchanged(judged: Judged) -> str:
    """The weights of the stage are those of the undisturbed run."""
    for shard in sorted((judged.place.parent / "base" / STAGE).glob("*.safetensors")):
        found = judged.place / STAGE / shard.name
        if not (found.is_file() and filecmp.cmp(found, shard, shallow=False)):
            return f"{shard.name} is another"
    return ""


def _results(base: Path, name: str) -> Iterator[Case]:
    """A result that is read again is the one that is right, or one line says why not."""

    def right(judged: Judged) -> str:
        found = json.loads(judged.seen[-1].out)["results"][0]["perplexity"]
        return "" if found == judged.whole.pruned else f"perplexity {found}, without harm {judged.whole.pruned}"

    def finite(judged: Judged) -> str:
        said = judged.seen[-1].out.lower()
        return "a figure that is none" if "nan" in said or "inf" in said else ""

    kind = "a result: a field"
    yield from values.cases(base, name, kind, right, line(*PPL, "--run", "done"))
    for case in values.cases(base, name, kind, finite, READERS["eval compare"]):
        yield replace(case, name=f"{case.name}: compare")


def _statuses() -> Iterator[Case]:
    """A manifest that does not say what is there."""
    manifest = f"{STAGE}/besa.json"
    for field, wrong in {
        "status": ("finished", "complete ", "", "COMPLETE", "broken", "\x1b[2J"),
        "stage": ("quantized", "dense", "../x", "", "\x1b[2J"),
        "format": (0, 2, 99, "1", 1.5, True),
        "blocks": (0, 1, 3, 10**9, "2"),
        "digest": ("0" * 64, "", "x", "../../x"),
    }.items():
        for reader in ("prune again", "eval ppl", "quantize", "export"):
            harms = {f"{field} {value!r}: {reader}": edited(manifest, **{field: value}) for value in wrong}
            yield from several("a stage's manifest: what rules", harms, READERS[reader], expect=refused("done/pruned"))


def _numbered(place: Path, number: int) -> Path:
    return place / STAGE / f"model-{number:05}-of-00003.safetensors"


def _exchanged(place: Path) -> None:
    """Each block holds the other one's tensors under its own names."""
    first, second = _numbered(place, 2), _numbered(place, 3)
    contents = _renamed(second, "layers.1.", "layers.0."), _renamed(first, "layers.0.", "layers.1.")
    for path, content in zip((first, second), contents, strict=True):
        path.write_bytes(content)


def _renamed(shard: Path, old: str, new: str) -> bytes:
    """A shard's bytes with other names of the same length in its header."""
    return shard.read_bytes().replace(old.encode(), new.encode())


def _exchanged_with_reports(place: Path) -> None:
    _exchanged(place)
    first, second = (_numbered(place, number).with_suffix(".json") for number in (2, 3))
    reports = [json.loads(path.read_text()) for path in (first, second)]
    first.write_text(json.dumps(reports[1] | {"index": 0}))
    second.write_text(json.dumps(reports[0] | {"index": 1}))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


_SHARDS: dict[str, Callable[[Path], object]] = {
    "two blocks exchanged": _exchanged,
    "two blocks and their reports exchanged": _exchanged_with_reports,
    "a block deleted": lambda place: _numbered(place, 2).unlink(),
    "what belongs to no block deleted": lambda place: _numbered(place, 1).unlink(),
    "a bit of a block flipped": lambda place: _flip(_numbered(place, 2)),
    "a bit of what belongs to no block flipped": lambda place: _flip(_numbered(place, 1)),
    "a block cut short": lambda place: os.truncate(_numbered(place, 3), 5000),
    "a weight that is NaN": lambda place: safe.TENSORS["a weight nan"](_numbered(place, 2)),
    "a block of the dense model": lambda place: safe.TENSORS["a weight 3e+38"](_numbered(place, 2)),
    "the index deleted": lambda place: (place / STAGE / "model.safetensors.index.json").unlink(),
    "a report deleted": lambda place: _numbered(place, 2).with_suffix(".json").unlink(),
    "the config deleted": lambda place: (place / STAGE / "config.json").unlink(),
    "a tensor twice": lambda place: safe.TENSORS["a tensor in two shards"](_numbered(place, 2)),
}


# Not read, so that nothing can be said of it.
_UNREAD = (
    ("a report deleted", "eval ppl"),
    ("a report deleted", "eval sample"),
    ("a report deleted", "simulate"),
    ("the config deleted", "simulate"),
)


def _shards() -> Iterator[Case]:
    """A finished stage whose weights are not those that were made."""
    for reader in ("prune again", "eval ppl", "eval sample", "quantize", "export", "simulate", "show"):
        for name, harm in _SHARDS.items():
            expect = either() if reader == "show" or (name, reader) in _UNREAD else refused("done")
            yield from several("a stage's weights", {f"{name}: {reader}": harm}, READERS[reader], expect=expect)


def _files() -> Iterator[Case]:
    """Something else in the place of a file of the run directory."""
    block = "pruned/model-00002-of-00003"
    calibration = ("calibration/besa.json", "calibration/tokens.safetensors")
    for name in ("pruned/besa.json", f"{block}.json", f"{block}.safetensors", *calibration):
        for reader, check in (("prune again", unchanged), ("show", fine)):
            harms = {f"{said}: {reader}": harm for said, harm in in_place_of(f"done/{name}").items()}
            yield from several("what a file of a run is", harms, READERS[reader], expect=either(check))
