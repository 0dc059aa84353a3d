"""Text files as sequences of documents: ``.txt``, ``.jsonl``, ``.jsonl.gz``, ``.parquet``."""

import gzip
import itertools
import json
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from besa_cli.errors import BesaError, UsageError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
FILE_KINDS = "a .txt, .jsonl, .jsonl.gz or .parquet file"
_FAULTS = (OSError, EOFError, zlib.error, ValueError, TypeError)  # what reading a damaged file can come to
_IN_MEMORY = 64 * 2**20  # bytes; a larger file is converted once into the user's `datasets` cache and mapped from there


def suffix(path: Path) -> str | None:
    """Which of `SUFFIXES` the file's name ends in (in any case), or None."""
    name = path.name.lower()
    return next((ending for ending in SUFFIXES if name.endswith(ending)), None)


def looks_like_file(value: str) -> bool:
    """Whether a value of ``--data`` must mean a file: it exists, has one of the known suffixes, or is a path."""
    path = Path(value).expanduser()
    return suffix(path) is not None or len(path.parts) > 1 or path.exists()


def check_file(path: Path) -> None:
    """Find out cheaply what forbids reading `path` as text.

    Raises
    ------
    BesaError
        The file is missing, is no plain file, or is empty.
    UsageError
        Its suffix is none that can be read.
    """
    if not path.exists():
        raise BesaError(f"no file {path}", f"give the path of {FILE_KINDS}")
    if not path.is_file():
        raise BesaError(f"{path} is not a file", f"give the path of {FILE_KINDS}")
    if suffix(path) is None:
        raise UsageError(f"cannot tell what {path} holds from its name", f"give {FILE_KINDS}")
    if path.stat().st_size == 0:
        raise _empty(path)


def read_documents(path: Path, *, column: str = "text") -> Sequence[str]:
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
    kind = suffix(path)
    documents: Sequence[str]
    if kind == ".txt":
        documents = [read_text(path)]
    elif kind == ".parquet":
        documents = _read_parquet(path, column)
    else:
        documents = read_json_lines(path, column)
    if not any(document.strip() for document in documents):
        raise _empty(path)
    return documents


def read_text(path: Path) -> str:
    """A UTF-8 file's text, exactly as it is (line ends included); binary and blank files are refused."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if b"\0" in data:
        raise BesaError(f"{path} is a binary file, not text (NUL at byte {data.index(0)})", f"give {FILE_KINDS}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BesaError(
            f"{path} is not UTF-8 text (byte {error.start})", "convert it, for instance: iconv -t UTF-8"
        ) from error
    if not text.strip():
        raise _empty(path)
    return text


def read_json_lines(path: Path, column: str = "text", *, first: int | None = None) -> Sequence[str]:
    """The `column` of every object of a JSON-lines file (plain, or gzip where the name ends in ``.gz``).

    `datasets` reads it. Where that cannot make one column of text of it, the lines are looked at one by one: either
    the faulty line is named, or (other fields of mixed types, texts that look like dates) the texts are taken as they
    are. With `first`, only so many documents are read, and nothing after them.
    """
    if next(json_lines(path), None) is None:
        raise _empty(path)
    documents = _load("json", path, column) if first is None else None
    return _scan(path, column, first) if documents is None else documents


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and object of every line of a JSON-lines file that is not blank."""
    number = 0
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _object(path, number, line)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise BesaError(
                f"{path} is not a whole gzip file: {error} (after line {number})", "fetch or compress it anew"
            ) from error
        except OSError as error:
            raise _unreadable(path, error) from error


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """One line as a JSON object, or the error that names the line."""
    if b"\0" in line:
        raise BesaError(f"{path} is a binary file, not text (line {number} holds a NUL)", f"give {FILE_KINDS}")
    hint = "each line must be one JSON object in UTF-8"
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BesaError(f"{path}, line {number}: not UTF-8", hint) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise BesaError(f"{path}, line {number}: broken JSON ({error})", hint) from error
    if not isinstance(value, dict):
        raise BesaError(f"{path}, line {number}: not a JSON object", hint)
    return value


def _scan(path: Path, column: str, first: int | None) -> list[str]:
    texts = []
    for number, value in itertools.islice(json_lines(path), first):
        text = value.get(column)
        if not isinstance(text, str) or not _is_unicode(text):
            kind = "a string" if not isinstance(text, str) else "Unicode text"
            what = f"no '{column}' field" if text is None else f"'{column}' is not {kind}"
            raise BesaError(
                f"{path}, line {number}: {what} (fields: {', '.join(value) or 'none'})",
                f"each line must hold its document as a string under '{column}'",
            )
        texts.append(text)
    return texts


def _is_unicode(text: str) -> bool:
    """False for a string with half a surrogate pair, which JSON can write but no tokenizer can read."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _read_parquet(path: Path, column: str) -> Sequence[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise BesaError(f"{path} is not a parquet file ({error})", "fetch or write it anew") from error
    hint = f"the documents must be strings in a column '{column}'"
    if column not in schema.names:
        raise BesaError(f"{path} has no column '{column}' (columns: {', '.join(schema.names) or 'none'})", hint)
    kind = schema.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise BesaError(f"{path}: column '{column}' holds {kind}, not strings", hint)
    documents = _load("parquet", path, column)
    if documents is None:
        raise BesaError(f"{path}: a row of column '{column}' is null, or the file is damaged", hint)
    return documents


def _load(builder: str, path: Path, column: str) -> Sequence[str] | None:
    """The column as `datasets` reads it, or None where it is not one column of strings without gaps."""
    import datasets
    import pyarrow

    small = path.stat().st_size <= _IN_MEMORY
    with tempfile.TemporaryDirectory(prefix="besa-") as cache, _silent(datasets):
        try:
            rows = datasets.load_dataset(
                builder,
                data_files=str(path),
                split="train",
                cache_dir=cache if small else None,
                keep_in_memory=small,
            )
        except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, *_FAULTS):
            return None  # the callers look for the fault themselves and name its place
    if column not in rows.column_names or rows.features[column] not in _strings(datasets):
        return None
    if rows.data.column(column).null_count:
        return None
    texts: Sequence[str] = rows.select_columns([column])[column]
    return texts


def _strings(datasets: Any) -> tuple[object, ...]:
    return datasets.Value("string"), datasets.Value("large_string")


@contextmanager
def _silent(datasets: Any) -> Iterator[None]:
    """Neither progress bars nor log lines of `datasets` within; as they were afterwards."""
    level = datasets.logging.get_verbosity()
    bars = not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _unreadable(path: Path, error: OSError) -> BesaError:
    return BesaError(f"cannot read {path}: {error.strerror or error}", "check the file and its permissions")


def _empty(path: Path) -> BesaError:
    return BesaError(f"{path} holds no text", f"give {FILE_KINDS} with text in it")
