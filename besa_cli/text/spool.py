"""Texts and token ids that may be too many for memory: beyond 64 MiB they lie in a temporary file without a name."""

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
_LARGE_FILES = Path("/var/tmp")  # /tmp often lies in memory itself
_AT_ONCE = 1 << 16  # numbers that are converted at a time
_PART = 1 << 20  # characters
_WIDTH = array("q").itemsize


class Spool:
    """Bytes put one after the other, and read again from any place.

    Parameters
    ----------
    kept : int, default=64 MiB
        Bytes that are held in memory; with more, all go to a file.
    """

    def __init__(self, kept: int = IN_MEMORY) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=kept, dir=_directory())  # noqa: SIM115 - closed with this
        weakref.finalize(self, self._file.close)
        self._size, self._kept = 0, kept

    def __len__(self) -> int:
        """Bytes so far."""
        return self._size

    def append(self, data: bytes) -> None:
        """Put bytes at the end.

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
                "free disk space, or name another place with the environment variable TMPDIR",
            ) from error
        self._size += len(data)

    def whole(self) -> "bytearray | mmap.mmap":
        """All bytes, to be looked at together; those in a file are mapped, not read. Nothing is added afterwards."""
        if self._size <= self._kept:
            return bytearray(self.read(0, self._size))
        self._file.flush()
        return mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_COPY)

    def cut(self, size: int) -> None:
        """Take away what is beyond the first bytes."""
        self._size = size

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to before `stop`."""
        self._file.seek(start)
        return self._file.read(stop - start)


def _directory() -> str | None:
    """Where large temporary files belong; None for the platform's own place."""
    if "TMPDIR" in os.environ or not os.access(_LARGE_FILES, os.W_OK | os.X_OK):
        return None
    return str(_LARGE_FILES)


@dataclass(frozen=True)
class LongText:
    """One text that is too long to be held whole.

    Parameters
    ----------
    parts : callable
        Reads it from its start, in parts of some size, whenever it is called.
    """

    parts: Callable[[], Iterator[str]]


Text = str | LongText


def parts(text: Text) -> Iterator[str]:
    """A text in parts that, joined, are the whole."""
    if not isinstance(text, str):
        return text.parts()
    return (text[start : start + _PART] for start in range(0, len(text), _PART))


class Texts(Sequence[str]):
    """Texts in the order in which they were added; each is read when it is asked for."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._spool, self._ends = Spool(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add a text."""
        self._spool.append(text.encode("utf-8"))
        self._ends.append(len(self._spool))

    @property
    def size(self) -> int:
        """Bytes of all texts in UTF-8."""
        return len(self._spool)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """One text, or several."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return self._spool.read(self._ends[number], self._ends[number + 1]).decode("utf-8")


class Numbers:
    """Lists of whole numbers of 64 bits, one after the other, and any stretch of them."""

    def __init__(self) -> None:
        self._spool = Spool()

    def add(self, numbers: Iterable[int]) -> range:
        """Put numbers at the end; returns where they are."""
        start, left = len(self._spool) // _WIDTH, iter(numbers)
        while some := array("q", islice(left, _AT_ONCE)):
            self._spool.append(some.tobytes())
        return range(start, len(self._spool) // _WIDTH)

    def whole(self) -> "bytearray | mmap.mmap":
        """All numbers as bytes. See `Spool.whole`."""
        return self._spool.whole()

    def drop_last(self, added: range) -> None:
        """Take away what was added last."""
        self._spool.cut(added.start * _WIDTH)

    def read(self, places: range) -> "array[int]":
        """The numbers at some places."""
        found = array("q")
        found.frombytes(self._spool.read(places.start * _WIDTH, places.stop * _WIDTH))
        return found
