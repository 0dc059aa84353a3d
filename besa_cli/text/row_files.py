"""Files of rows: JSON lines, plain or gzip, and parquet, read row by row with limits on rows and unpacked size."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from besa_cli.errors import BesaError, reading, reason_of
from besa_cli.system import disk
from besa_cli.system.disk import JsonObject

if TYPE_CHECKING:
    import pyarrow.parquet

LONGEST_LINE = 32 << 20  # bytes; as Python objects a line takes up to 20 times as much
GROWTH = 100  # largest unpacked size of a compressed file, as a multiple of its own; text reaches less than 10
SMALL = 64 << 20  # bytes; unpacked size that is always allowed
_ROWS = 16  # rows of a parquet file read at a time
_BUFFER = 1 << 20  # bytes read ahead in each column
_NAMES = 8  # shown in errors
_LONGEST_NAME = 40  # characters of each name

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OTHER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_TEXT = "give UTF-8 text, one JSON object a line"

Row = JsonObject


def opened(path: Path) -> IO[bytes]:
    """Open an ordinary file for reading.

    Raises
    ------
    BesaError
        The file is missing, not an ordinary file, or unreadable.
    """
    disk.require_regular(path)
    with reading(path, "check the file and its permissions"):
        return path.open("rb")


def refuse_other_encodings(path: Path, begin: bytes) -> None:
    """Refuse a file that begins with the byte order mark of another encoding than UTF-8."""
    for mark, name in _OTHER_MARKS.items():
        if begin.startswith(mark):
            raise BesaError(f"{path} is {name} text, not UTF-8", f"convert it: iconv -f {name} -t UTF-8")


def names(all_names: Iterable[str]) -> str:
    """Format names of fields or columns for an error: the first few, each shortened."""
    listed = list(all_names)
    shown = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in listed[:_NAMES]]
    others = f" and {len(listed) - _NAMES} more" if len(listed) > _NAMES else ""
    return ", ".join(shown) + others or "none"


def is_unicode(text: str) -> bool:
    """Return False for a string with a lone surrogate, which JSON can hold but no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield line number (from 1) and object of every non-blank line of a JSON-lines file.

    A byte order mark at the start is left out.

    Raises
    ------
    BesaError
        The file cannot be read, unpacks to more than the limit, or a line is not a JSON object (the line is named).
    """
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield number, _object(path, number, line)


def _lines(path: Path) -> Iterator[bytes]:
    compressed = path.name.lower().endswith(".gz")
    number, size, limit = 0, 0, _unpacked_limit(path, compressed=compressed)
    with opened(path) as raw, gzip.open(raw) if compressed else raw as file:
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
                if limit is not None and size > limit:
                    raise BesaError(
                        f"{path} unpacks to more than {limit >> 20} MiB, {GROWTH} times its own size", "unpack it first"
                    )
                yield line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise BesaError(
                f"{path} is not a whole gzip file: {error} (after line {number})", "fetch or compress it again"
            ) from error
        except OSError as error:
            raise BesaError(f"cannot read {path}: {reason_of(error)}", "check the file and its permissions") from error


def _unpacked_limit(path: Path, *, compressed: bool) -> int | None:
    """Return the largest allowed unpacked size of a file in bytes; None for a plain file."""
    if not compressed:
        return None
    disk.require_regular(path)
    return max(SMALL, GROWTH * path.stat().st_size)


def _object(path: Path, number: int, line: bytes) -> Row:
    """Parse one line as a JSON object; errors name the line."""
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
    """Return name and type of every column of a parquet file.

    Raises
    ------
    BesaError
        The file cannot be read.
    """
    with opened(path) as file, _parquet(path):
        return {field.name: str(field.type) for field in _file(file).schema_arrow}


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
    """Yield number (from 1) and values of every row of a parquet file.

    Parameters
    ----------
    path : Path
    columns : sequence of str, optional
        Columns to read; all by default.

    Raises
    ------
    BesaError
        The file cannot be read, or unpacks to more than the limit.
    """
    number = 0
    with opened(path) as file:
        with _parquet(path):
            parquet = _file(file)
        _refuse_growth(path, parquet.metadata)
        with _parquet(path):
            batches = parquet.iter_batches(batch_size=_ROWS, columns=columns)
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
        raise BesaError(f"{path} is not a whole parquet file ({reason})", "fetch or write it again") from error


def _refuse_growth(path: Path, metadata: "pyarrow.parquet.FileMetaData") -> None:
    unpacked = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    limit = max(SMALL, GROWTH * path.stat().st_size)
    if unpacked > limit:
        raise BesaError(
            f"{path} unpacks to {unpacked >> 20} MiB, more than {GROWTH} times its own size", "unpack the text"
        )
