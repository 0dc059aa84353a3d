"""Wrong values for every field of a JSON document."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults.hostile.frame import Case, Expectation, Line, either

Step = str | int

_DEPTH = 20_000  # beyond what parsers follow
_HERE = "@the wrong value@"

WRONG = {
    "missing": None,
    "null": "null",
    "a text": '"seven"',
    "true": "true",
    "negative": "-7",
    "huge": str(10**18),
    "a fraction": "0.37",
    "NaN": "NaN",
    "infinite": "1e999",
    "a list": "[]",
    "an object": "{}",
    "deep": "[" * _DEPTH + "]" * _DEPTH,
    "of 6,000 digits": "9" * 6000,
    "control characters": json.dumps("\x1b]0;owned\x07\x1b[2J\u202e"),
}  # JSON texts


def fields(document: Any, *, most: int = 2) -> Iterator[tuple[Step, ...]]:
    """The place of every value in a document, the first few of an array and of what maps names to texts or numbers."""
    if not isinstance(document, dict | list):
        return
    pairs: list[tuple[Step, Any]] = list(document.items() if isinstance(document, dict) else enumerate(document))
    long = isinstance(document, list) or (len(pairs) > most and len({type(value) for _, value in pairs}) == 1)
    for step, value in pairs[:most] if long else pairs:
        yield (step,)
        for below in fields(value, most=most):
            yield (step, *below)


def named(place: tuple[Step, ...]) -> str:
    """A place in words."""
    return ".".join(str(step) for step in place)


def with_wrong(document: Any, place: tuple[Step, ...], wrong: str) -> str:
    """The JSON text of a document in which one value is wrong."""
    changed = json.loads(json.dumps(document))
    holder = changed
    for step in place[:-1]:
        holder = holder[step]
    if WRONG[wrong] is None:
        del holder[place[-1]]
    else:
        holder[place[-1]] = _HERE
    return json.dumps(changed, indent=1).replace(json.dumps(_HERE), str(WRONG[wrong]))


def cases(base: Path, name: str, kind: str, check: Expectation, *lines: Line, said: str = "") -> Iterator[Case]:
    """Every field of a JSON file of the base material × every wrong value; a refusal holds `said`, or its name."""
    document = json.loads((base / name).read_text())
    for place in fields(document):
        for wrong in WRONG:

            def harm(where: Path, field: tuple[Step, ...] = place, wrong: str = wrong) -> None:
                (where / name).write_text(with_wrong(json.loads((where / name).read_text()), field, wrong))

            file = Path(name).name
            words = f"{file}: {named(place)} {wrong}"
            yield Case(kind=kind, name=words, harm=harm, lines=lines, expect=either(check, said or file))
