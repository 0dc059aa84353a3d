"""Files made smaller for downloads: one zstd stream a file, written and read a piece at a time.

A compressed file is the file's name with ``.zst``; ``zstd -d`` gives it back as well. What is compressed are
safetensors files, which say at their beginning how long they are: no more than that is ever expanded.
"""

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from besa_cli.errors import BesaError, reason_of
from besa_cli.system import disk

SUFFIX = ".zst"
LONGEST_HEADER = 100_000_000  # bytes; the safetensors library reads no longer one
_PIECE = 1 << 20  # bytes in memory
_AGAIN = "fetch or copy the file again"


def compress(path: Path) -> Path:
    """Replace a file by its compressed form; returns that.

    Raises
    ------
    BesaError
        It cannot be written; the file is still there.
    """
    target = path.with_name(path.name + SUFFIX)
    disk.publish(target, lambda temporary: _write(path, temporary))
    path.unlink()
    return target


def promised(path: Path) -> int:
    """The bytes that a compressed safetensors file has by its own header; no more than the header is expanded.

    Raises
    ------
    BesaError
        It is missing, not an ordinary file, damaged, or holds no safetensors file.
    """
    start = _head(path, 8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= LONGEST_HEADER:
        raise BesaError(f"{path} is damaged: it does not hold a safetensors file", _AGAIN)
    header = disk.parse_json(_head(path, 8 + length)[8:], f"the header in {path}")
    ends = [_end(entry) for name, entry in header.items() if name != "__metadata__"]
    if any(end is None for end in ends):
        raise BesaError(f"{path} is damaged: its header does not say where its tensors end", _AGAIN)
    return 8 + length + max((end for end in ends if end is not None), default=0)


def _end(entry: Any) -> int | None:
    """Where a tensor of a header ends; None where that is not said."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or type(offsets[1]) is not int:
        return None
    return offsets[1] if 0 <= offsets[1] < 1 << 63 else None


def expand(path: Path, directory: Path, largest: int) -> Path:
    """Write what a compressed file holds into a directory; returns the file there. The compressed one stays.

    Parameters
    ----------
    path, directory : Path
    largest : int
        Bytes that it holds at most: with the first one beyond them expanding ends.

    Raises
    ------
    BesaError
        It is missing, cut short or damaged, holds more, or the disk is too small.
    """
    target = directory / path.name.removesuffix(SUFFIX)
    free = disk.free(directory)
    if largest > free:
        raise BesaError(
            f"{path} holds {largest / 1e6:.0f} MB, the disk of {directory} has {free / 1e6:.0f} MB free",
            "free disk space, or name another directory",
        )

    def write(temporary: Path) -> None:
        left = largest
        with temporary.open("wb") as file:
            for piece in _pieces(path):
                left -= len(piece)
                if left < 0:
                    raise BesaError(f"{path} is damaged: it holds more than the {largest} bytes it promises", _AGAIN)
                file.write(piece)

    disk.publish(target, write)
    return target


def _write(source: Path, target: Path) -> None:
    import pyarrow

    with source.open("rb") as file, target.open("wb") as sink, pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        shutil.copyfileobj(file, stream, _PIECE)


def _head(path: Path, count: int) -> bytes:
    """The first `count` bytes of what a compressed file holds, or fewer where there are no more."""
    found = bytearray()
    for piece in _pieces(path):
        found += piece
        if len(found) >= count:
            break
    return bytes(found[:count])


def _pieces(path: Path) -> Iterator[bytes]:
    """What a compressed file holds, a piece at a time."""
    import pyarrow

    if not path.exists():
        raise BesaError(f"{path} is missing", _AGAIN)
    disk.require_regular(path)
    try:
        if path.stat().st_size == 0:
            raise OSError("it is empty")  # which pyarrow takes for a stream of nothing
        with path.open("rb") as file, pyarrow.input_stream(file, compression="zstd") as stream:
            while piece := stream.read(_PIECE):
                yield piece
    except OSError as error:
        raise BesaError(f"{path} is cut short or damaged: {reason_of(error)}", _AGAIN) from error
