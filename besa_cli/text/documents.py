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
COLUMN = "text"  # field or column with a document, unless another one is named
FILE_KINDS = "a .txt, .jsonl, .jsonl.gz or .parquet file"
_HELD = 4 << 20  # bytes of the longest text kept in memory; longer ones are read again in parts when needed
_PART = 1 << 20  # bytes read at a time
_PUBLISHED = 256 << 20  # bytes; far more than the largest text file of a named data set


def suffix(path: Path) -> str | None:
    """Return which of `SUFFIXES` the file's name ends in (in any case), or None."""
    name = path.name.lower()
    return next((ending for ending in SUFFIXES if name.endswith(ending)), None)


def local_path(value: str) -> Path:
    """Return the path that a value of ``--data`` names, with a leading ``~`` expanded if possible."""
    path = Path(value)
    if not value.startswith("~"):  # './~' is a name in the current directory
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # no such user, or no home directory
        return path


def looks_like_file(value: str) -> bool:
    """Check that a value of ``--data`` must be a file: it exists, has a known suffix, or contains a directory."""
    path = local_path(value)
    return suffix(path) is not None or len(path.parts) > 1 or os.path.lexists(path)


def printable(name: str) -> str:
    """Return a file's name for manifests and results, with bytes that are not UTF-8 as ``\\xNN``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def first_file(directory: Path | None, candidates: Iterable[str | Path]) -> Path | None:
    """Return the first existing path of several below a directory; None if none exists.

    Raises
    ------
    BesaError
        The path is not an ordinary file, or the directory cannot be read.
    """
    for candidate in candidates if directory is not None else ():
        path = Path(directory or "", candidate)
        if _file_type(path) is not None:
            _check_regular(path)
            return path
    return None


def check_directory(data_dir: Path | None) -> None:
    """Refuse a ``--data-dir`` that is not a directory.

    Raises
    ------
    UsageError
        The path is missing or not a directory.
    """
    if data_dir is not None and _file_type(data_dir) != stat.S_IFDIR:
        raise UsageError(f"--data-dir {data_dir} is not a directory", "name the directory with the data sets' files")


def _file_type(path: Path) -> int | None:
    """Return the file type of a path (`stat.S_IFMT`), following links; None if it does not exist."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise BesaError(f"{path} is a broken link", "repair or remove it") from None
        return None
    except (OSError, ValueError) as error:
        raise BesaError(f"cannot read {path}: {reason_of(error)}", "check the path and its permissions") from error


def check_file(path: Path) -> None:
    """Check cheaply that `path` can be read as text.

    Raises
    ------
    BesaError
        The file is missing, may not be read, is not a plain file, or is empty.
    UsageError
        Its suffix is not one of `SUFFIXES`.
    """
    _check_regular(path)
    if suffix(path) is None:
        raise UsageError(f"cannot tell what {path} holds from its name", f"give {FILE_KINDS}")
    if path.stat().st_size == 0:
        raise _empty(path)


def _check_regular(path: Path) -> None:
    kind = _file_type(path)
    if kind is None:
        raise BesaError(f"no file {path}", f"give the path of {FILE_KINDS}")
    if kind != stat.S_IFREG:
        raise BesaError(f"{path} is not a file", f"give the path of {FILE_KINDS}")
    row_files.opened(path).close()


def read_documents(path: Path, *, column: str = COLUMN) -> Sequence[Text]:
    """Read the documents of a file: a ``.txt`` is one, unchanged; in other files every line or row is one.

    Parameters
    ----------
    path : Path
        A file that passes `check_file`.
    column : str
        Field (``.jsonl``) or column (``.parquet``) with the text.

    Raises
    ------
    BesaError
        The file is missing, empty, binary, or not what its suffix says, or a document lacks its text (the line is
        named).
    """
    check_file(path)
    if suffix(path) == ".txt":
        return [_read_long(path)]
    return read_rows(path, column=column)


def read_rows(path: Path, *, column: str = COLUMN, first: int | None = None) -> Sequence[str]:
    """Read the texts of a parquet or JSON-lines file.

    Parameters
    ----------
    path : Path
    column : str
        Field or column with the text.
    first : int, optional
        Number of rows to read; all by default.

    Raises
    ------
    BesaError
        The file is missing, empty, or not what its suffix says, or a row lacks its text.
    """
    rows = _parquet(path, column) if suffix(path) == ".parquet" else _json_lines(path, column)
    texts, blank = Texts(), True
    for text in itertools.islice(rows, first):
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
            problem = f"no '{column}' field" if text is None else f"'{column}' is not {kind}"
            raise BesaError(
                f"{path}, line {number}: {problem} (fields: {row_files.names(row)})",
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
    """Read a UTF-8 file's text, unchanged (line ends included) except for a leading byte order mark.

    Raises
    ------
    BesaError
        The file is binary, not UTF-8, blank, or larger than `largest` bytes.
    """
    row_files.opened(path).close()
    size = path.stat().st_size
    if size > largest:
        raise BesaError(
            f"{path} has {size >> 20} MiB, more than the {largest >> 20} MiB expected of such a file",
            "check that it is the right file",
        )
    text = "".join(_parts(path))
    if not text.strip():
        raise _empty(path)
    return text


def _read_long(path: Path) -> Text:
    """Read a text of any size: a large one is validated now, and read again in parts when needed."""
    if path.stat().st_size <= _HELD:
        return read_text(path)
    blank = True
    for part in _parts(path):
        blank = blank and not part.strip()
    if blank:
        raise _empty(path)
    return LongText(functools.partial(_parts, path))


def _parts(path: Path) -> Iterator[str]:
    """Yield a text file's text in parts."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    place, started = 0, False
    with row_files.opened(path) as file:
        while True:
            with reading(path):
                data = file.read(_PART)
            if place == 0:
                row_files.refuse_other_encodings(path, data)
            if b"\0" in data:
                offset = place + data.index(0)
                raise BesaError(f"{path} is a binary file, not text (NUL at byte {offset})", f"give {FILE_KINDS}")
            pending = len(decoder.getstate()[0])
            try:
                part = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise BesaError(
                    f"{path} is not UTF-8 text (byte {place - pending + error.start})",
                    "convert it, for instance: iconv -t UTF-8",
                ) from error
            yield part if started else part.removeprefix("\ufeff")
            place, started = place + len(data), started or bool(part)
            if not data:
                return


def joined(texts: Iterable[Text], joint: str) -> Text:
    """Join several texts into one, kept in memory only if it is short."""
    collected, size = [], 0
    sequence = texts if isinstance(texts, Sequence) else list(texts)
    for part in _interleave(sequence, joint):
        collected.append(part)
        size += len(part)
        if size > _HELD:
            return LongText(functools.partial(_interleave, sequence, joint))
    return "".join(collected)


def _interleave(texts: Sequence[Text], joint: str) -> Iterator[str]:
    for number, text in enumerate(texts):
        if number:
            yield joint
        yield from parts(text)


def _empty(path: Path) -> BesaError:
    return BesaError(f"{path} holds no text", f"give {FILE_KINDS} with text in it")
