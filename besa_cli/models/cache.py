"""The user's cache of converted checkpoints: each converted once, whole or absent, and checked for changes before use.

A cached directory records the SHA-256 of every file. A file is hashed again only when its stamp (size, times, inode)
differs from the one at which the digest was computed; the stamp includes the inode's change time, which programs cannot
set. A job reads all weights anyway: `confirm` compares what it has read.
"""

import contextlib
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

from besa_cli.errors import BesaError
from besa_cli.system.disk import Json, JsonObject, read_json, require_regular, sha256_file, write_json
from besa_cli.system.notes import Notify

FILES = "besa-cache.json"  # the digests of a cached directory
SETTLED_SECONDS = 2.0  # a file changed more recently could change again without a new time stamp


def root() -> Path:
    """Return the cache directory: ``$BESA_CACHE``, or the platform's default.

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
            "there is no home directory to keep converted models in", "set BESA_CACHE=DIR to a directory for them"
        ) from error


def get_or_make(name: str, make: Callable[[Path], None], *, notify: Notify) -> Path:
    """Return the cached directory `name`, filled by `make` unless it already exists undamaged.

    `make` fills a temporary directory, which is renamed once everything is on the disk: a directory under its own name
    is complete. A lock serializes processes; the second one uses the result of the first.

    Parameters
    ----------
    name : str
        Path below the cache directory.
    make : callable
        Fills the directory that it is given.
    notify : callable
        Called with one-line notes.

    Raises
    ------
    BesaError
        The cache cannot be written or the disk is full.
    """
    import filelock
    import safetensors

    directory = root() / name
    if _directory_is_undamaged(directory):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(directory.with_name(f".{directory.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            notify(f"waiting for another besa process that is making {directory}")
            lock.acquire()
        try:
            if not _directory_is_undamaged(directory):
                _make(directory, make, notify)
        finally:
            lock.release()
    except (OSError, safetensors.SafetensorError) as error:
        raise BesaError(
            f"cannot write the cache {directory}: {getattr(error, 'strerror', None) or error}",
            "free disk space, or set the environment variable BESA_CACHE to another directory",
        ) from error
    return directory


def _make(directory: Path, make: Callable[[Path], None], notify: Notify) -> None:
    if directory.exists():
        notify(f"{directory} is damaged; making it again")
        shutil.rmtree(directory)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        make(partial)
        mode = stat.S_IMODE(partial.stat().st_mode) & 0o666  # the umask's; libraries make their files private
        for path in _content_files(partial):
            with path.open("rb+") as file:
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
        _record_digests(partial)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _content_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != FILES)


def _record_digests(directory: Path) -> None:
    write_json(
        directory / FILES,
        {"files": {str(path.relative_to(directory)): sha256_file(path) for path in _content_files(directory)}},
    )


def _directory_is_undamaged(directory: Path) -> bool:
    """Check that every file still has its recorded digest."""
    files = _read_record(directory / FILES).get("files")
    if not isinstance(files, dict) or not files:
        return False
    try:
        if all(isinstance(size, int) for size in files.values()):  # an older format that records sizes alone
            if any((directory / name).stat().st_size != size for name, size in files.items()):
                return False
            with contextlib.suppress(BesaError):  # a shared cache may be read-only
                _record_digests(directory)
            return True
        return all(digest(directory / name) == value for name, value in files.items())
    except (BesaError, OSError):
        return False


def digest(path: Path) -> str:
    """Compute the SHA-256 of an ordinary file, remembered in the cache by the file's stamp.

    Raises
    ------
    BesaError
        The path is not an ordinary file.
    """
    require_regular(path)
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    record = _record_path("digests", str(path.resolve()))
    recorded = _read_record(record)
    if recorded.get("stamp") == stamp:
        return str(recorded["sha256"])
    value = sha256_file(path)
    if time.time() - status.st_ctime > SETTLED_SECONDS:
        _write_record(record, {"stamp": stamp, "sha256": value})  # only saves time
    return value


def _record_path(folder: str, key: str) -> Path | None:
    """Return the path of the record `key` in a folder of the cache; None without a home directory."""
    try:
        return root() / folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.json"
    except BesaError:
        return None


def confirm(directory: Path, content: str) -> None:
    """Compare the digest of the weights that a job has read from a directory with the digest of their first use.

    Only cached directories are checked: conversions, and snapshots of the hub. A disk can corrupt a file without
    changing its stamp; on a mismatch the remembered digests are dropped, so that the next command hashes the files in
    full and converts or fetches them again.

    Parameters
    ----------
    directory : Path
    content : str
        Digest of the weights, as returned by `weights.check`.

    Raises
    ------
    BesaError
        The digest differs.
    """
    weights = _digests(directory)
    if weights is None:
        return
    record = _record_path("contents", repr(sorted(weights.values())))
    recorded = _read_record(record).get("content")
    if recorded is None:
        _write_record(record, {"content": content})
    elif recorded != content:
        for name in weights:
            digests = _record_path("digests", str((directory / name).resolve()))
            if digests is not None:
                digests.unlink(missing_ok=True)
        raise BesaError(
            f"the weights in {directory} have changed since their first use: the disk has damaged them",
            "run the same command again: it converts or fetches them again",
        )


def _digests(directory: Path) -> dict[str, str] | None:
    """Return the expected digests of a cached directory's weight files; None for a directory of the user's own."""
    weights = sorted(path.name for path in directory.glob("*.safetensors"))
    record = _record_path("models", "")
    is_converted = record is not None and record.parents[1] in directory.absolute().parents
    files = _read_record(directory / FILES).get("files") if is_converted else None
    expected = files if isinstance(files, dict) else {name: blob_name(directory / name) for name in weights}
    digests = {name: str(expected[name]) for name in weights if expected.get(name)}
    return digests if digests and len(digests) == len(weights) else None


def blob_name(path: Path) -> str | None:
    """Return the name of the blob that a file in a hub snapshot links to; None if there is no link or no digest."""
    if not path.is_symlink():
        return None
    blob = path.readlink()
    is_digest = len(blob.name) in (40, 64) and set(blob.name) <= set("0123456789abcdef")
    return blob.name if blob.parent.name == "blobs" and is_digest else None


def is_undamaged(path: Path) -> bool:
    """Check that a file of the hub's cache has the digest that names its blob; True if the blob has another name."""
    name = blob_name(path)
    if name is None:
        return True
    return digest(path) == name if len(name) == 64 else matches_digest(path, name)


def matches_digest(path: Path, name: str, progress: Callable[[int], None] = lambda _: None) -> bool:
    """Check a file against a digest: SHA-256, SHA-1, or the SHA-1 of git's blob format.

    Parameters
    ----------
    path : Path
    name : str
        64 hexadecimal digits (SHA-256) or 40 (git's blob SHA-1, or a plain SHA-1, which mirrors of the hub use).
    progress : callable
        Called with the size in bytes of each chunk read.
    """
    require_regular(path)
    hashes = [hashlib.sha256()] if len(name) == 64 else [hashlib.sha1(usedforsecurity=False) for _ in range(2)]
    if len(name) == 40:
        hashes[0].update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            progress(len(chunk))
            for algorithm in hashes:
                algorithm.update(chunk)
    return name in {algorithm.hexdigest() for algorithm in hashes}


def _read_record(path: Path | None) -> JsonObject:
    """Read a record of an earlier run; empty if it cannot be read."""
    try:
        return {} if path is None else read_json(path)
    except BesaError:
        return {}


def _write_record(path: Path | None, value: Json) -> None:
    """Write a record for later runs, if possible: a shared cache may be read-only."""
    if path is not None:
        with contextlib.suppress(BesaError):
            write_json(path, value)
