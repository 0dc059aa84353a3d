"""Text files as sequences of documents: ``.txt``, ``.jsonl``, ``.jsonl.gz``, ``.parquet``."""

import codecs
import functools
import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from besa_cli.errors import BesaError, UsageError, reading, reason_of
from besa_cli.text import row_files
from besa_cli.text.spool import LongText, Text, Texts, parts

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
FILE_KINDS = "a .txt, .jsonl, .jsonl.gz or .parquet file"
_HELD = 4 << 20  # bytes of a text that is held whole; a longer one is read in parts whenever it is needed
_PART = 1 << 20  # bytes read at a time
_PUBLISHED = 256 << 20  # bytes of the largest text file of a named data set, with much to spare


def suffix(path: Path) -> str | None:
    """Which of `SUFFIXES` the file's name ends in (in any case), or None."""
    name = path.name.lower()
    return next((ending for ending in SUFFIXES if name.endswith(ending)), None)


def local_path(value: str) -> Path:
    """The path that a value of ``--data`` names, a ``~`` at its start replaced where that can be done."""
    path = Path(value)
    if not value.startswith("~"):  # './~' is a name in the current directory
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # no such user, or no home directory
        return path


def looks_like_file(value: str) -> bool:
    """Whether a value of ``--data`` must mean a file: it exists, has one of the known suffixes, or is a path."""
    path = local_path(value)
    return suffix(path) is not None or len(path.parts) > 1 or os.path.lexists(path)


def printable(name: str) -> str:
    """A file's name for manifests and results: what is not UTF-8 in it as ``\\xNN``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def first_file(directory: Path | None, candidates: Iterable[str | Path]) -> Path | None:
    """The first of several places below a directory where something is; None where nothing is.

    Raises
    ------
    BesaError
        What is there is not an ordinary file, or the directory may not be looked into.
    """
    for candidate in candidates if directory is not None else ():
        path = Path(directory or "", candidate)
        if _kind(path) is not None:
            _check_plain(path)
            return path
    return None


def check_directory(data_dir: Path | None) -> None:
    """Refuse a ``--data-dir`` that is none.

    Raises
    ------
    UsageError
    """
    if data_dir is not None and _kind(data_dir) != stat.S_IFDIR:
        raise UsageError(f"--data-dir {data_dir} is not a directory", "name the directory with the data sets' files")


def _kind(path: Path) -> int | None:
    """What kind of thing lies at a path, links followed; None where nothing does."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise BesaError(f"{path} is a link to nothing", "mend or remove it") from None
        return None
    except (OSError, ValueError) as error:
        raise BesaError(f"cannot read {path}: {reason_of(error)}", "check the path and its permissions") from error


def check_file(path: Path) -> None:
    """Find out cheaply what forbids reading `path` as text.

    Raises
    ------
    BesaError
        The file is missing, may not be read, is not a plain file, or is empty.
    UsageError
        Its suffix is none that can be read.
    """
    _check_plain(path)
    if suffix(path) is None:
        raise UsageError(f"cannot tell what {path} holds from its name", f"give {FILE_KINDS}")
    if path.stat().st_size == 0:
        raise _empty(path)


def _check_plain(path: Path) -> None:
    kind = _kind(path)
    if kind is None:
        raise BesaError(f"no file {path}", f"give the path of {FILE_KINDS}")
    if kind != stat.S_IFREG:
        raise BesaError(f"{path} is not a file", f"give the path of {FILE_KINDS}")
    row_files.opened(path).close()


def read_documents(path: Path, *, column: str = "text") -> Sequence[Text]:
    """The documents of a file: a ``.txt`` is one, exactly as it is; a line or row of the other kinds is one each.

    Parameters
    ----------
    path : Path
        A file that `check_file` lets pass.
    column : str
        The field (``.jsonl``) or column (``.parquet``) that holds the text.

    Raises
    ------
    BesaError
        The file is missing, empty, binary, not what its suffix says, or a document lacks its text (with the line).
    """
    check_file(path)
    if suffix(path) == ".txt":
        return [_read_long(path)]
    return read_rows(path, column=column)


