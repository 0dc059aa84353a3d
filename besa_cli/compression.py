"""Files made smaller for downloads: one zstd stream a file, written and read a piece at a time.

A compressed file is the file's name with ``.zst``; ``zstd -d`` gives it back as well.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from besa_cli import disk
from besa_cli.errors import BesaError

SUFFIX = ".zst"
_PIECE = 1 << 20  # bytes in memory


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


def expand(path: Path, directory: Path) -> Path:
    """Write what a compressed file holds into a directory; returns the file there. The compressed one stays.

    Raises
    ------
    BesaError
        It is missing, cut short or damaged.
    """
    target = directory / path.name.removesuffix(SUFFIX)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.writelines(_pieces(path))

    disk.publish(target, write)
    return target


def _write(source: Path, target: Path) -> None:
    import pyarrow

    with source.open("rb") as file, pyarrow.CompressedOutputStream(str(target), "zstd") as stream:
        shutil.copyfileobj(file, stream, _PIECE)


def _pieces(path: Path) -> Iterator[bytes]:
    import pyarrow

    try:
        if path.stat().st_size == 0:
            raise OSError("it is empty")  # which pyarrow takes for a stream of nothing
        with pyarrow.input_stream(str(path), compression="zstd") as stream:
            while piece := stream.read(_PIECE):
                yield piece
    except FileNotFoundError as error:
        raise BesaError(f"{path} is missing", "fetch or copy the file again") from error
    except OSError as error:
        raise BesaError(f"{path} is cut short or damaged: {error}", "fetch or copy the file again") from error
