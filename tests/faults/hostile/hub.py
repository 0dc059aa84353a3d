"""A hub that lies: about commits, tags, names, lengths, redirects, and that never ends or never comes."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from faults.hostile import liar
from faults.hostile.base import DRAWN
from faults.hostile.frame import Case, Expectation, Judged, accepted, either, line, refused
from faults.hostile.liar import COMMIT, HUB, LARGE, REPO, Answer, Change, is_listing

_FETCH = line("prune", "--model", REPO, "--method", "magnitude", *DRAWN, "--run", "r")


def cases(base: Path) -> Iterator[Case]:
    """All of them; `base` is the material that they begin from."""
    yield _case("as it is", liar.unchanged, accepted())
    for name, change in {**_commits(), **_listings(), **_names()}.items():
        yield _case(name, change, refused())
    for name, change in {**_bodies(), **_lengths(), **_ways()}.items():
        yield _case(name, change, either())


def holding(place: Path, change: Change = liar.unchanged) -> None:
    """Let the hub hold the model of a case, and answer as the change makes it."""
    HUB.files = {path.name: path.read_bytes() for path in (place / "m").iterdir()}
    HUB.change = change


def _case(name: str, change: Change, expect: Expectation) -> Case:
    return Case(
        kind="answers of a hub",
        name=name,
        harm=lambda place: holding(place, change),
        lines=(_FETCH,),
        expect=lambda judged: expect(judged) or _inside(judged),
    )


_OURS = {"base", "cache", "case", "gguf", "hf", "home", "m.gguf", "other.gguf"}
_TEMPORARY = ("besa-traceback", "tmp", "pymp")
_OF_THE_HUB = {"models--org--tiny", ".locks", "CACHEDIR.TAG", "version.txt"}


def _inside(judged: Judged) -> str:
    """Nothing was written beside the caches; what was, is taken away before the next case."""
    around = judged.place.parent
    hub = around / "hf" / "hub"
    strange = (
        _others(around, _OURS)
        + _others(hub, _OF_THE_HUB)
        + _others(hub / "models--org--tiny" / "refs", {"main", COMMIT})
    )
    for path in strange:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return f"written: {', '.join(path.name for path in strange)}" if strange else ""


def _others(directory: Path, ours: set[str]) -> list[Path]:
    found = directory.iterdir() if directory.is_dir() else []
    return [path for path in found if path.name not in ours and not path.name.startswith(_TEMPORARY)]


def _is_file(path: str) -> bool:
    return "/resolve/" in path


def _is_weights(path: str) -> bool:
    return path.endswith(LARGE)


_BAD_NAMES = (
    "../../../../x",
    "/tmp/x",
    "main/../../x",
    "x" * 64,
    "",
    "0" * 39,
    "\x1b[2J",
    COMMIT.upper(),
    f"{COMMIT}/x",
    ".",
    "..",
    "0" * 5000,
)


def _commits() -> dict[str, Change]:
    """Commits and tags that are paths, or none."""
    found: dict[str, Change] = {}
    for value in _BAD_NAMES:

        def sha(path: str, answer: Answer, value: str = value) -> Answer:
            return _edited(answer, sha=value) if is_listing(path) else answer

        found[f"sha {value[:30]!r}"] = sha
    for value in (name for name in _BAD_NAMES if name.isprintable() and name != COMMIT.upper()):

        def commit(path: str, answer: Answer, value: str = value) -> Answer:
            headers = {**answer.headers, "X-Repo-Commit": value}
            return replace(answer, headers=headers) if _is_file(path) else answer

        def tag(path: str, answer: Answer, value: str = value) -> Answer:
            headers = {**answer.headers, "ETag": f'"{value}"'}
            return replace(answer, headers=headers) if _is_file(path) else answer

        found[f"X-Repo-Commit {value[:30]!r}"] = commit
        found[f"ETag {value[:30]!r}"] = tag
    other = "f" * 40
    found["another commit for the files"] = lambda path, answer: (
        replace(answer, headers={**answer.headers, "X-Repo-Commit": other}) if _is_file(path) else answer
    )
    found["no commit"] = lambda path, answer: _edited(answer, sha=None) if is_listing(path) else answer
    return found


def _edited(answer: Answer, **changes: object) -> Answer:
    """Other fields of a listing."""
    return replace(answer, body=json.dumps(json.loads(answer.body) | changes).encode())


def _always(value: object) -> Callable[[list[dict[str, object]]], object]:
    return lambda siblings: value


def _siblings(change: Callable[[list[dict[str, object]]], object]) -> Change:
    """Another list of files."""

    def edit(path: str, answer: Answer) -> Answer:
        if not is_listing(path):
            return answer
        siblings = json.loads(answer.body)["siblings"]
        found = change(siblings)
        return _edited(answer, siblings=siblings if found is None else found)

    return edit


def _only_listing(answer: Answer) -> Change:
    return lambda path, right: answer if is_listing(path) else right


def _listings() -> dict[str, Change]:
    """Listings that are none."""
    texts = {
        "nothing": b"", "not JSON": b"{", "HTML": b"<html>", "an array": b"[]", "null": b"null", "a number": b"7",
        "deep": b"[" * 20_000 + b"]" * 20_000, "not UTF-8": b"\xff\xfe",
        "6,000 digits": b'{"id": ' + b"9" * 6000 + b"}", "control characters": b'{"error": "\\u001b[2J"}',
    }  # fmt: skip
    found = {f"a listing: {name}": _only_listing(Answer(body=text)) for name, text in texts.items()}
    for status in (301, 302, 400, 401, 403, 404, 418, 429, 500, 502, 503):
        said = Answer(status=status, headers={"X-Error-Message": "\\e[2J"}, body=b'{"error": "\\u001b[2J"}')
        found[f"a listing: status {status}"] = _only_listing(said)
    lists: dict[str, object] = {
        "null": None,
        "a text": "x",
        "a number": 7,
        "an object": {},
        "empty": [],
        "numbers": [7],
        "nulls": [None],
    }
    for name, value in lists.items():
        found[f"a list of files: {name}"] = _siblings(_always("x" if value is None else value))
    return found


def _names() -> dict[str, Change]:
    """Names of files that lead elsewhere, in the place of the index's or a shard's."""
    found: dict[str, Change] = {}
    for value in (
        "../../x.safetensors",
        "/tmp/x.safetensors",
        "..\\x.safetensors",
        "\x1b[2J.safetensors",
        None,
        7,
        ["x"],
    ):

        def rename(siblings: list[dict[str, object]], value: object = value) -> None:
            next(entry for entry in siblings if _is_weights(str(entry["rfilename"])))["rfilename"] = value

        found[f"a file's name {value!r}"] = _siblings(rename)
    found["no config"] = _siblings(
        lambda siblings: [entry for entry in siblings if entry["rfilename"] != "config.json"]
    )
    found["no weights"] = _siblings(
        lambda siblings: [entry for entry in siblings if not _is_weights(str(entry["rfilename"]))]
    )
    return found


def _weights(change: Callable[[Answer], Answer]) -> Change:
    """Another answer for the files of weights."""
    return lambda path, answer: change(answer) if _is_weights(path) and answer.status == 200 else answer


def _bodies() -> dict[str, Change]:
    """Weights that are not those that were told."""
    return {
        "a bit flipped": _weights(lambda answer: replace(answer, body=answer.body[:-1] + bytes([answer.body[-1] ^ 1]))),
        "cut short": _weights(lambda answer: replace(answer, body=answer.body[:-9], length=str(len(answer.body)))),
        "more than was told, without a length": _weights(
            lambda answer: replace(answer, length=None, more=b"\0" * (1 << 20), times=10**6)
        ),
        "more than was told": _weights(lambda answer: replace(answer, body=answer.body + b"\0" * 999)),
        "a page": _weights(lambda answer: replace(answer, body=b"<html>")),
        "nothing": _weights(lambda answer: replace(answer, body=b"")),
        "a packed body": _weights(
            lambda answer: replace(answer, headers={**answer.headers, "Content-Encoding": "gzip"})
        ),
    }


def _of_length(text: str) -> Callable[[Answer], Answer]:
    return lambda answer: replace(answer, length=text)


def _lengths() -> dict[str, Change]:
    """Lengths that are wrong in the listing or the answer."""
    found: dict[str, Change] = {}
    sizes: tuple[object, ...] = (0, -1, 10**18, None, "x", 1.5, [], True, 7)
    for value in sizes:

        def resize(siblings: list[dict[str, object]], value: object = value) -> None:
            for entry in siblings:
                entry["size"] = value

        found[f"sizes of {value!r} in the listing"] = _siblings(resize)
    for text in ("-1", "x", "1e3", str(10**18), "0"):
        found[f"a length of {text}"] = _weights(_of_length(text))
    return found


def _ways() -> dict[str, Change]:
    """Redirects."""
    found: dict[str, Change] = {}
    for target in ("file:///etc/passwd", "/", "http://127.0.0.1:9/x", "ftp://127.0.0.1/x", "//127.0.0.1:9", "", "\\x"):

        def away(path: str, answer: Answer, target: str = target) -> Answer:
            return Answer(status=302, headers={**answer.headers, "Location": target}) if _is_file(path) else answer

        found[f"a way to {target!r}"] = away
    found["a way in circles"] = lambda path, answer: Answer(status=302, headers={**answer.headers, "Location": path})
    endless = Answer(length=None, body=b"[", more=b"7," * (1 << 19), times=10**6)
    found["a listing without end"] = _only_listing(endless)
    return found
