"""What each name stands for, where it is looked for, and what takes its place."""

import gzip
import hashlib
import json
from importlib import resources
from pathlib import Path

import pytest
from support.joined_text import joined

from besa_cli.errors import BesaError, UsageError
from besa_cli.text import corpora, documents, hub_files

CLOSED = hub_files.Hub(endpoint="http://127.0.0.1:9", offline=False, timeout=5)
OFFLINE = hub_files.Hub(endpoint="http://127.0.0.1:9", offline=True)


def opened(name: str, data_dir: Path | None = None, hub: hub_files.Hub = OFFLINE) -> corpora.Corpus:
    return corpora.open_source(name, data_dir=data_dir, hub=hub, notify=pytest.fail)


# --- bundled text


@pytest.mark.parametrize("name", corpora.BUNDLED)
def test_bundled_bytes_are_the_ones_stated(name: str) -> None:
    assert hashlib.sha256(corpora.bundled_bytes(name)).hexdigest() == corpora.BUNDLED[name]


def test_every_bundled_file_has_its_licence_and_nothing_else_is_there() -> None:
    folder = resources.files("besa_cli") / "data"
    licences = (folder / "LICENSES.md").read_text(encoding="utf-8")
    names = {item.name for item in folder.iterdir()}
    assert names == {f"{name}.gz" for name in corpora.BUNDLED} | {"LICENSES.md"}
    for name in corpora.BUNDLED:
        assert f"{name}.gz" in licences


def test_damaged_bundled_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "moby_dick.txt.gz").write_bytes(gzip.compress(b"Call me Ahab."))
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    with pytest.raises(BesaError, match=r"moby_dick\.txt is damaged"):
        corpora.bundled_bytes("moby_dick.txt")
    with pytest.raises(BesaError, match=r"pride_and_prejudice\.txt cannot be read"):
        corpora.bundled_bytes("pride_and_prejudice.txt")


def test_the_bundled_sample_is_a_thousand_documents(tmp_path: Path) -> None:
    corpus = opened("bundled")
    assert (corpus.source, corpus.asked, corpus.note) == ("bundled", "bundled", None)
    assert len(corpus.documents) == 1000
    assert joined(corpus.documents[0]).startswith("Beginners BBQ Class")
    path = tmp_path / corpus.file  # a second reader: `datasets`
    path.write_bytes(corpora.bundled_bytes(corpus.file))
    assert list(documents.read_documents(path)) == corpus.documents


def test_a_bundled_book_is_one_document() -> None:
    assert len(corpora.BOOKS) == 5
    (text,) = corpora.book("moby_dick.txt", "bundled").documents
    assert "Call me Ishmael" in joined(text)


# --- named data sets


def write_c4(directory: Path) -> None:
    rows = [{"text": "one", "url": "u", "timestamp": "2019-04-25T12:57:54Z"}, {"text": "two\n", "url": "v"}]
    directory.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (directory / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(data))


@pytest.mark.parametrize("folder", [".", "en"])
def test_a_local_shard_of_c4_comes_first(tmp_path: Path, folder: str) -> None:
    write_c4(tmp_path / folder)
    corpus = opened("c4", tmp_path)
    assert list(corpus.documents) == ["one", "two\n"]
    assert (corpus.source, corpus.file) == ("local", "c4-train.00000-of-01024.json.gz")
    assert corpus.digest == hashlib.sha256((tmp_path / folder / corpus.file).read_bytes()).hexdigest()


def test_local_wikitext_is_joined_as_the_authors_join_it(tmp_path: Path) -> None:
    (tmp_path / "wiki.train.raw").write_bytes(b" \n = Title = \n \n A line . \n")
    corpus = opened("wikitext2", tmp_path)
    assert corpus.documents == ["\n\n".join(["", " = Title = \n", "", " A line . \n"])]
    assert corpus.source == "local"


def test_local_ptb_is_joined_as_the_authors_join_it(tmp_path: Path) -> None:
    (tmp_path / "ptb.train.txt").write_bytes(b" aer banknote \n pierre <unk> \n")
    assert opened("ptb", tmp_path).documents == ["aer banknote pierre <unk>"]


@pytest.mark.parametrize(
    ("name", "column", "text"), [("wikitext2", "text", "\n\n a \n\n\n b \n"), ("ptb", "sentence", "  a \n  b \n")]
)
def test_rows_from_the_hub_are_joined_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, column: str, text: str
) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "0000.parquet"
    pyarrow.parquet.write_table(pyarrow.table({column: ["", " a \n", " b \n"]}), path)
    monkeypatch.setattr(hub_files, "fetch", lambda *_, **__: hub_files.Fetched(path=path, commit="c" * 40))
    corpus = opened(name)
    assert corpus.documents == [text]
    assert (corpus.source, corpus.revision) == ("hub", "c" * 40)


