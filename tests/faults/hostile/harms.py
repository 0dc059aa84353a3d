"""What is done to files before a command is typed: changes by content, links, and other things in a file's place."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from faults.hostile.frame import Harm


def nothing(place: Path) -> None:
    """No harm: what is typed, or around it, is what is hostile."""


def edited(name: str, **changes: object) -> Harm:
    """Other values of fields of a JSON file, which may be missing."""

    def harm(place: Path) -> None:
        path = place / name
        document = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(document | changes))

    return harm


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Harm:
    """Another content of a file."""
    return lambda place: (place / name).write_bytes(change((place / name).read_bytes()))


def written(name: str, content: str | bytes | Callable[[], bytes]) -> Harm:
    """A file with this content, made when the case is run where it is large."""

    def harm(place: Path) -> None:
        found = content() if callable(content) else content
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found.encode("utf-8", "surrogateescape") if isinstance(found, str) else found)

    return harm


def linked(name: str, target: str) -> Harm:
    """A link in the place of a file; the target is below the case's directory, or absolute."""

    def harm(place: Path) -> None:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(place / target)

    return harm


def in_place_of(name: str) -> dict[str, Harm]:
    """What may stand in the place of a file."""
    return {f"{name}: {kind}": lambda place, put=put: put(place / name) for kind, put in FILES.items()}  # type: ignore[misc]


def _linked(target: str) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return put


def _piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _sparse(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 36)


def cut(length: int) -> Callable[[bytes], bytes]:
    """The first bytes of a content; below 0 as many less than all."""
    return lambda content: content[:length]


FILES: dict[str, Harm] = {
    "a pipe": _piped,
    "a directory": _folder,
    "a link to a device without end": _linked("/dev/zero"),
    "a link to nothing": _linked("nowhere"),
    "a link to itself": lambda path: _linked(path.name)(path),
    "of 64 GB": _sparse,
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes()[2:]),
    "another program's": lambda path: shutil.copy("/bin/true", path),
    "missing": Path.unlink,
}
