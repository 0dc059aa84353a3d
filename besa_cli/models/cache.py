"""The user's cache: converted checkpoints, each made once, whole or absent."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from besa_cli.disk import read_json, sha256_file, write_json
from besa_cli.errors import BesaError

FILES = "besa-cache.json"  # the digests of a cached directory


def root() -> Path:
    """The cache directory: ``$BESA_CACHE``, or the platform's own place for it."""
    import platformdirs

    chosen = os.environ.get("BESA_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("besa")


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
        files = {}
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            files[str(path.relative_to(partial))] = path.stat().st_size
            _flush(path)
        write_json(partial / FILES, {"files": files})
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _is_whole(directory: Path) -> bool:
    files = _noted(directory / FILES).get("files", {})
    return bool(files) and all(
        (directory / name).is_file() and (directory / name).stat().st_size == size for name, size in files.items()
    )


def digest(path: Path) -> str:
    """The SHA-256 of a file, remembered in the cache by path, size and time of change."""
    from hashlib import sha256

    status = path.stat()
    identity = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"
    note = root() / "digests" / f"{sha256(identity.encode()).hexdigest()[:32]}.json"
    known = _noted(note)
    if known.get("file") == identity:
        return str(known["sha256"])
    value = sha256_file(path)
    with contextlib.suppress(BesaError):  # it would only save time
        write_json(note, {"file": identity, "sha256": value})
    return value


def _noted(path: Path) -> dict[str, Any]:
    """What an earlier run wrote down; nothing if that cannot be read."""
    try:
        return read_json(path)
    except BesaError:
        return {}