def test_c4_from_the_hub_is_a_document_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_c4(tmp_path)
    path = tmp_path / "c4-train.00000-of-01024.json.gz"
    monkeypatch.setattr(hub_files, "fetch", lambda *_, **__: hub_files.Fetched(path=path, commit="c" * 40))
    assert list(opened("c4").documents) == ["one", "two\n"]


@pytest.mark.parametrize("hub", [CLOSED, OFFLINE])
def test_bundled_text_takes_the_place_of_c4_and_says_so(hub: hub_files.Hub) -> None:
    corpus = opened("c4", hub=hub)
    assert (corpus.asked, corpus.source) == ("c4", "bundled")
    assert corpus.documents == opened("bundled").documents
    assert corpus.note is not None
    assert "c4 cannot be reached" in corpus.note
    assert "using bundled text instead" in corpus.note
    assert "\n" not in corpus.note


@pytest.mark.parametrize(("name", "file"), [("wikitext2", "wiki.train.raw"), ("ptb", "ptb.train.txt")])
def test_nothing_takes_the_place_of_other_data_sets(name: str, file: str, tmp_path: Path) -> None:
    with pytest.raises(BesaError, match=f"'{name}' cannot be reached") as caught:
        opened(name, tmp_path, CLOSED)
    assert file in caught.value.hint
    assert "--data-dir" in caught.value.hint


# --- values of --data


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown data source 'wikitext-2'") as caught:
        corpora.check_sources(["c4", "wikitext-2"], None)
    assert "did you mean 'wikitext2'?" in caught.value.hint
    assert ".jsonl" in caught.value.hint


def test_every_value_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(BesaError, match="no file"):
        corpora.check_sources(["c4", str(tmp_path / "gone.txt")], None)
    with pytest.raises(UsageError, match="no --data"):
        corpora.check_sources([], None)
    with pytest.raises(UsageError, match="is not a directory"):
        corpora.check_sources(["c4"], tmp_path / "gone")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(BesaError, match="holds no text"):
        corpora.check_sources([str(tmp_path / "empty.jsonl")], None)


def test_token_rows_and_text_do_not_mix(tmp_path: Path) -> None:
    rows, text = tmp_path / "rows.jsonl", tmp_path / "a.txt"
    rows.write_text('{"input_ids": [1, 2]}\n')
    text.write_text("text")
    assert corpora.check_sources([str(rows), str(rows)], None) == [rows, rows]
    assert corpora.check_sources([str(text), "c4"], None) == []
    with pytest.raises(UsageError, match="token rows"):
        corpora.check_sources([str(rows), "c4"], None)


def test_a_file_is_named_without_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("my text")
    corpus = opened(str(path))
    assert (corpus.source, corpus.file, corpus.documents) == ("file", "mine.txt", ["my text"])
    assert corpus.digest == hashlib.sha256(b"my text").hexdigest()


def test_a_home_directory_may_be_written_short(own_home: Path) -> None:
    (own_home / "mine.txt").write_text("my text")
    assert opened("~/mine.txt").documents == ["my text"]


def test_what_lies_in_the_place_of_an_official_file_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "c4-train.00000-of-01024.json.gz").mkdir()
    with pytest.raises(BesaError, match=r"c4-train\.00000-of-01024\.json\.gz is not a file"):
        opened("c4", tmp_path)
    (tmp_path / "wiki.train.raw").touch()
    with pytest.raises(BesaError, match=r"wiki\.train\.raw holds no text"):
        opened("wikitext2", tmp_path)


def test_an_official_file_is_read_below_a_directory_of_any_name(tmp_path: Path) -> None:
    write_c4(tmp_path / "c4[1]*::" / "en")
    write_c4(tmp_path / "c41" / "en")
    (tmp_path / "c41" / "en" / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(b'{"text": "other"}'))
    assert list(opened("c4", tmp_path / "c4[1]*::").documents) == ["one", "two\n"]


def test_rows_are_parted_at_line_ends_alone() -> None:
    assert corpora.wikitext_rows(" a\u2028b \n\t\n c") == [" a\u2028b \n", "", " c"]
    assert corpora.wikitext_rows("") == []


def test_importing_is_cheap() -> None:
    import subprocess
    import sys

    heavy = "('torch', 'datasets', 'huggingface_hub', 'pyarrow')"
    code = f"import sys, besa_cli.text.corpora; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
