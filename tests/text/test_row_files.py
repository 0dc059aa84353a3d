"""Rows of files that strangers made: whatever is wrong is one line with its place, and nothing takes all memory."""

import gzip
import itertools
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from besa_cli.errors import BesaError
from besa_cli.text import row_files


def read(path: Path) -> list[tuple[int, row_files.Row]]:
    rows = row_files.parquet_rows(path) if path.suffix == ".parquet" else row_files.json_lines(path)
    return list(rows)


def refusal(path: Path) -> str:
    with pytest.raises(BesaError) as caught:
        read(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 700
    assert caught.value.hint
    return caught.value.message


BAD_LINES = [
    (b'{"a": ' + b"9" * 5000 + b"}", "line 2: broken JSON (Exceeds the limit (4300 digits)"),
    (b'{"a": -' + b"9" * 5000 + b"}", "line 2: broken JSON"),
    (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 2: broken JSON"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "line 2: broken JSON"),
    (b'"only a text"', "line 2: not a JSON object"),
    (b"null", "line 2: not a JSON object"),
    (b'\xef\xbb\xbf{"a": 1}', "line 2: broken JSON"),
    (b'{"a": "\xc3"}', "line 2: not UTF-8"),
    (b'{"a": "\0"}', "line 2 holds a NUL"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + line + b"\n")
    assert message in refusal(tmp_path / "a.jsonl")


@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_marks_line_ends_and_blank_lines_are_no_part_of_the_rows(tmp_path: Path, mark: bytes, ends: bytes) -> None:
    data = mark + ends.join([b'{"a": 1}', b"", b'{"a": 2}'])
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert read(tmp_path / name) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings_are_named_with_the_way_out(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"a": 1}\n'.encode(encoding))
    assert f"is {encoding.upper()} text, not UTF-8" in refusal(tmp_path / "a.jsonl")


def test_twenty_thousand_fields_are_read_and_never_all_printed(tmp_path: Path) -> None:
    row = {f"field-{number}": number for number in range(20_000)}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert read(tmp_path / "a.jsonl") == [(1, row)]
    assert row_files.names(row).endswith("field-7 and 19992 more")
    assert row_files.names(["x" * 10_000]) == "x" * 39 + "…"
    assert row_files.names([]) == "none"


def test_a_line_of_any_length_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "LONGEST_LINE", 1000)
    whole = json.dumps({"a": "x" * 991}).encode()
    assert len(whole) == 1000
    (tmp_path / "a.jsonl").write_bytes(whole[:-2] + b'"}')
    assert len(read(tmp_path / "a.jsonl")) == 1
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + b"x" * 50_000_000)
    tracemalloc.start()
    assert "line 2: longer than" in refusal(tmp_path / "a.jsonl")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_a_file_that_unpacks_to_far_more_than_text_does_is_refused_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "SMALL", 1 << 20)
    path, line = tmp_path / "bomb.jsonl.gz", json.dumps({"a": "x" * 980}).encode() + b"\n"
    path.write_bytes(gzip.compress(line * 20_000))
    lines = row_files.json_lines(path)
    for _ in range(1000):
        next(lines)
    left = (number for number, _ in lines)
    with pytest.raises(BesaError, match=r"bomb\.jsonl\.gz unpacks to more than"):
        list(itertools.takewhile(lambda number: number <= 100 * path.stat().st_size / len(line) + 1, left))
    path.write_bytes(gzip.compress(line * 1000))  # small, whatever its ratio
    assert len(read(path)) == 1000


def test_a_parquet_file_that_unpacks_to_far_more_is_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"a": ["x" * 1000 + str(number) for number in range(5000)]})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert len(read(path)) == 5000
    monkeypatch.setattr(row_files, "SMALL", 1 << 20)
    assert "unpacks to 4 MiB" in refusal(path)


@pytest.mark.parametrize("damage", ["cut", "nothing", "header only", "middle"])
def test_damaged_parquet_files_are_named(tmp_path: Path, damage: str) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [f"text {number}" for number in range(1000)]}), path)
    data = path.read_bytes()
    middle = data[:40] + bytes(200) + data[240:]
    path.write_bytes({"cut": data[:-9], "nothing": b"x" * 99, "header only": b"PAR1", "middle": middle}[damage])
    assert "is not a whole parquet file" in refusal(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_what_is_not_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "is a pipe, not a file" in refusal(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert "is a directory, not a file" in refusal(tmp_path / name)
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to("/dev/zero")
    assert "is a device, not a file" in refusal(tmp_path / name)


def test_only_whole_characters_are_text() -> None:
    assert row_files.is_unicode("é\U0001f642\0")
    assert not row_files.is_unicode("\ud800")
