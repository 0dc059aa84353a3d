"""Sources of ``--data``: bundled text, named data sets, files."""

import functools
import gzip
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

from besa_cli.errors import BesaError, UsageError, unknown
from besa_cli.system.disk import sha256_file
from besa_cli.system.notes import Notify
from besa_cli.text import chat, documents, hub_files, token_rows
from besa_cli.text.spool import Text

BUNDLED = {  # name: SHA-256 of the unpacked bytes; described in data/LICENSES.md
    "wiki.test.raw": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
    "c4_en_train_first1000.jsonl": "37ec1bf825be4567ac6f55b2cd62dc8193aa36fedc192ae4ae6dc034cec81dc5",
    "adventures_of_sherlock_holmes.txt": "7297f113ddc865b3d59ca2b2cbb22493899d5d39b849ac0f527c215862a21772",
    "origin_of_species.txt": "8efbef9dc7a9eb8d83635e95f17402e0501dd49b0eaf845fab3498c976d2686d",
    "moby_dick.txt": "4d7f795e36f389ca992b39de8dbaf01118c2c5f59930b21aa89ce99c9f6a023b",
    "pride_and_prejudice.txt": "64fcef4df991324f83a3f98ed7ddbc2d851c777d415f654a2b51676e235e2b2e",
    "state_of_the_union_1945-2006.txt": "a9b6fb7ba29cf7e6bebca6584ccd16f31ce91e1b421e8c1952a969888d774ed9",
}
C4_SAMPLE = "c4_en_train_first1000.jsonl"
BOOKS = tuple(name for name in BUNDLED if name.endswith(".txt"))


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents and their origin.

    Parameters
    ----------
    asked : str
        Value of ``--data``.
    source : {"bundled", "local", "hub", "file"}
        Origin of the text: the package, ``--data-dir``, the hub, or the named file.
    file : str
        Name of the file, without its directory.
    digest : str
        SHA-256 of the file's bytes (for bundled text, of the unpacked bytes).
    documents : sequence of Text
        One text per document.
    revision : str or None, default=None
        Commit on the hub.
    note : str or None, default=None
        Message for the user if this text replaces the requested one, with the reason.
    template : str or None, default=None
        SHA-256 of the chat template that wrote the documents, if they are conversations.
    """

    asked: str
    source: Literal["bundled", "local", "hub", "file"]
    file: str
    digest: str
    documents: Sequence[Text]
    revision: str | None = None
    note: str | None = None
    template: str | None = None


@dataclass(frozen=True, kw_only=True)
class _NamedCorpus:
    """A data set's training split: its official local file, its file on the hub, and its rows' form."""

    local: tuple[str, ...]
    remote: hub_files.RemoteFile
    column: str
    rows: Callable[[str], list[str]] | None  # splits the local text file into the hub's rows; None: JSON lines
    joint: str | None  # separator that joins the rows into one document; None: one document per row


def bundled_bytes(name: str) -> bytes:
    """Return a bundled file's bytes, unpacked and checked.

    Raises
    ------
    BesaError
        The installed package lacks the file, or its SHA-256 differs from the released one.
    """
    hint = "install besa-cli again"
    try:
        data = gzip.decompress((resources.files("besa_cli") / "data" / f"{name}.gz").read_bytes())
    except (OSError, EOFError) as error:
        raise BesaError(f"the bundled text {name} cannot be read: {error}", hint) from error
    if hashlib.sha256(data).hexdigest() != BUNDLED[name]:
        raise BesaError(f"the bundled text {name} is damaged: its SHA-256 is not {BUNDLED[name]}", hint)
    return data


def bundled(asked: str) -> Corpus:
    """Return the bundled sample of C4: 1,000 documents of its first training shard."""
    texts = [str(json.loads(line)["text"]) for line in _lines(bundled_bytes(C4_SAMPLE).decode("utf-8"))]
    return Corpus(asked=asked, source="bundled", file=C4_SAMPLE, digest=BUNDLED[C4_SAMPLE], documents=texts)


def book(name: str, asked: str) -> Corpus:
    """Return one of the bundled `BOOKS` as a single document."""
    text = bundled_bytes(name).decode("utf-8")
    return Corpus(asked=asked, source="bundled", file=name, digest=BUNDLED[name], documents=[text])


def wikitext_rows(text: str) -> list[str]:
    """Split a raw WikiText file into the rows of the hub: blank lines become ``""``, others keep their line ends."""
    return [row if row.strip() else "" for row in _lines(text)]


def ptb_rows(text: str) -> list[str]:
    """Split a Penn Treebank file in Mikolov's form into the rows of the hub, without surrounding white space."""
    return [row.strip() for row in _lines(text)]


def _lines(text: str) -> io.StringIO:
    """Iterate over lines with their ends, split at LF alone (`str.splitlines` also splits at U+2028 and others)."""
    return io.StringIO(text, newline="\n")


_NAMED = {
    "c4": _NamedCorpus(
        local=("c4-train.00000-of-01024.json.gz", "en/c4-train.00000-of-01024.json.gz"),
        remote=hub_files.RemoteFile(repository="allenai/c4", path="en/c4-train.00000-of-01024.json.gz"),
        column="text",
        rows=None,
        joint=None,
    ),
    "wikitext2": _NamedCorpus(
        local=("wiki.train.raw", "wikitext-2-raw/wiki.train.raw"),
        remote=hub_files.RemoteFile(
            repository="Salesforce/wikitext", path="wikitext-2-raw-v1/train-00000-of-00001.parquet"
        ),
        column="text",
        rows=wikitext_rows,
        joint="\n\n",
    ),
    "ptb": _NamedCorpus(
        local=("ptb.train.txt",),
        remote=hub_files.RemoteFile(
            repository="ptb-text-only/ptb_text_only",
            path="penn_treebank/train/0000.parquet",
            revision="refs/convert/parquet",
        ),
        column="sentence",
        rows=ptb_rows,
        joint=" ",
    ),
}
SELF = "self"  # text that the model writes itself
SOURCES = (*_NAMED, "bundled", SELF)  # values of --data beside files


