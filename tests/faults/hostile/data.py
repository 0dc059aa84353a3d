"""Data files: texts, JSON lines, parquet, compressed ones, token rows, and the paths that name them."""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
from faults.hostile.base import FLOAT, PPL
from faults.hostile.frame import Case, Expectation, Harm, Judged, Line, accepted, either, fine, line, refused, several
from faults.hostile.harms import written

_PRUNE = ("prune", "--model", "m", "--method", "wanda", "--samples", "2", "--seqlen", "16", *FLOAT, "--run", "r")
_TEXT = " ".join(f"w{3 + number * 7 % 120}" for number in range(200))
_LARGE = 300 << 20  # bytes that a bomb expands to
_DEEP = "[" * 50_000 + "]" * 50_000
_DIGITS = "9" * 6000
_ODD: tuple[object, ...] = (1, "b", [])

Content = Callable[[], bytes]
Contents = dict[str, tuple[Content, Expectation]]


def cases(base: Path) -> Iterator[Case]:
    """All of them."""
    for kind, file, contents in (
        ("data: text", "x.txt", _texts()),
        ("data: JSON lines", "x.jsonl", _json_lines()),
        ("data: token rows", "x.jsonl", _rows()),
        ("data: parquet", "x.parquet", _parquets()),
        ("data: packed JSON lines", "x.jsonl.gz", _packed()),
    ):
        for name, (content, expect) in contents.items():
            yield from several(kind, {name: written(file, content)}, *_lines(file), expect=expect)
    yield from _places()
    yield from _paths()


def _measure(file: str) -> tuple[str, ...]:
    return (PPL[0], PPL[1], file, *PPL[3:], "--model", "m", "--limit", "20")


def _lines(file: str) -> list[Line]:
    """A file that `prune` draws from; a text is measured, too."""
    return [line(*_PRUNE, "--data", file), *([line(*_measure(file))] if file.endswith(".txt") else [])]


def _same_text(judged: Judged) -> str:
    """The perplexity is that of the plain text."""
    found, whole = json.loads(judged.seen[-1].out)["results"][0]["perplexity"], judged.whole.perplexity
    return "" if found == whole else f"perplexity {found}, of the plain text {whole}"


def _texts() -> Contents:
    return {
        "a byte order mark": (lambda: b"\xef\xbb\xbf" + _TEXT.encode(), accepted(_same_text)),
        "lines that end in CR LF": (lambda: _TEXT.replace(" ", "\r\n").encode(), accepted(_same_text)),
        "no text": (lambda: b"", refused("x.txt")),
        "spaces": (lambda: b" \n" * 99, refused("x.txt")),
        "one word": (lambda: b"w5", refused()),
        "UTF-16": (lambda: _TEXT.encode("utf-16"), refused("x.txt")),
        "Latin-1": (lambda: ("é " * 99).encode("latin-1"), refused("x.txt")),
        "cut in a character": (lambda: (_TEXT + " é").encode()[:-1], refused("x.txt")),
        "a surrogate": (lambda: _TEXT.encode() + b"\xed\xa0\x80", refused("x.txt")),
        "NUL": (lambda: _TEXT.encode() + b"\0", either(fine, "x.txt")),
        "a program": (lambda: Path("/bin/true").read_bytes(), refused("x.txt")),
        "control characters": (lambda: _TEXT.encode() + b" \x1b[2J\x07 w5", either()),
        "one line of 12 MB": (lambda: b"w5 " * (4 << 20), either()),
        "one word of 20 MB": (lambda: _TEXT.encode() + b" " + b"w" * (20 << 20), either()),
        "12 MB of lines": (lambda: (_TEXT.encode() + b"\n") * 15_000, either()),
    }


