"""The user's cache: converted checkpoints, each made once, whole or absent, and found out when it has changed.

What is cached carries the SHA-256 of every file. A file is read again for it when its stamp (size, times, inode) is not
the one that the digest was computed at; the time of the inode's own change, which no program can set, is part of that.
A job reads all weights anyway: `confirm` compares what it has read.
"""

import contextlib
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from besa_cli.errors import BesaError
from besa_cli.system.disk import read_json, require_regular, sha256_file, write_json

FILES = "besa-cache.json"  # the digests of a cached directory
SETTLED_SECONDS = 2.0  # a file that changed since may change once more without another time: file systems round


def root() -> Path:
    """The cache directory: ``$BESA_CACHE``, or the platform's own place for it.

    Raises
    ------
    BesaError
        There is no home directory.
    """
    import platformdirs

    chosen = os.environ.get("BESA_CACHE")
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute()  # noqa: PTH111  (Path.expanduser fails without a home)
    try:
        return platformdirs.user_cache_path("besa")
    except RuntimeError as error:
        raise BesaError(
            "there is no home directory to keep converted models in", "name a directory for them: BESA_CACHE=DIR"
        ) from error


def made_once(name: str, make: Callable[[Path], None], *, notify: Callable[[str], None]) -> Path:
    """The cached directory `name`, filled by `make` unless it is there and whole.

    `make` fills a directory beside it that is renamed when everything is on the disk, so a directory under its own
    name is complete. Two processes take turns; the second finds what the first has made.

    Raises
    ------
    BesaError
        The cache cannot be written or the disk is full.
    """
    import filelock
    import safetensors

    directory = root() / name
    if _is_whole(directory):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(directory.with_name(f".{directory.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            notify(f"waiting for another besa that is making {directory}")
            lock.acquire()
        try:
            if not _is_whole(directory):
                _make(directory, make, notify)
        finally:
            lock.release()
    except (OSError, safetensors.SafetensorError) as error:
        raise BesaError(
            f"cannot write the cache {directory}: {getattr(error, 'strerror', None) or error}",
            "free disk space, or name another place with the environment variable BESA_CACHE",
        ) from error
    return directory


def _make(directory: Path, make: Callable[[Path], None], notify: Callable[[str], None]) -> None:
    if directory.exists():
        notify(f"{directory} is damaged and is made again")
        shutil.rmtree(directory)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        make(partial)
        mode = stat.S_IMODE(partial.stat().st_mode) & 0o666  # the umask's; libraries make their files private
        for path in _below(partial):
            with path.open("rb+") as file:
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
        _describe(partial)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != FILES)


def _describe(directory: Path) -> None:
    write_json(
        directory / FILES,
        {"files": {str(path.relative_to(directory)): sha256_file(path) for path in _below(directory)}},
    )


def _is_whole(directory: Path) -> bool:
    """Whether every file is what was made."""
    files = _noted(directory / FILES).get("files")
    if not isinstance(files, dict) or not files:
        return False
    try:
        if all(isinstance(size, int) for size in files.values()):  # releases before this one noted the sizes alone
            if any((directory / name).stat().st_size != size for name, size in files.items()):
                return False
            with contextlib.suppress(BesaError):  # a cache that others share may not be written to
                _describe(directory)
            return True
        return all(digest(directory / name) == value for name, value in files.items())
    except (BesaError, OSError):
        return False


def digest(path: Path) -> str:
    """The SHA-256 of an ordinary file, remembered in the cache by the file's stamp.

    Raises
    ------
    BesaError
        It is not an ordinary file.
    """
    require_regular(path)
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    note = _note("digests", str(path.resolve()))
    known = _noted(note)
    if known.get("stamp") == stamp:
        return str(known["sha256"])
    value = sha256_file(path)
    if time.time() - status.st_ctime > SETTLED_SECONDS:
        _write(note, {"stamp": stamp, "sha256": value})  # it only saves time
    return value


def _note(folder: str, what: str) -> Path | None:
    """Where something is noted; nowhere without a home."""
    try:
        return root() / folder / f"{hashlib.sha256(os.fsencode(what)).hexdigest()[:32]}.json"
    except BesaError:
        return None


def confirm(directory: Path, content: str) -> None:
    """Compare the digest of the weights that a job has read from a directory with what the first job read from it.

    Only cached directories are known: conversions, and snapshots of the hub. Disks forget without a trace in the
    stamp; what has changed in that way is read in full by the next command, and made or fetched again.

    Parameters
    ----------
    directory : Path
    content : str
        As `weights.check` gives it.

    Raises
    ------
    BesaError
        It is another.
    """
    weights = _digests(directory)
    if weights is None:
        return
    note = _note("contents", repr(sorted(weights.values())))
    known = _noted(note).get("content")
    if known is None:
        _write(note, {"content": content})
    elif known != content:
        for name in weights:
            digests = _note("digests", str((directory / name).resolve()))
            if digests is not None:
                digests.unlink(missing_ok=True)
        raise BesaError(
            f"the weights in {directory} are not what they were when they were used first: the disk has damaged them",
            "run the same command again: they are made or fetched anew",
        )


def _digests(directory: Path) -> dict[str, str] | None:
    """The digests that the weight files of a cached directory are to have; None for a directory of the user's."""
    weights = sorted(path.name for path in directory.glob("*.safetensors"))
    kept = _note("models", "")
    own = kept is not None and kept.parents[1] in directory.absolute().parents
    noted = _noted(directory / FILES).get("files") if own else None
    found = noted if isinstance(noted, dict) else {name: blob_name(directory / name) for name in weights}
    known = {name: str(found[name]) for name in weights if found.get(name)}
    return known if known and len(known) == len(weights) else None


def blob_name(path: Path) -> str | None:
    """The name of the blob that a file in a snapshot of the hub's cache is a link to, if the name is a digest."""
    if not path.is_symlink():
        return None
    blob = path.readlink()
    is_digest = len(blob.name) in (40, 64) and set(blob.name) <= set("0123456789abcdef")
    return blob.name if blob.parent.name == "blobs" and is_digest else None


def is_what_it_was(path: Path) -> bool:
    """Whether a file of the hub's cache has the digest that its blob is named by; yes where the name is none."""
    name = blob_name(path)
    if name is None:
        return True
    return digest(path) == name if len(name) == 64 else is_as_named(path, name)


def is_as_named(path: Path, name: str, hear: Callable[[int], None] = lambda _: None) -> bool:
    """Whether a file has the digest that it is named by: SHA-256, or of a small file git's own.

    Parameters
    ----------
    path : Path
    name : str
        64 or 40 hexadecimal digits. Mirrors of the hub name small files by their plain SHA-1.
    hear : callable
        Takes the number of bytes that were read, again and again.
    """
    require_regular(path)
    kinds = [hashlib.sha256()] if len(name) == 64 else [hashlib.sha1(usedforsecurity=False) for _ in range(2)]
    if len(name) == 40:
        kinds[0].update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hear(len(chunk))
            for each in kinds:
                each.update(chunk)
    return name in {each.hexdigest() for each in kinds}


def _noted(note: Path | None) -> dict[str, Any]:
    """What an earlier run wrote down; nothing if that cannot be read."""
    try:
        return {} if note is None else read_json(note)
    except BesaError:
        return {}


def _write(note: Path | None, value: dict[str, Any]) -> None:
    """Write something down for later runs, where that is possible: a cache that others share may not be written to."""
    if note is not None:
        with contextlib.suppress(BesaError):
            write_json(note, value)
