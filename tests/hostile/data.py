"""Data files: texts, JSON lines, parquet, compressed ones, token rows, and the paths that name them."""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from hostile.base import FLOAT, PPL
from hostile.frame import Case, Expectation, Judged, accepted, either, line, refused

_PRUNE = ("prune", "--model", "m", "--method", "wanda", "--samples", "2", "--seqlen", "16", *FLOAT, "--run", "r")
_TEXT = " ".join(f"w{3 + number * 7 % 120}" for number in range(200))
_LARGE = 300 << 20  # bytes that a bomb expands to
_DEEP = "[" * 50_000 + "]" * 50_000
_DIGITS = "9" * 6000

Content = Callable[[], bytes]


def cases(base: Path) -> Iterator[Case]:
    """All of them."""
    for name, (file, content, expect) in {**_texts(), **_json_lines(), **_rows(), **_parquets(), **_packed()}.items():
        kind = f"data: {'token rows' if name in _rows() else Path(file.removesuffix('.gz')).suffix}"
        yield _case(kind, name, file, content, expect)
    yield from _places()
    yield from _paths()


def _case(kind: str, name: str, file: str, content: Content, expect: Expectation) -> Case:
    """A file that `prune` draws from; a text is measured, too."""
    lines = [line(*_PRUNE, "--data", file)]
    if file.endswith(".txt"):
        lines.append(line(PPL[0], PPL[1], file, *PPL[3:], "--model", "m", "--limit", "20"))
    return Case(
        kind=kind,
        name=name,
        harm=lambda place: (place / file).write_bytes(content()),
        lines=tuple(lines),
        expect=expect,
    )


def _same_text(judged: Judged) -> str:
    """The perplexity is that of the plain text."""
    found = json.loads(judged.seen[-1].out)["results"][0]["perplexity"]
    return (
        "" if found == judged.whole.perplexity else f"perplexity {found}, of the plain text {judged.whole.perplexity}"
    )