def _json_lines() -> Contents:
    good = json.dumps({"text": _TEXT})
    documents = {
        "a broken line": good + '\n{"text": ',
        "no text field": '{"words": "w5"}\n' * 9,
        "a text that is null": f'{good}\n{{"text": null}}',
        "a text that is a number": '{"text": 7}\n' * 9,
        "a text that is a list": '{"text": ["w5"]}\n' * 9,
        "texts that are empty": '{"text": ""}\n' * 9,
        "a list in a line": "[1, 2]\n" * 9,
        "a number in a line": "7\n" * 9,
        "null in a line": "null\n" * 9,
        "a deep line": f'{{"text": {_DEEP}}}\n',
        "a deep field beside the text": f'{{"text": "{_TEXT}", "more": {_DEEP}}}\n' * 3,
        "a number of 6,000 digits": f'{{"text": "{_TEXT}", "more": {_DIGITS}}}\n' * 3,
        "NaN beside the text": f'{{"text": "{_TEXT}", "more": NaN}}\n' * 3,
        "20,000 columns": json.dumps({"text": _TEXT, **{f"c{number}": number for number in range(20_000)}}) + "\n",
        "other columns in every line": "".join(
            json.dumps({"text": _TEXT, f"c{number}": 1}) + "\n" for number in range(300)
        ),
        "columns of other types": "".join(json.dumps({"text": _TEXT, "a": value}) + "\n" for value in _ODD),
        "the text twice": f'{{"text": "w5", "text": "{_TEXT}"}}\n' * 3,
        "a lone surrogate": '{"text": "\\ud800 ' + _TEXT + '"}\n',
        "a NUL": '{"text": "\\u0000 ' + _TEXT + '"}\n',
        "one array of all": f"[{good}, {good}]",
        "an object over many lines": json.dumps({"text": _TEXT}, indent=2),
        "empty lines": f"\n\n{good}\n\n",
        "a line of 12 MB": json.dumps({"text": "w5 " * (4 << 20)}) + "\n",
        "lines of nothing but spaces": "   \n" * 9,
        "a field with control characters": '{"\\u001b[2J": 1}\n' * 3,
    }
    broken = (
        "no text field", "a list in a line", "a number in a line", "null in a line", "a deep line", "a broken line",
    )  # fmt: skip
    return {name: (text.encode, refused("x.jsonl") if name in broken else either()) for name, text in documents.items()}


def _rows() -> Contents:
    good = list(range(5, 21))
    rows: dict[str, object] = {
        "a negative token": [-1, *good[1:]],
        "a token beyond the vocabulary": [128, *good[1:]],
        "a token of 10^30": [10**30, *good[1:]],
        "a fraction": [5.5, *good[1:]],
        "a text": ["5", *good[1:]],
        "true": [True, *good[1:]],
        "null": [None, *good[1:]],
        "a list": [[5], *good[1:]],
        "no tokens": [],
        "a number alone": 5,
        "a text alone": "5 6 7",
        "nothing": None,
        "an object": {"0": 5},
        "too few": good[:-1],
    }
    masks: dict[str, object] = {
        "padding at the end": [1] * 12 + [0] * 4,
        "padding at the start": [0] * 4 + [1] * 12,
        "nothing but padding": [0] * 16,
        "a mask that is too short": [1] * 15,
        "a mask of texts": ["1"] * 16,
        "a mask of other numbers": [7] * 16,
    }
    no_padding = {"a mask of ones": [1] * 16, "a mask that is null": None}
    found: Contents = {}
    for name, row in rows.items():
        text = f"{json.dumps({'input_ids': good})}\n{json.dumps({'input_ids': row})}\n"
        found[f"a row with {name}"] = (text.encode, refused("x.jsonl", "line 2"))
    for name, mask in {**masks, **no_padding}.items():
        text = f"{json.dumps({'input_ids': good, 'attention_mask': mask})}\n" * 2
        found[name] = (text.encode, accepted() if name in no_padding else refused("x.jsonl"))
    return found


def _parquet(**columns: object) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return bytes(sink.getvalue())


