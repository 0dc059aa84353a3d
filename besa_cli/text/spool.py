"""Texts and token ids beyond memory: more than 64 MiB are kept in an unnamed temporary file."""

import mmap
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import overload

from besa_cli.errors import BesaError, reason_of

IN_MEMORY = 64 << 20  # bytes
_LARGE_FILES = Path("/var/tmp")  # /tmp is often in memory itself
_AT_ONCE = 1 << 16  # numbers converted at a time
_PART = 1 << 20  # characters
_WIDTH = array("q").itemsize


class Spool:
    """Append-only bytes, readable at any position.

    Parameters
    ----------
    kept : int, default=64 MiB
        Largest size in memory, in bytes; beyond it, all go to a file.
    """

    def __init__(self, kept: int = IN_MEMORY) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=kept, dir=_directory())  # noqa: SIM115 - closed with this object
        weakref.finalize(self, self._file.close)
        self._size, self._kept = 0, kept

    def __len__(self) -> int:
        """Return the size in bytes."""
        return self._size

    def append(self, data: bytes) -> None:
        """Append bytes.

        Raises
        ------
        BesaError
            The disk is full.
        """
        try:
            self._file.seek(self._size)
            self._file.write(data)
        except OSError as error:
            place = _directory() or tempfile.gettempdir()
            raise BesaError(
                f"cannot write a temporary file in {place}: {reason_of(error)}",
                "free disk space, or set the environment variable TMPDIR to another directory",
            ) from error
        self._size += len(data)

    def whole(self) -> "bytearray | mmap.mmap":
        """Return all bytes in one buffer, memory-mapped if they are in a file; nothing may be appended afterwards."""
        if self._size <= self._kept:
            return bytearray(self.read(0, self._size))
        self._file.flush()
        return mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_COPY)

    def cut(self, size: int) -> None:
        """Truncate to `size` bytes."""
        self._size = size

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`."""
        self._file.seek(start)
        return self._file.read(stop - start)


def _directory() -> str | None:
    """Return the directory for large temporary files; None for the platform's default."""
    if "TMPDIR" in os.environ or not os.access(_LARGE_FILES, os.W_OK | os.X_OK):
        return None
    return str(_LARGE_FILES)


@dataclass(frozen=True)
class LongText:
    """A text too long for memory.

    Parameters
    ----------
    parts : callable
        Returns an iterator over the text from its start, in parts of any size.
    """

    parts: Callable[[], Iterator[str]]


Text = str | LongText


def parts(text: Text) -> Iterator[str]:
    """Yield a text in consecutive parts."""
    if not isinstance(text, str):
        return text.parts()
    return (text[start : start + _PART] for start in range(0, len(text), _PART))


class Texts(Sequence[str]):
    """Texts in the order in which they were added, each read on access."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._spool, self._ends = Spool(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Append a text."""
        self._spool.append(text.encode("utf-8"))
        self._ends.append(len(self._spool))

    @property
    def size(self) -> int:
        """Size of all texts in bytes of UTF-8."""
        return len(self._spool)

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one text, or a list of texts for a slice."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return self._spool.read(self._ends[number], self._ends[number + 1]).decode("utf-8")


class Numbers:
    """Appended lists of 64-bit integers, readable in any range."""

    def __init__(self) -> None:
        self._spool = Spool()

    def add(self, numbers: Iterable[int]) -> range:
        """Append numbers; return the range of their positions."""
        start, remaining = len(self._spool) // _WIDTH, iter(numbers)
        while chunk := array("q", islice(remaining, _AT_ONCE)):
            self._spool.append(chunk.tobytes())
        return range(start, len(self._spool) // _WIDTH)

    def whole(self) -> "bytearray | mmap.mmap":
        """Return the bytes of all numbers in one buffer; nothing may be added afterwards."""
        return self._spool.whole()

    def drop_last(self, added: range) -> None:
        """Remove the numbers that were added last."""
        self._spool.cut(added.start * _WIDTH)

    def read(self, places: range) -> "array[int]":
        """Return the numbers at a range of positions."""
        numbers = array("q")
        numbers.frombytes(self._spool.read(places.start * _WIDTH, places.stop * _WIDTH))
        return numbers