def _texts() -> dict[str, tuple[str, Content, Expectation]]:
    contents: dict[str, tuple[Content, Expectation]] = {
        "a byte order mark": (lambda: b"\xef\xbb\xbf" + _TEXT.encode(), accepted(_same_text)),
        "lines that end in CR LF": (lambda: _TEXT.replace(" ", "\r\n").encode(), accepted(_same_text)),
        "no text": (lambda: b"", refused("x.txt")),
        "spaces": (lambda: b" \n" * 99, refused("x.txt")),
        "one word": (lambda: b"w5", refused()),
        "UTF-16": (lambda: _TEXT.encode("utf-16"), refused("x.txt")),
        "Latin-1": (lambda: ("é " * 99).encode("latin-1"), refused("x.txt")),
        "cut in a character": (lambda: (_TEXT + " é").encode()[:-1], refused("x.txt")),
        "a surrogate": (lambda: _TEXT.encode() + b"\xed\xa0\x80", refused("x.txt")),
        "NUL": (lambda: _TEXT.encode() + b"\0", either(lambda judged: "", "x.txt")),
        "a program": (lambda: Path("/bin/true").read_bytes(), refused("x.txt")),
        "control characters": (lambda: _TEXT.encode() + b" \x1b[2J\x07 w5", either()),
        "one line of 50 MB": (lambda: b"w5 " * ((50 << 20) // 3), either()),
        "one word of 20 MB": (lambda: _TEXT.encode() + b" " + b"w" * (20 << 20), either()),
        "20 MB of lines": (lambda: (_TEXT.encode() + b"\n") * 25_000, either()),
    }
    return {name: ("x.txt", *found) for name, found in contents.items()}


def _json_lines() -> dict[str, tuple[str, Content, Expectation]]:
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
        "columns of other types": "".join(json.dumps({"text": _TEXT, "a": value}) + "\n" for value in (1, "b", [])),
        "the text twice": f'{{"text": "w5", "text": "{_TEXT}"}}\n' * 3,
        "a lone surrogate": '{"text": "\\ud800 ' + _TEXT + '"}\n',
        "a NUL": '{"text": "\\u0000 ' + _TEXT + '"}\n',
        "one array of all": f"[{good}, {good}]",
        "an object over many lines": json.dumps({"text": _TEXT}, indent=2),
        "empty lines": f"\n\n{good}\n\n",
        "a line of 50 MB": json.dumps({"text": "w5 " * ((50 << 20) // 3)}) + "\n",
        "lines of nothing but spaces": "   \n" * 9,
        "a field with control characters": '{"\\u001b[2J": 1}\n' * 3,
    }
    found = {name: ("x.jsonl", lambda text=text: text.encode(), either()) for name, text in documents.items()}  # type: ignore[misc]
    broken = (
        "no text field",
        "a list in a line",
        "a number in a line",
        "null in a line",
        "a deep line",
        "a broken line",
    )
    return {
        name: (file, content, refused("x.jsonl") if name in broken else expect)
        for name, (file, content, expect) in found.items()
    }


def _rows() -> dict[str, tuple[str, Content, Expectation]]:
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
    found: dict[str, tuple[str, Content, Expectation]] = {}
    for name, row in rows.items():
        text = json.dumps({"input_ids": good}) + "\n" + json.dumps({"input_ids": row}) + "\n"
        found[f"a row with {name}"] = ("x.jsonl", lambda text=text: text.encode(), refused("x.jsonl", "line 2"))  # type: ignore[misc]
    masks: dict[str, object] = {
        "padding at the end": [1] * 12 + [0] * 4,
        "padding at the start": [0] * 4 + [1] * 12,
        "nothing but padding": [0] * 16,
        "a mask that is too short": [1] * 15,
        "a mask of texts": ["1"] * 16,
        "a mask that is null": None,
        "a mask of other numbers": [7] * 16,
    }
    for name, mask in masks.items():
        text = (json.dumps({"input_ids": good, "attention_mask": mask}) + "\n") * 2
        found[name] = ("x.jsonl", lambda text=text: text.encode(), refused("x.jsonl"))  # type: ignore[misc]
    whole = (json.dumps({"input_ids": good, "attention_mask": [1] * 16}) + "\n") * 2
    found["a mask of ones"] = ("x.jsonl", lambda: whole.encode(), accepted())
    return found


def _parquet(**columns: object) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return bytes(sink.getvalue())


def _parquets() -> dict[str, tuple[str, Content, Expectation]]:
    whole = _parquet(text=[_TEXT] * 3)
    contents: dict[str, tuple[Content, Expectation]] = {
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
    return {f"parquet: {name}": ("x.parquet", *found) for name, found in contents.items()}


def _packed() -> dict[str, tuple[str, Content, Expectation]]:
    good = (json.dumps({"text": _TEXT}) + "\n").encode() * 3
    contents: dict[str, tuple[Content, Expectation]] = {
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
    return {f"packed: {name}": ("x.jsonl.gz", *found) for name, found in contents.items()}


def _places() -> Iterator[Case]:
    """What a data file may be instead of a file."""
    made: dict[str, Callable[[Path], object]] = {
        "a pipe": os.mkfifo,
        "a directory": Path.mkdir,
        "a link to a device without end": lambda path: path.symlink_to("/dev/zero"),
        "a link to a terminal": lambda path: path.symlink_to("/dev/tty"),
        "a link to nothing": lambda path: path.symlink_to("nowhere"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "missing": lambda path: None,
    }
    for suffix in (".txt", ".jsonl", ".parquet", ".jsonl.gz"):
        for name, make in made.items():

            def harm(place: Path, suffix: str = suffix, make: Callable[[Path], object] = make) -> None:
                make(place / f"x{suffix}")

            lines = (line(*_PRUNE, "--data", f"x{suffix}"),)
            yield Case(
                kind="what a data file is",
                name=f"x{suffix}: {name}",
                harm=harm,
                lines=lines,
                expect=refused(f"x{suffix}"),
            )
    for name in ("pipe.txt", "folder.txt"):

        def put(place: Path) -> None:
            os.mkfifo(place / "pipe.txt")
            (place / "folder.txt").mkdir()

        lines = (line("eval", "ppl", name, "--model", "m", "--seqlen", "16"),)
        yield Case(kind="what a data file is", name=f"{name}: eval ppl", harm=put, lines=lines, expect=refused(name))


def _paths() -> Iterator[Case]:
    """Names that other programs take for patterns, addresses or options, beside files that a pattern finds."""
    names = (
        "[a].txt",
        "*.txt",
        "a?.txt",
        "a::b.txt",
        "{a,b}.txt",
        "a b.txt",
        "~.txt",
        "$HOME.txt",
        "a%20b.txt",
        "a#b.txt",
        "é.txt",
        "a'b\".txt",
        "hf:a.txt",
        "a\\b.txt",
        "-a.txt",
        "\x1b[2J.txt",
        "a\nb.txt",
        "\udcff.txt",
        "zip:a.txt",
        "s3:a.txt",
    )
    for name in names:
        for suffix in (".txt", ".jsonl"):
            own = name.replace(".txt", suffix)

            def harm(place: Path, own: str = own, suffix: str = suffix) -> None:
                for each, text in ((own, _TEXT), (f"a{suffix}", "w9 " * 200), (f"ab{suffix}", "w9 " * 200)):
                    (place / each).write_text(text if suffix == ".txt" else json.dumps({"text": text}))

            words = (
                (line(*_PRUNE, "--data", f"./{own}"),)
                if suffix == ".jsonl"
                else (line(PPL[0], PPL[1], f"./{own}", *PPL[3:], "--model", "m"),)
            )
            expect = accepted() if suffix == ".jsonl" else accepted(_same_text)
            yield Case(kind="paths of data", name=repr(own), harm=harm, lines=words, expect=expect)
