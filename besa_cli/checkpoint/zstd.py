"""Compression of files for downloads: one zstd stream per file, written and read piece by piece.

The compressed file has the suffix ``.zst``; ``zstd -d`` decompresses it as well. Only safetensors files are compressed:
their header states their length, and no more bytes than that are ever decompressed.
"""

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from besa_cli.errors import BesaError, reason_of
from besa_cli.system import disk

SUFFIX = ".zst"
LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_PIECE = 1 << 20  # bytes in memory
_AGAIN = "fetch or copy the file again"


def compress(path: Path) -> Path:
    """Replace a file by its compressed form and return the new path.

    Raises
    ------
    BesaError
        The compressed file cannot be written; the original is kept.
    """
    target = path.with_name(path.name + SUFFIX)
    disk.publish(target, lambda temporary: _write(path, temporary))
    path.unlink()
    return target


def declared_size(path: Path) -> int:
    """Return the decompressed bytes of a safetensors file by its header; only the header is decompressed.

    Raises
    ------
    BesaError
        The file is missing, not a regular file, damaged, or does not hold a safetensors file.
    """
    start = _head(path, 8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= LONGEST_HEADER:
        raise BesaError(f"{path} is damaged: it does not hold a safetensors file", _AGAIN)
    header = disk.parse_json(_head(path, 8 + length)[8:], f"the header in {path}")
    ends = [_end(entry) for name, entry in header.items() if name != "__metadata__"]
    if any(end is None for end in ends):
        raise BesaError(f"{path} is damaged: its header lacks the offsets of its tensors", _AGAIN)
    return 8 + length + max((end for end in ends if end is not None), default=0)


def _end(entry: object) -> int | None:
    """Return the end offset in a tensor's header entry; None if the entry is invalid."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or type(offsets[1]) is not int:
        return None
    return offsets[1] if 0 <= offsets[1] < 1 << 63 else None


def expand(path: Path, directory: Path, largest: int) -> Path:
    """Decompress a file into a directory and return the new file; the compressed one is kept.

    Parameters
    ----------
    path, directory : Path
    largest : int
        Limit of the decompressed bytes; decompression stops with an error beyond it.

    Raises
    ------
    BesaError
        The file is missing, cut short or damaged, or holds more bytes, or the disk is too small.
    """
    target = directory / path.name.removesuffix(SUFFIX)
    free = disk.free(directory)
    if largest > free:
        raise BesaError(
            f"{path} holds {largest / 1e6:.0f} MB, the disk of {directory} has {free / 1e6:.0f} MB free",
            "free disk space, or name another directory",
        )

    def write(temporary: Path) -> None:
        remaining = largest
        with temporary.open("wb") as file:
            for piece in _pieces(path):
                remaining -= len(piece)
                if remaining < 0:
                    raise BesaError(
                        f"{path} is damaged: it holds more than the {largest} bytes that its header states", _AGAIN
                    )
                file.write(piece)

    disk.publish(target, write)
    return target


def _write(source: Path, target: Path) -> None:
    import pyarrow

    with source.open("rb") as file, target.open("wb") as sink, pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        shutil.copyfileobj(file, stream, _PIECE)


def _head(path: Path, count: int) -> bytes:
    """Return the first `count` decompressed bytes of a file, or all if there are fewer."""
    start = bytearray()
    for piece in _pieces(path):
        start += piece
        if len(start) >= count:
            break
    return bytes(start[:count])


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file, piece by piece."""
    import pyarrow

    if not path.exists():
        raise BesaError(f"{path} is missing", _AGAIN)
    disk.require_regular(path)
    try:
        if path.stat().st_size == 0:
            raise OSError("it is empty")  # pyarrow accepts it as an empty stream
        with path.open("rb") as file, pyarrow.input_stream(file, compression="zstd") as stream:
            while piece := stream.read(_PIECE):
                yield piece
    except OSError as error:
        raise BesaError(f"{path} is cut short or damaged: {reason_of(error)}", _AGAIN) from error
