"""Files of rows: JSON lines, plain or gzip, and parquet; read row after row, each row and the whole within bounds."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from besa_cli.errors import BesaError, reading, reason_of
from besa_cli.system import disk

if TYPE_CHECKING:
    import pyarrow.parquet

LONGEST_LINE = 32 << 20  # bytes; as Python's objects a line takes up to twenty times as much
GROWTH = 100  # bytes that a compressed file may unpack to, for each of its own; text comes to less than ten
SMALL = 64 << 20  # bytes that any file may unpack to
_ROWS = 16  # of a parquet file, read at a time
_BUFFER = 1 << 20  # bytes read ahead in each column
_NAMES = 8  # that are shown
_LONGEST_NAME = 40  # characters of each

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OTHER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_TEXT = "give UTF-8 text, one JSON object a line"

Row = dict[str, Any]


def opened(path: Path) -> IO[bytes]:
    """An ordinary file, open for reading.

    Raises
    ------
    BesaError
        It is missing, not an ordinary file, or may not be read.
    """
    disk.require_regular(path)
    with reading(path, "check the file and its permissions"):
        return path.open("rb")


def refuse_other_encodings(path: Path, begin: bytes) -> None:
    """Refuse a file that begins with the mark of another encoding than UTF-8."""
    for mark, name in _OTHER_MARKS.items():
        if begin.startswith(mark):
            raise BesaError(f"{path} is {name} text, not UTF-8", f"convert it: iconv -f {name} -t UTF-8")


def names(found: Iterable[str]) -> str:
    """Names of fields or columns, for an error: the first few, none of them long."""
    listed = list(found)
    shown = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in listed[:_NAMES]]
    more = f" and {len(listed) - _NAMES} more" if len(listed) > _NAMES else ""
    return ", ".join(shown) + more or "none"


def is_unicode(text: str) -> bool:
    """False for a string with half a surrogate pair, which JSON can write but no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """Line number (from 1) and object of every line of a JSON-lines file that is not blank.

    A byte order mark at the start is left out.

    Raises
    ------
    BesaError
        The file cannot be read, unpacks to far more than text can, or a line is not a JSON object (with its number).
    """
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield number, _object(path, number, line)


def _lines(path: Path) -> Iterator[bytes]:
    packed = path.name.lower().endswith(".gz")
    number, size, most = 0, 0, _most(path, packed=packed)
    with opened(path) as raw, gzip.open(raw) if packed else raw as file:
        try:
            while line := file.readline(LONGEST_LINE + 1):
                number, size = number + 1, size + len(line)
                if number == 1:
                    refuse_other_encodings(path, line)
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if len(line) > LONGEST_LINE:
                    raise BesaError(
                        f"{path}, line {number}: longer than {LONGEST_LINE >> 20} MiB", "give shorter documents"
                    )
                if most is not None and size > most:
                    raise BesaError(
                        f"{path} unpacks to more than {most >> 20} MiB, {GROWTH} times its own size", "unpack it first"
                    )
                yield line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise BesaError(
                f"{path} is not a whole gzip file: {error} (after line {number})", "fetch or compress it anew"
            ) from error
        except OSError as error:
            raise BesaError(f"cannot read {path}: {reason_of(error)}", "check the file and its permissions") from error


def _most(path: Path, *, packed: bool) -> int | None:
    """The bytes that a compressed file may unpack to; of a plain file there is nothing to unpack."""
    if not packed:
        return None
    disk.require_regular(path)
    return max(SMALL, GROWTH * path.stat().st_size)


def _object(path: Path, number: int, line: bytes) -> Row:
    """One line as a JSON object, or the error that names the line."""
    if b"\0" in line:
        raise BesaError(f"{path} is a binary file, not text (line {number} holds a NUL)", _TEXT)
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BesaError(f"{path}, line {number}: not UTF-8", _TEXT) from error
    except (ValueError, RecursionError) as error:
        raise BesaError(f"{path}, line {number}: broken JSON ({reason_of(error)})", _TEXT) from error
    if not isinstance(value, dict):
        raise BesaError(f"{path}, line {number}: not a JSON object", _TEXT)
    return value


def parquet_columns(path: Path) -> dict[str, str]:
    """Name and type of every column of a parquet file.

    Raises
    ------
    BesaError
        The file cannot be read.
    """
    with opened(path) as file, _parquet(path):
        return {field.name: str(field.type) for field in _file(file).schema_arrow}


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
    """Number (from 1) and values of every row of a parquet file.

    Parameters
    ----------
    path : Path
    columns : sequence of str, optional
        Those to read; all by default.

    Raises
    ------
    BesaError
        The file cannot be read, or unpacks to far more than it could hold as text.
    """
    number = 0
    with opened(path) as file:
        with _parquet(path):
            found = _file(file)
        _refuse_growth(path, found.metadata)
        with _parquet(path):
            batches = found.iter_batches(batch_size=_ROWS, columns=columns)
        while True:
            with _parquet(path):
                batch = next(batches, None)
                rows: list[Row] = [] if batch is None else batch.to_pylist()
            if batch is None:
                return
            for row in rows:
                number += 1
                yield number, row


def _file(file: IO[bytes]) -> "pyarrow.parquet.ParquetFile":
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)


@contextmanager
def _parquet(path: Path) -> Iterator[None]:
    try:
        with reading(path):
            yield
    except BesaError as error:
        reason = reason_of(error.__cause__ or error)
        raise BesaError(f"{path} is not a whole parquet file ({reason})", "fetch or write it anew") from error


def _refuse_growth(path: Path, metadata: "pyarrow.parquet.FileMetaData") -> None:
    unpacked = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    most = max(SMALL, GROWTH * path.stat().st_size)
    if unpacked > most:
        raise BesaError(
            f"{path} unpacks to {unpacked >> 20} MiB, more than {GROWTH} times its own size", "give the text unpacked"
        )
