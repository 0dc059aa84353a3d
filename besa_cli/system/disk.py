"""Atomic file writes, JSON, and checks of paths: every file that `besa` writes is either complete or absent."""

import errno
import glob
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from besa_cli.errors import BesaError, reading, reason_of

if TYPE_CHECKING:
    from torch import Tensor

JsonObject = dict[str, Any]  # a JSON object of unknown fields
Json = Mapping[str, Any]  # the same, only to be read

MANIFEST = "besa.json"  # describes a directory and how it was made


def safe_name(name: str) -> str:
    """Replace every character that is unsafe in a file name by a hyphen."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file atomically: `write` fills a temporary file beside `path`, which is flushed and renamed to `path`.

    A file under its own name is therefore complete, whenever the process dies.

    Raises
    ------
    BesaError
        The directory cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _create_empty(temporary)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fchmod(file.fileno(), mode)  # libraries that create their own file make it private
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_directory(path.parent)
    except OSError as error:
        raise BesaError(
            f"cannot write {path}: {error.strerror or error}",
            "free disk space or name another directory with --run; all finished work is kept",
        ) from error
    finally:
        _remove(temporary)


def _create_empty(temporary: Path) -> int:
    """Create an empty file, never through a link, and return its mode under the umask of this process."""
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file of besa's own, created if missing; links are not followed.

    Raises
    ------
    BesaError
        The file is a link, a pipe or a device, or cannot be written.
    """
    # O_NONBLOCK: opening a pipe without a reader would block
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not an ordinary file")
            file.write(line + "\n")
    except OSError as error:
        reason = "it is a link" if error.errno == errno.ELOOP else error.strerror or error
        raise BesaError(f"cannot write {path}: {reason}", "move it away, and run the same command again") from error


def sweep(path: Path) -> None:
    """Remove temporary files of `path` left by killed processes; the caller holds the lock of its writers."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        _remove(leftover)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # the directory itself may be the cause; the caller reports it
        return


def free(path: Path) -> int:
    """Return the free bytes on the file system where `path` is or would be created."""
    return shutil.disk_usage(_nearest(path)).free


def require_writable(path: Path) -> None:
    """Check that `path` could be written, without writing anything.

    Raises
    ------
    BesaError
        The nearest existing directory is not writable.
    """
    place = _nearest(path)
    if not os.access(place, os.W_OK | os.X_OK):
        raise BesaError(f"cannot write {path}: {place} is not writable", "name another directory with --run")


def _nearest(path: Path) -> Path:
    """Return the path itself, or its nearest existing parent."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def flush_directory(directory: Path) -> None:
    """Flush a directory, so that renames in it survive a power failure."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Write a safetensors file to `path` itself, with the bytes that the library would write.

    The library's own writer fills a file of a random name beside `path`, which a killed process leaves behind.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    header, names = _tensor_header(tensors)
    with path.open("wb") as file:
        file.write(header)
        for name in names:
            file.write(_raw_bytes(tensors[name]))


def _tensor_header(tensors: Mapping[str, "Tensor"]) -> tuple[bytes, list[str]]:
    """Return length and header of a safetensors file, and the names in the order of their data.

    Order and dtypes are the library's: it writes the header for empty tensors of these names.
    """
    from safetensors.torch import save

    empty = save({name: tensor.new_empty(0) for name, tensor in tensors.items()}, metadata={"format": "pt"})
    header = json.loads(empty[8:])
    names, end = [name for name in header if name != "__metadata__"], 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        header[name] |= {"shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, names


def _raw_bytes(tensor: "Tensor") -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def write_json(path: Path, value: Json) -> None:
    """Write one JSON object atomically, keys in the given order."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    publish(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


LARGEST_JSON = 512 << 20  # bytes; ten times the largest tokenizers and indexes in use


def require_regular(path: Path) -> None:
    """Refuse anything but an ordinary file: reading a pipe or a device may never end, or never begin.

    Raises
    ------
    BesaError
        The path is missing, cannot be accessed, or is not an ordinary file.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise BesaError(f"cannot read {path}: {reason_of(error)}", "check the path and its permissions") from error
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    raise BesaError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file", "name an ordinary file")


def read_text(path: Path, largest: int = LARGEST_JSON) -> str:
    """Read the UTF-8 text of an ordinary file of at most `largest` bytes.

    Raises
    ------
    BesaError
        The file is not an ordinary file, too large, unreadable or not UTF-8.
    """
    require_regular(path)
    with reading(path):
        size = path.stat().st_size
        if size > largest:
            raise BesaError(f"{path} has {size} bytes, more than the {largest} allowed for such a file", _RESTORE)
        return path.read_text(encoding="utf-8")


_RESTORE = "restore the file, or make its directory again"


def read_json(path: Path, *, unique: bool = False) -> JsonObject:
    """Read one JSON object from a file.

    Parameters
    ----------
    path : Path
    unique : bool
        Refuse duplicate names in an object.

    Raises
    ------
    BesaError
        The file cannot be read, or does not hold one JSON object; the file is named.
    """
    return parse_json(read_text(path), path, unique=unique)


def parse_json(text: str | bytes, place: Path | str, *, unique: bool = False) -> JsonObject:
    """Parse one JSON object; `place` names its origin in errors.

    Parameters
    ----------
    text : str or bytes
    place : Path or str
    unique : bool
        Refuse duplicate names in an object.

    Raises
    ------
    BesaError
        The text is not one JSON object.
    """
    try:
        value = json.loads(text, object_pairs_hook=_require_unique if unique else None)
    except (ValueError, RecursionError) as error:
        raise BesaError(f"cannot read {place}: {reason_of(error)}", _RESTORE) from error
    if not isinstance(value, dict):
        raise BesaError(f"{place} does not hold a JSON object", _RESTORE)
    return value


def _require_unique(pairs: list[tuple[str, object]]) -> JsonObject:
    result: JsonObject = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name!r} is given twice")
        result[name] = value
    return result


def sha256_file(path: Path) -> str:
    """Compute the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
