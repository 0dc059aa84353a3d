"""What the names of ``besa eval ppl`` stand for: texts joined as the authors join them, the official ones or not."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from besa_cli.errors import BesaError
from besa_cli.system.disk import sha256_file
from besa_cli.text import documents, hub_files
from besa_cli.text.corpora import BUNDLED, Notify, bundled_bytes, named_file, ptb_rows, wikitext_rows
from besa_cli.text.spool import Text

C4_DOCUMENTS = 1100  # the first of the first validation shard
C4_TOKENS = 256 * 2048
_C4 = "c4-validation.00000-of-00008"
_C4_DIGEST = "1f25b6af12da84115301d4ee93ea5246c8fea5bb4a2008472794d95b917cc97f"  # of the .json.gz
_PTB_DIGESTS = {  # of the files as they were published; the splits' own, and what else may stand in their place
    "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0": "test",
    "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2": "validation",
    "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf": "train",
}
_PTB_SENTENCES = 3761


@dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """One text to measure perplexity on.

    Parameters
    ----------
    name : str
        The data set's name, or the file's name without its directory.
    split : str or None
        The data set's split; None for a file.
    text : Text
        The whole text, joined as the authors join it.
    digest : str
        SHA-256 of the bytes of the file that it is from.
    source : {"bundled", "local", "hub", "file"}
        Where that file was found: in the package, under ``--data-dir``, on the hub, or where it was named.
    file : str or None, default=None
        The file's name, without its directory.
    revision : str or None, default=None
        The hub's commit.
    records : int or None, default=None
        Rows, sentences or documents that were joined.
    official : bool or None, default=None
        Whether this is, byte for byte, the data set that was published; None where that cannot be known.
    note : str or None, default=None
        What the user must be told where it is not, or not known to be.
    longest : int or None, default=None
        Tokens after which the text is cut; None for the whole text.
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
class _Found:
    """The file of a named data set, and where it is from."""

    path: Path
    source: Literal["local", "hub"]
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class _NamedText:
    """A data set that is looked for: its official local files, its file on the hub, and how it becomes a text."""

    local: tuple[str, ...]
    remote: hub_files.RemoteFile
    read: Callable[[_Found], EvaluationText]


def _ptb(found: _Found) -> EvaluationText:
    """The test split: its sentences, joined by single spaces."""
    path, hint = found.path, "put the published ptb.test.txt into --data-dir"
    is_text = path.suffix == ".txt"
    rows = ptb_rows(documents.read_text(path)) if is_text else documents.read_rows(path, column="sentence")
    published = hashlib.sha256("".join(f" {row} \n" for row in rows).encode()).hexdigest()  # the lines as published
    split = _PTB_DIGESTS.get(published, "test")
    note = None
    if published not in _PTB_DIGESTS:
        count = f"{len(rows):,} sentences, {sum(len(row.split()) for row in rows):,} words"
        note = f"is not the official test split ({count}; official: {_PTB_SENTENCES:,} sentences): {_DIFFERENT}; {hint}"
    elif split != "test":
        note = f"is the official {split} split, not the test split: {_DIFFERENT}; {hint}"
    return _text("ptb", split, rows, found, official=note is None, note=note)


def _c4(found: _Found) -> EvaluationText:
    """The first documents of the first validation shard, joined by single spaces; their tokens are cut later."""
    rows = documents.read_rows(found.path, first=C4_DOCUMENTS)
    official: bool | None = sha256_file(found.path) == _C4_DIGEST
    note = None
    if len(rows) < C4_DOCUMENTS:
        official = False
        count = f"it has {len(rows):,} documents where the first {C4_DOCUMENTS:,} of the shard are measured"
        note = f"is not the official validation shard ({count}): {_DIFFERENT}"
    elif not official and found.path.suffix == ".gz":
        note = f"is not the shard that was published (another SHA-256 than {_C4_DIGEST[:12]}…): {_DIFFERENT}"
    elif not official:
        official = None
        note = "was not verified: the official SHA-256 is known of the .json.gz alone"
    return _text("c4", "validation", rows, found, official=official, note=note, longest=C4_TOKENS)


_DIFFERENT = "do not compare its perplexity with published ones"


def _text(
    name: str,
    split: str,
    rows: Sequence[str],
    found: _Found,
    *,
    official: bool | None,
    note: str | None,
    longest: int | None = None,
) -> EvaluationText:
    return EvaluationText(
        name=name,
        split=split,
        text=documents.joined(rows, " "),
        digest=sha256_file(found.path),
        source=found.source,
        file=found.path.name,
        revision=found.revision,
        records=len(rows),
        official=official,
        note=note and f"{name}: {found.path} {note}",
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
    """The text that perplexity is measured on.

    Parameters
    ----------
    name : str
        ``wikitext2``: the official raw test split, which ships with besa: 4,358 rows as the hub yields them, joined by
        blank lines. ``ptb``: the test split, its sentences joined by spaces. ``c4``: the first 1,100 documents of the
        first validation shard, joined by spaces, of which the first 256 × 2,048 tokens count. Or a file: a ``.txt``
        exactly as it is, the documents of other kinds joined by blank lines.
    data_dir : Path or None
        Where official files of named data sets are looked for first.
    hub : datahub.Hub
        Where they are looked for next.
    notify : callable
        Takes a line when something is fetched, and one when a text is not the official one.

    Raises
    ------
    UsageError
        An unknown name (with the nearest known one), or a file of an unknown kind.
    BesaError
        The file is missing, empty, binary, or not what its suffix says; the data set is nowhere to be had.
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
    texts, shown = documents.read_documents(path), documents.printable(path.name)
    return EvaluationText(
        name=shown,
        split=None,
        text=documents.joined(texts, "\n\n"),
        digest=sha256_file(path),
        source="file",
        file=shown,
        records=len(texts),
    )


def _find(name: str, data_dir: Path | None, hub: hub_files.Hub, notify: Notify) -> _Found:
    named = _NAMED[name]
    if path := documents.first_file(data_dir, named.local):
        return _Found(path=path, source="local")
    try:
        fetched = hub_files.fetch(named.remote, hub, notify=notify)
    except hub_files.Unreachable as error:
        looked = f"is not in {data_dir}" if data_dir is not None else "was not looked for (no --data-dir)"
        raise BesaError(
            f"the data set '{name}' cannot be had: {named.local[0]} {looked}, "
            f"and {named.remote.repository} on the hub cannot be reached ({error.reason})",
            f"put {named.local[0]} into a directory and run: besa eval ppl {name} --data-dir {data_dir or 'DIR'}",
        ) from error
    return _Found(path=fetched.path, source="hub", revision=fetched.commit)
