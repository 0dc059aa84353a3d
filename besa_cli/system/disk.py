"""Files that are either whole or absent: everything that `besa` writes goes through here."""

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

Json = Mapping[str, Any]

MANIFEST = "besa.json"  # says of a directory what it is and what made it


def safe_name(name: str) -> str:
    """The name with a hyphen for every character that a file's name had better not hold."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk and rename it to `path`.

    A file that exists under its own name is therefore whole, whenever the process dies.

    Raises
    ------
    BesaError
        The directory cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _begin(temporary)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fchmod(file.fileno(), mode)  # libraries that write a file of their own make it private
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_directory(path.parent)
    except OSError as error:
        raise BesaError(
            f"cannot write {path}: {error.strerror or error}",
            "free disk space or name another directory with --run; everything finished so far is kept",
        ) from error
    finally:
        _remove(temporary)


def _begin(temporary: Path) -> int:
    """Make an empty file where no link leads elsewhere; its mode, as the umask of this process makes it."""
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file of besa's own, which is made where it is missing; a link is not followed.

    Raises
    ------
    BesaError
        It is a link, a pipe or a device, or cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe without a reader waits
    try:
        with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not an ordinary file")
            file.write(line + "\n")
    except OSError as error:
        reason = "it is a link" if error.errno == errno.ELOOP else error.strerror or error
        raise BesaError(f"cannot write {path}: {reason}", "move it away, and run the same command again") from error


def sweep(path: Path) -> None:
    """Remove what killed processes left of `path`; the caller holds the lock that its writers need."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        _remove(left)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # the directory itself may be the problem; the caller's error says so
        return


def free(path: Path) -> int:
    """Bytes that are free where `path` is or would be made."""
    return shutil.disk_usage(_nearest(path)).free


def require_writable(path: Path) -> None:
    """Refuse a place where nothing may be written, without writing anything.

    Raises
    ------
    BesaError
        The nearest directory that exists is not writable.
    """
    place = _nearest(path)
    if not os.access(place, os.W_OK | os.X_OK):
        raise BesaError(f"cannot write {path}: {place} is not writable", "name another directory with --run")


def _nearest(path: Path) -> Path:
    """The path itself, or the first directory above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def flush_directory(directory: Path) -> None:
    """Make renames in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Write a safetensors file to `path` itself, with the bytes that the library would write.

    The library's own writer fills a file of a random name beside `path`, which nobody knows after a kill.

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
    """Length and header of a safetensors file, and the names in the order of their data.

    The library gives order and dtypes: it writes the header of empty tensors with these names.
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
    """Write one JSON object, whole or not at all, keys in the order given."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    publish(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


LARGEST_JSON = 512 << 20  # bytes; the largest tokenizers and indexes in use have a tenth of it


def require_regular(path: Path) -> None:
    """Refuse what is not an ordinary file: a pipe or a device never ends, or never begins.

    Raises
    ------
    BesaError
        It is missing, cannot be looked at, or is something else.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise BesaError(f"cannot read {path}: {reason_of(error)}", "check the path and who may read it") from error
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    raise BesaError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file", "name an ordinary file")


def read_text(path: Path, largest: int = LARGEST_JSON) -> str:
    """The UTF-8 text of an ordinary file of at most `largest` bytes.

    Raises
    ------
    BesaError
        It is not an ordinary file, larger, unreadable or not UTF-8.
    """
    require_regular(path)
    with reading(path):
        size = path.stat().st_size
        if size > largest:
            raise BesaError(f"{path} has {size} bytes, more than the {largest} that such a file may have", _RESTORE)
        return path.read_text(encoding="utf-8")


_RESTORE = "restore the file, or make its directory anew"


def read_json(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """Read one JSON object; a file that does not hold one is named in the error.

    Parameters
    ----------
    path : Path
    unique : bool
        Refuse a name that is given twice in one object.

    Raises
    ------
    BesaError
        The file cannot be read, or does not hold one JSON object.
    """
    return parse_json(read_text(path), path, unique=unique)


def parse_json(text: str | bytes, place: Path | str, *, unique: bool = False) -> dict[str, Any]:
    """One JSON object out of a text; `place` is where it was found, for the error. See `read_json`."""
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except (ValueError, RecursionError) as error:
        raise BesaError(f"cannot read {place}: {reason_of(error)}", _RESTORE) from error
    if not isinstance(value, dict):
        raise BesaError(f"{place} does not hold a JSON object", _RESTORE)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is given twice")
        found[name] = value
    return found


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
