"""What is kept of earlier commands: conversions and the hub's files, changed after they were made."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.hostile.base import GGUF, PPL, put_gguf
from faults.hostile.forks import typed
from faults.hostile.frame import Case, Harm, Judged, Line, either, line, several
from faults.hostile.gguf import as_whole
from faults.hostile.hub import holding
from faults.hostile.liar import COMMIT, REPO
from faults.hostile.models import as_stock
from faults.hostile.pickles import in_one


def cases(base: Path) -> Iterator[Case]:
    """All of them."""
    converted = line(*PPL, "--model", GGUF)
    kept = {f"a GGUF file's conversion: {name}": _after(put_gguf, converted, harm) for name, harm in _CHANGED.items()}
    yield from several("what is cached", kept, converted, expect=either(as_whole))
    replaced = {"a GGUF file changed, its time put back": _after(put_gguf, converted, _same_time)}
    yield from several("what is cached", replaced, converted, expect=either(_another))
    unpickled = line(*PPL, "--model", "m")
    kept = {f"a pickle's conversion: {name}": _after(in_one(), unpickled, harm) for name, harm in _CHANGED.items()}
    yield from several("what is cached", kept, unpickled, expect=either(as_stock))
    for model in (REPO, f"{REPO}@{COMMIT}"):
        fetched = line(*PPL, "--model", model)
        kept = {f"a file of {model}: {name}": _after(holding, fetched, harm) for name, harm in _FETCHED.items()}
        yield from several("what is cached", kept, fetched, expect=either(as_stock))


def _after(prepare: Harm, first: Line, harm: Harm) -> Harm:
    """Harm that is done when a command has filled the cache."""

    def whole(place: Path) -> None:
        prepare(place)
        seen = typed(first, place)
        assert seen.code == 0, seen.err
        harm(place)

    return whole


def _each(change: Callable[[Path], object], pattern: str, root: str = "cache") -> Harm:
    """A change of every such file in a cache."""

    def harm(place: Path) -> None:
        found = [path for path in (place.parent / root).rglob(pattern) if path.is_file()]
        assert found, pattern
        for path in found:
            change(path)

    return harm


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


_CHANGED: dict[str, Harm] = {
    "a bit of the weights flipped": _each(_flip, "model.safetensors"),
    "the weights cut short": _each(_cut, "model.safetensors"),
    "the weights deleted": _each(Path.unlink, "model.safetensors"),
    "the config deleted": _each(Path.unlink, "config.json"),
    "the config cut short": _each(_cut, "config.json"),
    "the tokenizer cut short": _each(_cut, "tokenizer.json"),
    "all but the directory deleted": _each(Path.unlink, "*"),
    "a file in its place": lambda place: _flattened(place.parent / "cache" / "models"),
}
_FETCHED: dict[str, Harm] = {
    "a bit of a shard flipped": _each(lambda path: _flip(path.resolve()), "model-00001*", "hf"),
    "a shard cut short": _each(lambda path: _cut(path.resolve()), "model-00002*", "hf"),
    "a shard's blob deleted": _each(lambda path: path.resolve().unlink(), "model-00002*", "hf"),
    "a bit of the tokenizer flipped": _each(lambda path: _cut(path.resolve()), "tokenizer.json", "hf"),
}


def _flattened(models: Path) -> None:
    for path in models.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
            path.write_text("")


def _same_time(place: Path) -> None:
    """Another value of the last weight, under the old time."""
    path = place / GGUF
    status = path.stat()
    content = bytearray(path.read_bytes())
    for number in range(2000, 60_000, 2):
        content[-number] ^= 0x40
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _another(judged: Judged) -> str:
    """Not the perplexity of the file as it was."""
    return "" if as_whole(judged) else "the file as it was before is used"