def _parquets() -> Contents:
    whole = _parquet(text=[_TEXT] * 3)
    return {
        "texts": (lambda: whole, accepted()),
        "no rows": (lambda: _parquet(text=pyarrow.array([], pyarrow.string())), refused("x.parquet")),
        "no text column": (lambda: _parquet(words=[_TEXT] * 3), refused("x.parquet")),
        "a column of numbers": (lambda: _parquet(text=[1, 2, 3]), refused("x.parquet")),
        "a column of lists": (lambda: _parquet(text=[[_TEXT]] * 3), refused("x.parquet")),
        "a column of nulls": (lambda: _parquet(text=pyarrow.nulls(3)), refused("x.parquet")),
        "a null among texts": (lambda: _parquet(text=[_TEXT, None, _TEXT]), either()),
        "bytes that are not UTF-8": (lambda: _parquet(text=[b"\xff\xfe"] * 3), refused("x.parquet")),
        "5,000 columns": (
            lambda: _parquet(text=[_TEXT] * 3, **{f"c{number}": [1] * 3 for number in range(5000)}),
            either(),
        ),
        "cut short": (lambda: whole[:-20], refused("x.parquet")),
        "cut after 4 bytes": (lambda: whole[:4], refused("x.parquet")),
        "a footer of 2 GB": (lambda: whole[:-8] + b"\xff\xff\xff\x7fPAR1", refused("x.parquet")),
        "garbage in its pages": (lambda: whole[:8] + b"\xa5" * 200 + whole[208:], refused("x.parquet")),
        "garbage in its footer": (lambda: whole[:-200] + b"\xa5" * 192 + whole[-8:], refused("x.parquet")),
        "JSON lines under the name": (lambda: json.dumps({"text": _TEXT}).encode(), refused("x.parquet")),
        "an empty file": (lambda: b"", refused("x.parquet")),
    }


def _packed() -> Contents:
    good = (json.dumps({"text": _TEXT}) + "\n").encode() * 3
    return {
        "JSON lines": (lambda: gzip.compress(good), accepted()),
        "cut short": (lambda: gzip.compress(good)[:-9], refused("x.jsonl.gz")),
        "a wrong checksum": (lambda: gzip.compress(good)[:-8] + b"\0" * 8, refused("x.jsonl.gz")),
        "a header alone": (lambda: gzip.compress(good)[:10], refused("x.jsonl.gz")),
        "not packed": (lambda: good, refused("x.jsonl.gz")),
        "no bytes": (lambda: b"", refused("x.jsonl.gz")),
        "garbage behind it": (lambda: gzip.compress(good) + b"garbage", either()),
        "packed twice": (lambda: gzip.compress(gzip.compress(good)), refused("x.jsonl.gz")),
        "a line of 300 MB": (lambda: gzip.compress(b'{"text": "' + b"w" * _LARGE, 1), refused("x.jsonl.gz")),
        "spaces of 300 MB": (lambda: gzip.compress(b" " * _LARGE, 1), refused("x.jsonl.gz")),
        "100,000 empty members": (lambda: gzip.compress(b"") * 100_000, refused("x.jsonl.gz")),
    }


_MADE: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a directory": Path.mkdir,
    "a link to a device without end": lambda path: path.symlink_to("/dev/zero"),
    "a link to a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "missing": lambda path: None,
}


def _places() -> Iterator[Case]:
    """What a data file may be instead of a file."""
    for file in ("x.txt", "x.jsonl", "x.parquet", "x.jsonl.gz"):
        harms: dict[str, Harm] = {
            f"{file}: {name}": lambda place, make=make, file=file: make(place / file)  # type: ignore[misc]
            for name, make in _MADE.items()
        }
        yield from several("what a data file is", harms, line(*_PRUNE, "--data", file), expect=refused(file))
        if file == "x.txt":
            measured = {f"{name}, measured": harm for name, harm in harms.items()}
            yield from several("what a data file is", measured, line(*_measure(file)), expect=refused(file))


_NAMES = (
    "[a]", "*", "a?", "a::b", "{a,b}", "a b", "~", "$HOME", "a%20b", "a#b", "é", "a'b\"", "hf:a", "a\\b", "-a",
    "\x1b[2J", "a\nb", "\udcff", "zip:a", "s3:a",
)  # fmt: skip


def _beside_others(name: str, suffix: str) -> Harm:
    """A file of this name, and others that it may be taken for."""

    def harm(place: Path) -> None:
        for each, text in ((name, _TEXT), ("a", "w9 " * 200), ("ab", "w9 " * 200)):
            (place / f"{each}{suffix}").write_text(text if suffix == ".txt" else json.dumps({"text": text}))

    return harm


def _paths() -> Iterator[Case]:
    """Names that other programs take for patterns, addresses or options, beside files that a pattern finds."""
    for name in _NAMES:
        text, lines = ({repr(f"{name}{suffix}"): _beside_others(name, suffix)} for suffix in (".txt", ".jsonl"))
        yield from several("paths of data", text, line(*_measure(f"./{name}.txt")), expect=accepted(_same_text))
        yield from several("paths of data", lines, line(*_PRUNE, "--data", f"./{name}.jsonl"), expect=accepted())