def check_sources(names: Sequence[str], data_dir: Path | None, column: str | None = None) -> Sequence[Path]:
    """Validate the sources of ``--data`` before reading any text.

    Parameters
    ----------
    names : sequence of str
        Values of ``--data`` without their weights.
    data_dir : Path or None
        First place to look for the official files of named data sets.
    column : str, optional
        Field or column with the documents of the files, which then hold no token rows.

    Returns
    -------
    sequence of Path
        The files, if they hold token rows instead of text; empty if all sources are text.

    Raises
    ------
    UsageError
        There is no source, an unknown one (the nearest known one is named), a file of an unknown type, text mixed
        with token rows, a column without a file that has columns, or `data_dir` is not a directory.
    BesaError
        A file is missing, empty, or invalid in its first line.
    """
    if not names:
        raise UsageError("no --data given", f"known: {', '.join(SOURCES)}, or {documents.FILE_KINDS}")
    documents.check_directory(data_dir)
    files = [named_file(name, "data source", SOURCES) for name in names if name not in SOURCES]
    if column is not None and all(documents.suffix(path) == ".txt" for path in files):
        raise UsageError(
            f"--text-column {column} has no effect: no file of --data has fields or columns",
            "leave it out, or give a .jsonl, .jsonl.gz or .parquet file",
        )
    rows = [path for path in files if column is None and token_rows.holds_rows(path)]
    if rows and len(rows) < len(names):
        raise UsageError(f"--data {rows[0]} holds token rows, other sources hold text", "give only one of the two")
    return rows


def open_source(
    name: str,
    *,
    data_dir: Path | None,
    hub: hub_files.Hub,
    notify: Notify,
    column: str | None = None,
    template: chat.Template | None = None,
) -> Corpus:
    """Open the documents of one source of ``--data``.

    Parameters
    ----------
    name : str
        One of `SOURCES`, or the path of a file.
    data_dir : Path or None
        First place to look for the official files of named data sets.
    hub : hub_files.Hub
        Second place to look for them.
    notify : callable
        Called with a one-line note when a file is fetched.
    column : str, optional
        Field or column with the documents of a file.
    template : Template, optional
        The model's tokenizer, which writes out conversations.

    Raises
    ------
    BesaError
        The file cannot be read as text, or the data set cannot be reached (``c4`` is then replaced by bundled text).
    """
    if name == "bundled":
        return bundled(name)
    if name not in _NAMED:
        return _open_file(name, notify, column, template)
    try:
        return _open_named(name, data_dir, hub, notify)
    except hub_files.Unreachable as error:
        remedy = f"put {_NAMED[name].local[0]} into a directory and name the directory with --data-dir"
        if name != "c4":
            raise BesaError(
                f"'{name}' cannot be reached: {error.reason}", f"{remedy}, or give --data bundled"
            ) from error
        note = f"c4 cannot be reached ({error.reason}; to use it, {remedy}): using bundled text instead"
        return replace(bundled(name), note=note)


def _open_file(name: str, notify: Notify, column: str | None, template: chat.Template | None) -> Corpus:
    path = named_file(name, "data source", SOURCES)
    make = functools.partial(Corpus, asked=name, source="file", file=documents.printable(path.name))
    if template is not None and chat.holds_conversations(path, column):
        texts = chat.read(path, template, notify, column)
        return make(digest=sha256_file(path), documents=texts, template=chat.digest(template))
    return make(digest=sha256_file(path), documents=documents.read_documents(path, column=column or documents.COLUMN))


def _open_named(name: str, data_dir: Path | None, hub: hub_files.Hub, notify: Notify) -> Corpus:
    corpus = _NAMED[name]
    make = functools.partial(Corpus, asked=name)
    if path := documents.first_file(data_dir, corpus.local):
        rows = (
            corpus.rows(documents.read_text(path)) if corpus.rows else documents.read_rows(path, column=corpus.column)
        )
        return make(source="local", file=path.name, digest=sha256_file(path), documents=_join_rows(rows, corpus.joint))
    fetched = hub_files.fetch(corpus.remote, hub, notify=notify)
    path = fetched.path
    texts = _join_rows(documents.read_rows(path, column=corpus.column), corpus.joint)
    return make(source="hub", file=path.name, digest=sha256_file(path), documents=texts, revision=fetched.commit)


def _join_rows(rows: Sequence[str], joint: str | None) -> Sequence[Text]:
    return rows if joint is None else [documents.joined(rows, joint)]


def named_file(name: str, kind: str, known: Sequence[str]) -> Path:
    """Return the checked path of the file that `name` names.

    Raises
    ------
    UsageError
        `name` is neither a path nor one of the `known` names (the nearest is named), or a file of an unknown type.
    BesaError
        The file is missing or empty.
    """
    if not documents.looks_like_file(name):
        raise unknown(kind, name, (*known, documents.FILE_KINDS))
    path = documents.local_path(name)
    documents.check_file(path)
    return path
