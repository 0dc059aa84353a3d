"""Text files are read exactly, and every fault is one line with its place."""

import gzip
import json
from pathlib import Path

import pytest

from besa_cli import documents
from besa_cli.errors import BesaError

TEXTS = ["first\r\ndocument ", "zweites   Dokument", "", "2020-01-01"]


def lines(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def write_parquet(path: Path, columns: dict[str, list[object]]) -> Path:
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


def test_reading_says_nothing_and_leaves_the_library_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets

    before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "a"}) + b"{")
    with pytest.raises(BesaError):
        documents.read_documents(path)
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before
    assert capfd.readouterr() == ("", "")


def test_nothing_is_left_in_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "a"}))
    assert list(documents.read_documents(path)) == ["a"]
    assert list((tmp_path / "tmp").iterdir()) == []
