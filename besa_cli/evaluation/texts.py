"""Evaluation texts of ``besa eval ppl``: named data sets, joined as in the BESA authors' code, and files."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from besa_cli.errors import BesaError
from besa_cli.system.disk import sha256_file
from besa_cli.system.notes import Notify
from besa_cli.text import documents, hub_files
from besa_cli.text.corpora import BUNDLED, bundled_bytes, named_file, ptb_rows, wikitext_rows
from besa_cli.text.spool import Text

C4_DOCUMENTS = 1100  # documents used, from the start of the first validation shard
C4_TOKENS = 256 * 2048
_C4 = "c4-validation.00000-of-00008"
_C4_DIGEST = "1f25b6af12da84115301d4ee93ea5246c8fea5bb4a2008472794d95b917cc97f"  # SHA-256 of the .json.gz
_PTB_DIGESTS = {  # SHA-256 of each split's published file, to recognize a wrong split
    "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0": "test",
    "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2": "validation",
    "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf": "train",
}
_PTB_SENTENCES = 3761


@dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """Text on which perplexity is measured.

    Parameters
    ----------
    name : str
        Name of the data set, or of the file without its directory.
    split : str or None
        Split of the data set; None for a file.
    text : Text
        The whole text, joined as in the BESA authors' code.
    digest : str
        SHA-256 of the source file's bytes.
    source : {"bundled", "local", "hub", "file"}
        Origin of the file: the package, ``--data-dir``, the hub, or a path given by the user.
    file : str or None, default=None
        Name of the file, without its directory.
    revision : str or None, default=None
        Commit on the hub.
    records : int or None, default=None
        Number of rows, sentences or documents that were joined.
    official : bool or None, default=None
        True if the data equals the published data set byte for byte; None if this is not known.
    note : str or None, default=None
        Note for the user if the data is not, or not known to be, the published data set.
    longest : int or None, default=None
        Number of tokens to which the text is cut; None for the whole text.
    """

    name: str
    split: str | None
    text: Text
    digest: str
    source: Literal["bundled", "local", "hub", "file"]
    file: str | None = None
    revision: str | None = None
    records: int | None = None
    official: bool | None = None
    note: str | None = None
    longest: int | None = None


@dataclass(frozen=True, kw_only=True)
class _LocatedFile:
    """File of a named data set, with its origin."""

    path: Path
    source: Literal["local", "hub"]
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class _NamedText:
    """Named data set: candidate local files, its file on the hub, and the function that reads it."""

    local: tuple[str, ...]
    remote: hub_files.RemoteFile
    read: Callable[[_LocatedFile], EvaluationText]


def _ptb(located: _LocatedFile) -> EvaluationText:
    """Read the PTB test split: its sentences, joined by single spaces."""
    path, hint = located.path, "put the published ptb.test.txt into --data-dir"
    is_text = path.suffix == ".txt"
    rows = ptb_rows(documents.read_text(path)) if is_text else documents.read_rows(path, column="sentence")
    digest = hashlib.sha256("".join(f" {row} \n" for row in rows).encode()).hexdigest()  # the published line format
    split = _PTB_DIGESTS.get(digest, "test")
    note = None
    if digest not in _PTB_DIGESTS:
        count = f"{len(rows):,} sentences, {sum(len(row.split()) for row in rows):,} words"
        note = f"is not the official test split ({count}; official: {_PTB_SENTENCES:,} sentences): {_DIFFERENT}; {hint}"
    elif split != "test":
        note = f"is the official {split} split, not the test split: {_DIFFERENT}; {hint}"
    return _text("ptb", split, rows, located, official=note is None, note=note)


def _c4(located: _LocatedFile) -> EvaluationText:
    """Read the first documents of the first C4 validation shard, joined by single spaces, to be cut to `C4_TOKENS`."""
    rows = documents.read_rows(located.path, first=C4_DOCUMENTS)
    official: bool | None = sha256_file(located.path) == _C4_DIGEST
    note = None
    if len(rows) < C4_DOCUMENTS:
        official = False
        count = f"it has {len(rows):,} documents where the first {C4_DOCUMENTS:,} of the shard are measured"
        note = f"is not the official validation shard ({count}): {_DIFFERENT}"
    elif not official and located.path.suffix == ".gz":
        note = f"is not the shard that was published (another SHA-256 than {_C4_DIGEST[:12]}…): {_DIFFERENT}"
    elif not official:
        official = None
        note = "was not verified: the official SHA-256 is known of the .json.gz alone"
    return _text("c4", "validation", rows, located, official=official, note=note, longest=C4_TOKENS)


_DIFFERENT = "do not compare its perplexity with published ones"


def _text(
    name: str,
    split: str,
    rows: Sequence[str],
    located: _LocatedFile,
    *,
    official: bool | None,
    note: str | None,
    longest: int | None = None,
) -> EvaluationText:
    return EvaluationText(
        name=name,
        split=split,
        text=documents.joined(rows, " "),
        digest=sha256_file(located.path),
        source=located.source,
        file=located.path.name,
        revision=located.revision,
        records=len(rows),
        official=official,
        note=note and f"{name}: {located.path} {note}",
        longest=longest,
    )


_NAMED = {
    "ptb": _NamedText(
        local=("ptb.test.txt", "ptb/ptb.test.txt"),
        remote=hub_files.RemoteFile(
            repository="ptb-text-only/ptb_text_only",
            path="penn_treebank/test/0000.parquet",
            revision="refs/convert/parquet",
        ),
        read=_ptb,
    ),
    "c4": _NamedText(
        local=tuple(f"{folder}{_C4}{ending}" for ending in (".json.gz", ".json", ".jsonl") for folder in ("", "en/")),
        remote=hub_files.RemoteFile(repository="allenai/c4", path=f"en/{_C4}.json.gz"),
        read=_c4,
    ),
}
EVALUATION_SETS = ("wikitext2", *_NAMED)


def evaluation_text(name: str, *, data_dir: Path | None, hub: hub_files.Hub, notify: Notify) -> EvaluationText:
    """Load the text of a data set or file.

    Parameters
    ----------
    name : str
        ``wikitext2``: the official raw test split, bundled with besa: 4,358 rows as the hub yields them, joined by
        blank lines. ``ptb``: the sentences of the test split, joined by spaces. ``c4``: the first 1,100 documents of
        the first validation shard, joined by spaces and cut to 256 × 2,048 tokens. Or the path of a file: a ``.txt``
        is used unchanged; the documents of other file types are joined by blank lines.
    data_dir : Path or None
        Directory searched first for official files of named data sets.
    hub : hub_files.Hub
        Hub searched next.
    notify : callable
        Receives a line for each download and for each text that is not official.

    Raises
    ------
    UsageError
        The name is unknown (the hint suggests the nearest one), or the file's type is.
    BesaError
        The file is missing, empty, binary, or does not match its suffix; or the data set is not available.
    """
    if name == "wikitext2":
        rows = wikitext_rows(bundled_bytes("wiki.test.raw").decode("utf-8"))
        return EvaluationText(
            name=name,
            split="test",
            text="\n\n".join(rows),
            digest=BUNDLED["wiki.test.raw"],
            source="bundled",
            file="wiki.test.raw",
            records=len(rows),
            official=True,
        )
    if name in _NAMED:
        text = _NAMED[name].read(_find(name, data_dir, hub, notify))
        if text.note is not None:
            notify(text.note)
        return text
    path = named_file(name, "data set", EVALUATION_SETS)
    texts, file_name = documents.read_documents(path), documents.printable(path.name)
    return EvaluationText(
        name=file_name,
        split=None,
        text=documents.joined(texts, "\n\n"),
        digest=sha256_file(path),
        source="file",
        file=file_name,
        records=len(texts),
    )


def _find(name: str, data_dir: Path | None, hub: hub_files.Hub, notify: Notify) -> _LocatedFile:
    named = _NAMED[name]
    if path := documents.first_file(data_dir, named.local):
        return _LocatedFile(path=path, source="local")
    try:
        fetched = hub_files.fetch(named.remote, hub, notify=notify)
    except hub_files.Unreachable as error:
        local = f"is not in {data_dir}" if data_dir is not None else "was not searched for (no --data-dir)"
        raise BesaError(
            f"the data set '{name}' is not available: {named.local[0]} {local}, "
            f"and {named.remote.repository} on the hub cannot be reached ({error.reason})",
            f"put {named.local[0]} into a directory and run: besa eval ppl {name} --data-dir {data_dir or 'DIR'}",
        ) from error
    return _LocatedFile(path=fetched.path, source="hub", revision=fetched.commit)
