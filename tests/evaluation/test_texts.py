"""What the names of `besa eval ppl` stand for: how each is joined, where it is looked for, whether it is official."""

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from besa_cli.errors import BesaError, UsageError
from besa_cli.evaluation import texts
from besa_cli.text import corpora, hub_files

CLOSED = hub_files.Hub(endpoint="http://127.0.0.1:9", offline=False, timeout=5)
OFFLINE = hub_files.Hub(endpoint="http://127.0.0.1:9", offline=True)
SHARD = "c4-validation.00000-of-00008"
SENTENCES = ["no it was n't black monday", "but while the <unk> york stock exchange did n't fall apart", "n <unk> n"]


def opened(
    name: str, data_dir: Path | None = None, *, notes: list[str] | None = None, hub: hub_files.Hub = OFFLINE
) -> texts.EvaluationText:
    notify = pytest.fail if notes is None else notes.append
    return texts.evaluation_text(name, data_dir=data_dir, hub=hub, notify=notify)


def as_published(sentences: Sequence[str]) -> bytes:
    return "".join(f" {sentence} \n" for sentence in sentences).encode()


def declare(monkeypatch: pytest.MonkeyPatch, data: bytes, split: str) -> None:
    """Let these bytes be those of an official split of the Penn Treebank."""
    monkeypatch.setitem(texts._PTB_DIGESTS, hashlib.sha256(data).hexdigest(), split)


def shard(documents: int, *, bad: int | None = None) -> bytes:
    lines = [json.dumps({"text": f"document {number}\n", "url": "u"}) for number in range(documents)]
    if bad is not None:
        lines[bad] = "{"
    return ("\n".join(lines) + "\n").encode()


# --- wikitext2


def test_wikitext2_is_the_official_test_split_joined_by_blank_lines() -> None:
    text = opened("wikitext2")
    assert (text.name, text.split, text.source, text.official, text.longest) == (
        "wikitext2",
        "test",
        "bundled",
        True,
        None,
    )
    assert text.digest == "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
    raw = corpora.bundled_bytes("wiki.test.raw").decode()
    lines = ["" if line == " " else line + "\n" for line in raw.removesuffix("\n").split("\n")]
    assert len(lines) == text.records == 4358
    assert sum(line != "" for line in lines) == 2891
    assert text.text == "\n\n".join(lines)
    assert text.text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")


# --- ptb


@pytest.mark.parametrize("folder", [".", "ptb"])
def test_ptb_is_its_sentences_joined_by_single_spaces(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(monkeypatch, as_published(SENTENCES), "test")
    path = tmp_path / folder / "ptb.test.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(as_published(SENTENCES))
    text = opened("ptb", tmp_path)
    assert text.text == " ".join(SENTENCES)
    assert (text.split, text.source, text.file, text.records) == ("test", "local", "ptb.test.txt", 3)
    assert (text.official, text.note, text.longest) == (True, None, None)
    assert text.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_other_line_ends_do_not_make_ptb_another_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, as_published(SENTENCES), "test")
    (tmp_path / "ptb.test.txt").write_bytes("\r\n".join(SENTENCES).encode())
    assert opened("ptb", tmp_path).official is True


def test_ptb_from_the_hub_is_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    declare(monkeypatch, as_published(SENTENCES), "test")
    path = tmp_path / "0000.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"sentence": SENTENCES}), path)
    asked: list[hub_files.RemoteFile] = []

    def fetch(file: hub_files.RemoteFile, *_: object, **__: object) -> hub_files.Fetched:
        asked.append(file)
        return hub_files.Fetched(path=path, commit="c" * 40)

    monkeypatch.setattr(hub_files, "fetch", fetch)
    text = opened("ptb", tmp_path)
    assert text.text == " ".join(SENTENCES)
    assert (text.source, text.revision, text.official) == ("hub", "c" * 40, True)
    assert [(file.path, file.revision) for file in asked] == [
        ("penn_treebank/test/0000.parquet", "refs/convert/parquet")
    ]


