"""Resumable transfers from the hub: received bytes are kept when the connection breaks, and every wait is bounded.

`hf_hub_download` discards a partial file when it is cut off, trusts every ETag and commit of an answer, and accepts any
number of bytes. The files end up where it would have put them, in the hub's own cache.
"""

import contextlib
import os
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from besa_cli.errors import BesaError, reason_of
from besa_cli.models import answers, cache, hub_errors
from besa_cli.system.notes import Notify

STALL_SECONDS = 60.0
LEAST_BYTES = 60_000  # that must arrive in STALL_SECONDS
NOTE_SECONDS = 10.0
TRIES = 3

_PARTIAL = ".besa.incomplete"
_UNDECLARED = 100_000_000  # most bytes of a file whose size the hub does not state


@dataclass
class Progress:
    """Progress of a transfer: the number of bytes read from the connection or from an earlier part."""

    count: int = 0

    def add(self, count: int) -> None:
        """Count bytes that were read."""
        self.count += count


@dataclass(frozen=True, kw_only=True)
class Download:
    """The files of one commit of one model or data set.

    Parameters
    ----------
    repo, commit : str
        ``org/name``, and the commit of every file.
    sizes : dict
        Size in bytes of every file of the commit; 0 if the hub does not state it.
    notify : callable
        Called with one-line notes.
    digests : dict, optional
        SHA-256 of the files for which the hub states it.
    kind : {"model", "dataset"}
    cache : Path, optional
        The hub's cache directory; the user's own by default.
    endpoint : str, optional
        The hub's address; by default that of the environment.
    """

    repo: str
    commit: str
    sizes: dict[str, int]
    notify: Notify
    digests: dict[str, str] = field(default_factory=dict)
    kind: Literal["model", "dataset"] = "model"
    cache: Path | None = None
    endpoint: str | None = None

    @property
    def snapshot(self) -> Path:
        """Directory of the complete files."""
        return self._storage / "snapshots" / self.commit

    @property
    def _cache(self) -> Path:
        from huggingface_hub import constants

        return self.cache or Path(constants.HF_HUB_CACHE)

    @property
    def _storage(self) -> Path:
        from huggingface_hub.file_download import repo_folder_name

        return self._cache / repo_folder_name(repo_id=self.repo, repo_type=self.kind)

    def fetch(self, names: list[str]) -> None:
        """Fetch those of the files that are not yet in the hub's cache.

        Raises
        ------
        BesaError
            A file is missing or not as declared, the disk is full, or the transfer broke off or stalled.
        """
        missing = [name for name in names if not self._is_whole(name)]
        for name in missing:
            if name not in self.sizes:
                raise BesaError(
                    f"{self.repo} on the hub lacks {name}, named in its index", "report it to the model's owner"
                )
        if not missing:
            return
        self._check_space(missing)
        failures: list[Exception] = []
        progress = Progress()

        def work() -> None:
            try:
                for name in missing:
                    self._fetch_file(name, progress)
            except Exception as error:  # noqa: BLE001  # an answer can make the libraries raise anything
                failures.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self._watch(thread, missing, progress)
        if failures:
            raise self._explain(failures[0], missing) from failures[0]

    def _is_whole(self, name: str) -> bool:
        """Check that the file is in the cache; remove it if it does not have the digest in its name."""
        path = self.snapshot / name
        if not path.exists():
            return False
        if cache.is_undamaged(path):
            return True
        self.notify(f"{path} is damaged; fetching it again")
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        return False

    def _check_space(self, names: list[str]) -> None:
        directory = next(path for path in (self._storage, *self._storage.parents) if path.exists())
        free, needed = shutil.disk_usage(directory).free, self._total_bytes(names) - self._present_bytes(names)
        if free < needed:
            raise BesaError(
                f"{self.repo} needs {hub_errors.size(needed)} in {directory}, which has {hub_errors.size(free)} free",
                "free disk space, or set the environment variable HF_HOME to another directory",
            )

    def _total_bytes(self, names: list[str]) -> int:
        return sum(self.sizes[name] for name in names)

    def _present_bytes(self, names: list[str], pattern: str = f"*{_PARTIAL}") -> int:
        """Count the bytes of these files on the disk, in complete and partial files."""
        count = sum(self.sizes[name] for name in names if (self.snapshot / name).exists())
        for path in (self._storage / "blobs").glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # it may just have been completed and renamed
                count += path.stat().st_size
        return count

    def remember(self, revision: str) -> None:
        """Record in the hub's cache that a branch or tag names the commit, once its files are complete."""
        reference = self._storage / "refs" / revision
        if revision == self.commit or (reference.is_file() and reference.read_text() == self.commit):
            return
        with contextlib.suppress(OSError):  # only a later run without a network needs it
            reference.parent.mkdir(parents=True, exist_ok=True)
            temporary = reference.with_name(f".{reference.name}.{os.getpid()}.partial")
            temporary.write_text(self.commit)
            temporary.replace(reference)

    def _watch(self, thread: threading.Thread, names: list[str], progress: Progress) -> None:
        """Wait for the transfer, report its progress, and give up when it stalls or hardly moves."""
        total, reached = self._total_bytes(names), (0, 0)
        moved = reported = time.monotonic()
        while thread.is_alive():
            thread.join(0.2)
            now, have = time.monotonic(), self._present_bytes(names, "*.incomplete")
            state = (sum((self.snapshot / name).exists() for name in names), progress.count + have)
            if state[0] > reached[0] or state[1] >= reached[1] + LEAST_BYTES:
                reached, moved = state, now
            if now - reported > NOTE_SECONDS:
                reported = now
                self.notify(f"{self.repo}: {hub_errors.size(min(have, total))} of {hub_errors.size(total)}")
            if now - moved > STALL_SECONDS:
                received = hub_errors.size(state[1] - reached[1]) if state[1] > reached[1] else "nothing"
                raise hub_errors.cut_off(
                    self.repo,
                    f"{received} received in {STALL_SECONDS:.0f} s",
                    min(self._present_bytes(names), total),
                    total,
                )

    def _explain(self, error: Exception, names: list[str]) -> BesaError:
        if isinstance(error, BesaError):
            return error
        if not isinstance(error, hub_errors.kinds()):
            return BesaError(
                f"cannot read the hub's answer for {self.repo}: {reason_of(error)}", answers.CHECK_ENDPOINT
            )
        translated = hub_errors.translate(error, self.repo, self.commit)
        if not hub_errors.is_transient(translated):
            return translated
        total = self._total_bytes(names)
        return hub_errors.cut_off(self.repo, hub_errors.reason(error), min(self._present_bytes(names), total), total)

    def _fetch_file(self, name: str, progress: Progress) -> None:
        """Fetch one file into the hub's cache, and resume after a broken connection as long as bytes arrive."""
        tries = 0
        while True:
            before = self._present_bytes([name])
            try:
                return self._try_once(name, progress)
            except hub_errors.broken() as error:
                tries = 1 if self._present_bytes([name]) > before else tries + 1
                if tries >= TRIES or hub_errors.is_answer(error):
                    raise
                time.sleep(tries)

    def _try_once(self, name: str, progress: Progress) -> None:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

        url = hf_hub_url(self.repo, name, repo_type=self.kind, revision=self.commit, endpoint=self.endpoint)
        answer = get_hf_file_metadata(url, timeout=answers.ANSWER_SECONDS, endpoint=self.endpoint)
        metadata = answers.file_metadata(answer, name, self.commit)
        self._require_as_listed(name, metadata)
        if (metadata.size or 0) > constants.MAX_HTTP_DOWNLOAD_SIZE:  # only its own library fetches these
            with answers.guarded(metadata.tag, self.commit):
                hf_hub_download(
                    self.repo,
                    name,
                    repo_type=self.kind,
                    revision=self.commit,
                    endpoint=self.endpoint,
                    cache_dir=self.cache,
                )
            return
        blob = self._storage / "blobs" / metadata.tag
        self._fetch_blob(url, name, blob, metadata.size, progress)
        _link_or_copy(blob, self.snapshot / name)

    def _require_as_listed(self, name: str, metadata: answers.FileMetadata) -> None:
        """Refuse a file whose size or digest differs from the listing."""
        size, digest = self.sizes.get(name), self.digests.get(name)
        if size and metadata.size is not None and metadata.size != size:
            difference = f"{metadata.size} bytes, but its listing states {size}"
        elif digest is not None and metadata.tag != digest:
            difference = f"the digest {metadata.tag}, but its listing states {digest}"
        else:
            return
        raise BesaError(f"the hub states for {name} of {self.repo} {difference}", "run the same command again later")

    def _fetch_blob(self, url: str, name: str, blob: Path, size: int | None, progress: Progress) -> None:
        """Fetch a file, resuming a partial one of this or an earlier run, and check its digest."""
        import filelock

        locks = self._cache / ".locks" / self._storage.name
        for folder in (blob.parent, locks):
            folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(locks / f"{blob.name}.lock"):  # the lock of the hub's library for this file
            if blob.exists():
                return
            partial = blob.with_name(f"{blob.name}{_PARTIAL}")
            try:
                _append(url, partial, size, progress)
            except TooLong as error:
                partial.unlink()
                raise BesaError(
                    f"the hub sends more than the {error} bytes of {name} of {self.repo}",
                    "check HF_ENDPOINT, or try again later",
                ) from error
            if not cache.matches_digest(partial, blob.name, progress.add):
                partial.unlink()
                raise BesaError(f"{name} of {self.repo} arrived damaged", "run the same command again")
            partial.replace(blob)


class TooLong(Exception):
    """Reception of more bytes than the file has."""


def _append(url: str, partial: Path, size: int | None, progress: Progress) -> None:
    """Append the missing bytes of `partial`.

    Raises
    ------
    TooLong
        More bytes were received than the file has.
    """
    limit = _UNDECLARED if size is None else size
    with partial.open("ab") as file:
        have = file.tell()
        if have > limit or size is None:
            file.truncate(have := 0)
        if have == size:
            return
        with answers.open_response(url, have) as response:
            if response.status_code != 206:
                file.truncate(have := 0)
            length = response.headers.get("Content-Length", "0")
            if length.isdecimal() and int(length[:20]) > limit - have:
                raise TooLong(limit)
            for chunk in response.iter_raw():
                have += len(chunk)
                progress.add(len(chunk))
                if have > limit:
                    raise TooLong(limit)
                file.write(chunk)
                file.flush()


def _link_or_copy(blob: Path, target: Path) -> None:
    """Make a snapshot's file the blob: a symbolic link as in the hub's library, or a copy where links do not work."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(os.path.relpath(blob, target.parent))
    except FileExistsError:
        return
    except OSError:
        shutil.copyfile(blob, target)
