"""Text files are read exactly, and every fault is one line with its place."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from besa_cli.errors import BesaError
from besa_cli.text import documents
from besa_cli.text.spool import LongText, parts

TEXTS = ["first\r\ndocument ", "zweites   Dokument", "", "2020-01-01"]


def lines(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def write_parquet(path: Any, columns: dict[str, list[Any]]) -> Any:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.jsonl.gz"])
def test_json_lines_are_one_document_each(tmp_path: Path, name: str) -> None:
    data = b"\n".join([lines({"text": text, "n": 1}) for text in TEXTS])  # with blank lines between
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert list(documents.read_documents(tmp_path / name)) == TEXTS


def test_other_fields_may_be_of_any_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "a", "m": 1}, {"text": "b", "m": {"x": []}}, {"m": "s", "text": "c"}))
    assert list(documents.read_documents(path)) == ["a", "b", "c"]


def test_texts_that_look_like_dates_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "2020-01-01"}, {"text": "2020-01-01T00:00:00"}))
    assert list(documents.read_documents(path)) == ["2020-01-01", "2020-01-01T00:00:00"]


def test_a_parquet_row_is_a_document(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": list(TEXTS), "n": [1, 2, 3, 4]})
    assert list(documents.read_documents(path)) == TEXTS


def test_a_txt_is_one_document_exactly_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(" a\r\n\r\nü \n".encode())
    assert documents.read_documents(path) == [" a\r\n\r\nü \n"]


BAD = [
    ("a.txt", b"", "holds no text"),
    ("a.txt", b" \n\t\n", "holds no text"),
    ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary file, not text (NUL at byte 8)"),
    ("a.txt", "Grüße".encode("latin-1"), "not UTF-8 text (byte 2)"),
    ("a.jsonl", b"\n \n", "holds no text"),
    ("a.jsonl", lines({"text": " "}, {"text": ""}), "holds no text"),
    ("a.jsonl", lines({"text": "a"}) + b'{"text": \n', "line 2: broken JSON"),
    ("a.jsonl", lines({"text": "a"}) + b'{"text": "b"}x\n', "line 2: broken JSON"),
    ("a.jsonl", lines({"txt": "a"}), "line 1: no 'text' field (fields: txt)"),
    ("a.jsonl", lines({"text": "a"}, {"x": "b"}), "line 2: no 'text' field (fields: x)"),
    ("a.jsonl", lines({"text": "a"}, {"text": None}), "line 2: no 'text' field"),
    ("a.jsonl", lines({"text": 3}), "line 1: 'text' is not a string"),
    ("a.jsonl", lines({"text": "a"}, {"text": 3}), "line 2: 'text' is not a string"),
    ("a.jsonl", lines({"text": "a"}, {"text": "\ud800"}), "line 2: 'text' is not Unicode text"),
    ("a.jsonl", lines([1, 2]), "line 1: not a JSON object"),
    ("a.jsonl", b"\x89PNG\r\n\x1a\n\0\0", "line 1: not UTF-8"),
    ("a.jsonl", b"PK\0\0", "line 1 holds a NUL"),
    ("a.jsonl.gz", b"plain", "not a whole gzip file"),
    ("a.jsonl.gz", gzip.compress(lines({"text": "a" * 99}), mtime=0)[:-9], "not a whole gzip file"),
    ("a.parquet", b"nothing of the kind", "not a parquet file"),
    ("a.png", b"x", "cannot tell what"),
    ("noending", b"x", "cannot tell what"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(BesaError) as caught:
        documents.read_documents(path)
    assert str(path) in caught.value.message
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sentence": ["a"]}, "no column 'text' (columns: sentence)"),
        ({"text": [1, 2]}, "column 'text' holds int64, not strings"),
        ({"text": ["a", None]}, "a row of column 'text' is null"),
        ({"text": ["", " "]}, "holds no text"),
    ],
)
def test_a_parquet_file_without_text_is_refused(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(BesaError) as caught:
        documents.read_documents(path)
    assert message in caught.value.message


def test_missing_files_and_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(BesaError, match=r"no file .*gone\.txt"):
        documents.read_documents(tmp_path / "gone.txt")
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(BesaError, match="is not a file"):
        documents.read_documents(tmp_path / "a.txt")


NAMES = ["a[1]", "a*", "a?", "a::b", "a b", "a#b", "a%20b", "hf:a", "~a", "{a,b}", "-a", os.fsdecode(b"caf\xe9")]


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_the_file_that_is_named_is_read_whatever_its_name(tmp_path: Path, name: str, kind: str) -> None:
    """Also where a pattern of that name would find others."""
    for folder, text in ((tmp_path / name, "right"), (tmp_path / "a1", "wrong"), (tmp_path / "a", "wrong")):
        folder.mkdir(exist_ok=True)
        for file in (name, "a1", "a"):
            path = folder / f"{file}{kind}"
            said = text if file == name else "wrong"
            if kind == ".parquet":
                with path.open("wb") as sink:
                    write_parquet(sink, {"text": [said]})
            else:
                data = said.encode() if kind == ".txt" else lines({"text": said})
                path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    path = tmp_path / name / f"{name}{kind}"
    assert list(documents.read_documents(path)) == ["right"]
    assert documents.looks_like_file(str(path))
    documents.printable(path.name).encode("utf-8")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone \xef\xbb\xbf two")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    assert documents.read_documents(tmp_path / "a.txt") == ["one \ufeff two"]  # only the one at the start
    assert list(documents.read_documents(tmp_path / "a.jsonl")) == ["one"]


def test_a_long_text_is_read_in_parts_and_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\ufeff" + "".join(chr(number) for number in range(1, 0x11000) if not 0xD800 <= number < 0xE000)
    (tmp_path / "a.txt").write_bytes(text.encode())
    (whole,) = documents.read_documents(tmp_path / "a.txt")
    for held, part in ((1, 1), (1, 7), (1, 4096), (1 << 20, 13)):
        monkeypatch.setattr(documents, "_HELD", held)
        monkeypatch.setattr(documents, "_PART", part)
        (found,) = documents.read_documents(tmp_path / "a.txt")
        assert isinstance(found, LongText) == (held == 1)
        assert "".join(parts(found)) == whole == text[1:]
        assert "".join(parts(documents.joined([found, "", found], "--"))) == f"{whole}----{whole}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ab\xff", "not UTF-8 text (byte 2)"),
        ("aé".encode()[:-1], "not UTF-8 text (byte 1)"),
        (b"abc\0", "NUL at byte 3"),
        (b" \n\t ", "holds no text"),
        ("text".encode("utf-16"), "is UTF-16 text"),
    ],
)
@pytest.mark.parametrize("part", [1, 2, 3, 1000])
def test_the_place_of_a_fault_does_not_hang_on_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int, data: bytes, message: str
) -> None:
    monkeypatch.setattr(documents, "_HELD", 1)
    monkeypatch.setattr(documents, "_PART", max(part, 2) if b"\xff\xfe" in data else part)
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(BesaError) as caught:
        documents.read_documents(tmp_path / "a.txt")
    assert message in caught.value.message


def test_files_that_may_not_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of another user: root, as whom tests may run, is refused nothing."""
    path = tmp_path / "a.txt"
    path.write_text("text")
    opening = Path.open

    def forbidden(self: Path, *words: Any, **more: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied")
        return opening(self, *words, **more)

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(BesaError, match=r"cannot read .*a\.txt: Permission denied"):
        documents.check_file(path)


def test_names_that_no_file_can_have_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(BesaError, match="File name too long"):
        documents.check_file(tmp_path / ("x" * 300 + ".txt"))
    (tmp_path / "round.txt").symlink_to("round.txt")
    with pytest.raises(BesaError, match=r"round\.txt"):
        documents.check_file(tmp_path / "round.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    with pytest.raises(BesaError, match=r"gone\.txt is a broken link"):
        documents.check_file(tmp_path / "gone.txt")


def test_a_home_that_is_not_there_leaves_the_name_as_it_is() -> None:
    assert documents.local_path("~no-such-user/a.txt") == Path("~no-such-user/a.txt")
    assert documents.local_path("./~/a.txt") == Path("./~/a.txt")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_in_a_files_place_below_the_data_directory_is_not_passed_over(tmp_path: Path, make: Any) -> None:
    assert documents.first_file(tmp_path, ["one", "two"]) is None
    assert documents.first_file(None, ["one", "two"]) is None
    (tmp_path / "two").write_text("text")
    assert documents.first_file(tmp_path, ["one", "two"]) == tmp_path / "two"
    make(tmp_path / "one")
    with pytest.raises(BesaError, match="one is not a file"):
        documents.first_file(tmp_path, ["one", "two"])


def test_nothing_is_left_in_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "a"}))
    assert list(documents.read_documents(path)) == ["a"]
    assert list((tmp_path / "tmp").iterdir()) == []