def test_a_text_that_is_not_the_official_ptb_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "ptb.test.txt").write_bytes(as_published(SENTENCES))
    notes: list[str] = []
    text = opened("ptb", tmp_path, notes=notes)
    assert text.official is False
    assert notes == [text.note]
    assert "ptb.test.txt is not the official test split (3 sentences, 20 words; official: 3,761 sentences)" in notes[0]
    assert "\n" not in notes[0]


def test_another_split_in_the_place_of_ptbs_test_split_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(monkeypatch, as_published(SENTENCES), "validation")
    (tmp_path / "ptb.test.txt").write_bytes(as_published(SENTENCES))
    notes: list[str] = []
    text = opened("ptb", tmp_path, notes=notes)
    assert (text.split, text.official) == ("validation", False)
    assert "is the official validation split, not the test split" in notes[0]


# --- c4


@pytest.mark.parametrize("folder", [".", "en"])
@pytest.mark.parametrize("ending", [".json.gz", ".json", ".jsonl"])
def test_c4_is_the_first_documents_of_the_shard_joined_by_single_spaces(
    ending: str, folder: str, tmp_path: Path
) -> None:
    path = tmp_path / folder / f"{SHARD}{ending}"
    path.parent.mkdir(exist_ok=True)
    data = shard(1103, bad=1101)  # nothing after the 1,100th is read
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    notes: list[str] = []
    text = opened("c4", tmp_path, notes=notes)
    assert text.text == " ".join(f"document {number}\n" for number in range(1100))
    assert (text.split, text.source, text.records) == ("validation", "local", 1100)
    assert text.longest == 524_288
    assert text.official is (False if ending == ".json.gz" else None)
    assert notes == [text.note]
    assert ("another SHA-256" if ending == ".json.gz" else "was not verified") in notes[0]


def test_the_official_shard_of_c4_needs_no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"{SHARD}.json.gz"
    path.write_bytes(gzip.compress(shard(1100)))
    monkeypatch.setattr(texts, "_C4_DIGEST", hashlib.sha256(path.read_bytes()).hexdigest())
    text = opened("c4", tmp_path)
    assert (text.official, text.note) == (True, None)


def test_a_sample_of_c4_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / f"{SHARD}.jsonl").write_bytes(shard(1099))
    notes: list[str] = []
    assert opened("c4", tmp_path, notes=notes).official is False
    assert "has 1,099 documents where the first 1,100 of the shard are measured" in notes[0]


def test_a_broken_line_of_c4_is_named(tmp_path: Path) -> None:
    (tmp_path / f"{SHARD}.jsonl").write_bytes(shard(1100, bad=41))
    with pytest.raises(BesaError, match=rf"{SHARD}\.jsonl, line 42: broken JSON"):
        opened("c4", tmp_path)


# --- what is not there


@pytest.mark.parametrize("hub", [CLOSED, OFFLINE], ids=["closed", "offline"])
@pytest.mark.parametrize(("name", "file"), [("ptb", "ptb.test.txt"), ("c4", f"{SHARD}.json.gz")])
def test_what_is_nowhere_is_one_line_with_file_places_and_remedy(
    name: str, file: str, hub: hub_files.Hub, tmp_path: Path
) -> None:
    with pytest.raises(BesaError) as caught:
        opened(name, tmp_path, hub=hub)
    for part in (f"'{name}'", file, str(tmp_path), texts._NAMED[name].remote.repository):
        assert part in caught.value.message
    assert caught.value.hint == f"put {file} into a directory and run: besa eval ppl {name} --data-dir {tmp_path}"
    with pytest.raises(BesaError, match="no --data-dir"):
        opened(name, hub=hub)


@pytest.mark.parametrize("name", ["bundled", "wikitext", "pbt"])
def test_other_names_are_not_measured(name: str) -> None:
    with pytest.raises(UsageError, match=f"unknown data set '{name}'") as caught:
        opened(name)
    assert "wikitext2" in caught.value.hint


# --- files


def test_a_text_file_is_measured_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(b" a\r\n\n b")
    text = opened(str(path))
    assert (text.name, text.split, text.text, text.source) == ("mine.txt", None, " a\r\n\n b", "file")
    assert (text.official, text.note) == (None, None)
    assert text.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_documents_are_joined_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b\\n"}\n')
    assert opened(str(path)).text == "a\n\nb\n"