def read_rows(path: Path, *, column: str = "text", first: int | None = None) -> Sequence[str]:
    """The texts of a file of rows, parquet or JSON lines.

    Parameters
    ----------
    path : Path
    column : str
        Where the text is in a row.
    first : int, optional
        Rows to read, and nothing after them; all by default.

    Raises
    ------
    BesaError
        As of `read_documents`.
    """
    found = _parquet(path, column) if suffix(path) == ".parquet" else _json_lines(path, column)
    texts, blank = Texts(), True
    for text in itertools.islice(found, first):
        texts.append(text)
        blank = blank and not text.strip()
    if blank:
        raise _empty(path)
    return texts


def _json_lines(path: Path, column: str) -> Iterator[str]:
    for number, row in row_files.json_lines(path):
        text = row.get(column)
        if not isinstance(text, str) or not row_files.is_unicode(text):
            kind = "a string" if not isinstance(text, str) else "Unicode text"
            what = f"no '{column}' field" if text is None else f"'{column}' is not {kind}"
            raise BesaError(
                f"{path}, line {number}: {what} (fields: {row_files.names(row)})",
                f"each line must hold its document as a string under '{column}'",
            )
        yield text


def _parquet(path: Path, column: str) -> Iterator[str]:
    columns = row_files.parquet_columns(path)
    hint = f"the documents must be strings in a column '{column}'"
    if column not in columns:
        raise BesaError(f"{path} has no column '{column}' (columns: {row_files.names(columns)})", hint)
    if columns[column] not in ("string", "large_string"):
        raise BesaError(f"{path}: column '{column}' holds {columns[column]}, not strings", hint)
    for number, row in row_files.parquet_rows(path, [column]):
        if row[column] is None:
            raise BesaError(f"{path}, row {number}: a row of column '{column}' is null", hint)
        yield row[column]


def read_text(path: Path, largest: int = _PUBLISHED) -> str:
    """A UTF-8 file's text, exactly as it is (line ends included); binary, blank and very large files are refused.

    A byte order mark at the start is left out.
    """
    row_files.opened(path).close()
    size = path.stat().st_size
    if size > largest:
        raise BesaError(
            f"{path} has {size >> 20} MiB, more than the {largest >> 20} of such a file", "is it the right file?"
        )
    text = "".join(_parts(path))
    if not text.strip():
        raise _empty(path)
    return text


def _read_long(path: Path) -> Text:
    """As `read_text`, of any size: what is large is looked through now, and read again when it is needed."""
    if path.stat().st_size <= _HELD:
        return read_text(path)
    blank = True
    for part in _parts(path):
        blank = blank and not part.strip()
    if blank:
        raise _empty(path)
    return LongText(functools.partial(_parts, path))


def _parts(path: Path) -> Iterator[str]:
    """A text file's text, part after part."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    place, begun = 0, False
    with row_files.opened(path) as file:
        while True:
            with reading(path):
                data = file.read(_PART)
            if place == 0:
                row_files.refuse_other_encodings(path, data)
            if b"\0" in data:
                at = place + data.index(0)
                raise BesaError(f"{path} is a binary file, not text (NUL at byte {at})", f"give {FILE_KINDS}")
            waiting = len(decoder.getstate()[0])
            try:
                part = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise BesaError(
                    f"{path} is not UTF-8 text (byte {place - waiting + error.start})",
                    "convert it, for instance: iconv -t UTF-8",
                ) from error
            yield part if begun else part.removeprefix("\ufeff")
            place, begun = place + len(data), begun or bool(part)
            if not data:
                return


def joined(texts: Iterable[Text], joint: str) -> Text:
    """Several texts as one, held whole only where it is short."""
    held, size = [], 0
    listed = texts if isinstance(texts, Sequence) else list(texts)
    for part in _between(listed, joint):
        held.append(part)
        size += len(part)
        if size > _HELD:
            return LongText(functools.partial(_between, listed, joint))
    return "".join(held)


def _between(texts: Sequence[Text], joint: str) -> Iterator[str]:
    for number, text in enumerate(texts):
        if number:
            yield joint
        yield from parts(text)


def _empty(path: Path) -> BesaError:
    return BesaError(f"{path} holds no text", f"give {FILE_KINDS} with text in it")
