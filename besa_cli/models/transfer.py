"""Fetching files from the hub: what has come is kept when the line is cut, and nothing is waited for without end.

Files are fetched here, because `hf_hub_download` throws away what it has of a file when it is cut off, believes every
tag and commit that an answer names, and takes whatever comes for as long as it comes. They end where it would have put
them, in the hub's own cache.
"""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from besa_cli.errors import BesaError, reason_of
from besa_cli.models import answers, cache, hub_errors

STALL_SECONDS = 60.0
LEAST_BYTES = 60_000  # that have to come in STALL_SECONDS
NOTE_SECONDS = 10.0
TRIES = 3

_PARTIAL = ".besa.incomplete"
_UNDECLARED = 100_000_000  # bytes of a file whose length the hub does not say


@dataclass
class Pulse:
    """What shows that a transfer is alive: the bytes that were read from the line or from an earlier part."""

    count: int = 0

    def hear(self, count: int) -> None:
        """Count bytes that were read."""
        self.count += count


@dataclass(frozen=True, kw_only=True)
class Download:
    """The files of one commit of one model or data set.

    Parameters
    ----------
    repo, commit : str
        ``org/name``, and the commit that every file is taken from.
    sizes : dict
        The length in bytes of every file of the commit, 0 where the hub does not say.
    notify : callable
        Takes one-line notes.
    digests : dict, optional
        The SHA-256 of files, where the hub says it.
    kind : {"model", "dataset"}
    cache : Path, optional
        The hub's cache directory; the user's own if not given.
    endpoint : str, optional
        The hub's address; that of the environment if not given.
    """

    repo: str
    commit: str
    sizes: dict[str, int]
    notify: Callable[[str], None]
    digests: dict[str, str] = field(default_factory=dict)
    kind: Literal["model", "dataset"] = "model"
    cache: Path | None = None
    endpoint: str | None = None

    @property
    def snapshot(self) -> Path:
        """Where the files lie when they are complete."""
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
        """Fetch those of the files that are not in the hub's cache yet.

        Raises
        ------
        BesaError
            A file is missing or not what was declared, the disk is full, or the transfer broke off or stood still.
        """
        wanted = [name for name in names if not self._is_whole(name)]
        for name in wanted:
            if name not in self.sizes:
                raise BesaError(f"{self.repo} on the hub lacks {name}, named in its index", "tell the model's owner")
        if not wanted:
            return
        self._check_space(wanted)
        failures: list[Exception] = []
        pulse = Pulse()

        def work() -> None:
            try:
                for name in wanted:
                    self._file(name, pulse)
            except Exception as error:  # noqa: BLE001  # whatever an answer makes the libraries raise, it is said once
                failures.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self._watch(thread, wanted, pulse)
        if failures:
            raise self._explain(failures[0], wanted) from failures[0]

    def _is_whole(self, name: str) -> bool:
        """Whether the file is in the cache; one that is not what its tag says is taken out of it."""
        path = self.snapshot / name
        if not path.exists():
            return False
        if cache.is_what_it_was(path):
            return True
        self.notify(f"{path} is damaged and is fetched again")
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        return False

    def _check_space(self, names: list[str]) -> None:
        place = next(path for path in (self._storage, *self._storage.parents) if path.exists())
        free, needed = shutil.disk_usage(place).free, self._total(names) - self._have(names)
        if free < needed:
            raise BesaError(
                f"{self.repo} needs {hub_errors.size(needed)} in {place}, which has {hub_errors.size(free)} free",
                "free disk space, or name another place with the environment variable HF_HOME",
            )

    def _total(self, names: list[str]) -> int:
        return sum(self.sizes[name] for name in names)

    def _have(self, names: list[str], pattern: str = f"*{_PARTIAL}") -> int:
        """The bytes of these files that are on the disk, finished or not."""
        count = sum(self.sizes[name] for name in names if (self.snapshot / name).exists())
        for path in (self._storage / "blobs").glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # it may be finished and renamed at this very moment
                count += path.stat().st_size
        return count

    def remember(self, revision: str) -> None:
        """Note in the hub's cache that a branch or tag stands for the commit, now that its files are there."""
        reference = self._storage / "refs" / revision
        if revision == self.commit or (reference.is_file() and reference.read_text() == self.commit):
            return
        with contextlib.suppress(OSError):  # only a later run without network would miss it
            reference.parent.mkdir(parents=True, exist_ok=True)
            temporary = reference.with_name(f".{reference.name}.{os.getpid()}.partial")
            temporary.write_text(self.commit)
            temporary.replace(reference)

    def _watch(self, thread: threading.Thread, names: list[str], pulse: Pulse) -> None:
        """Wait for the transfer, say how far it is, and give it up when it stands still or hardly moves."""
        total, reached = self._total(names), (0, 0)
        moved = noted = time.monotonic()
        while thread.is_alive():
            thread.join(0.2)
            now, have = time.monotonic(), self._have(names, "*.incomplete")
            seen = (sum((self.snapshot / name).exists() for name in names), pulse.count + have)
            if seen[0] > reached[0] or seen[1] >= reached[1] + LEAST_BYTES:
                reached, moved = seen, now
            if now - noted > NOTE_SECONDS:
                noted = now
                self.notify(f"{self.repo}: {hub_errors.size(min(have, total))} of {hub_errors.size(total)}")
            if now - moved > STALL_SECONDS:
                came = hub_errors.size(seen[1] - reached[1]) if seen[1] > reached[1] else "nothing"
                raise hub_errors.cut_off(
                    self.repo, f"{came} came for {STALL_SECONDS:.0f} s", min(self._have(names), total), total
                )

    def _explain(self, error: Exception, names: list[str]) -> BesaError:
        if isinstance(error, BesaError):
            return error
        if not isinstance(error, hub_errors.kinds()):
            return BesaError(f"cannot read what the hub answers for {self.repo}: {reason_of(error)}", answers.DISTRUST)
        translated = hub_errors.translate(error, self.repo, self.commit)
        if not hub_errors.is_passing(translated):
            return translated
        total = self._total(names)
        return hub_errors.cut_off(self.repo, hub_errors.reason(error), min(self._have(names), total), total)

    def _file(self, name: str, pulse: Pulse) -> None:
        """Put one file into the hub's cache; a line that breaks is taken up again as long as anything comes."""
        tries = 0
        while True:
            before = self._have([name])
            try:
                return self._once(name, pulse)
            except hub_errors.broken() as error:
                tries = 1 if self._have([name]) > before else tries + 1
                if tries >= TRIES or hub_errors.is_answer(error):
                    raise
                time.sleep(tries)

    def _once(self, name: str, pulse: Pulse) -> None:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

        url = hf_hub_url(self.repo, name, repo_type=self.kind, revision=self.commit, endpoint=self.endpoint)
        known = get_hf_file_metadata(url, timeout=answers.ANSWER_SECONDS, endpoint=self.endpoint)
        facts = answers.facts(known, name, self.commit)
        self._compare(name, facts)
        if (facts.size or 0) > constants.MAX_HTTP_DOWNLOAD_SIZE:  # the hub gives it out in its own way alone
            with answers.guarded(facts.tag, self.commit):
                hf_hub_download(
                    self.repo,
                    name,
                    repo_type=self.kind,
                    revision=self.commit,
                    endpoint=self.endpoint,
                    cache_dir=self.cache,
                )
            return
        blob = self._storage / "blobs" / facts.tag
        self._blob(url, name, blob, facts.size, pulse)
        _link(blob, self.snapshot / name)

    def _compare(self, name: str, facts: answers.FileFacts) -> None:
        """Refuse a file that the listing describes otherwise."""
        size, digest = self.sizes.get(name), self.digests.get(name)
        if size and facts.size is not None and facts.size != size:
            said = f"{facts.size} bytes, where its listing says {size}"
        elif digest is not None and facts.tag != digest:
            said = f"the digest {facts.tag}, where its listing says {digest}"
        else:
            return
        raise BesaError(f"the hub says that {name} of {self.repo} has {said}", "run the same command again later")

    def _blob(self, url: str, name: str, blob: Path, size: int | None, pulse: Pulse) -> None:
        """Fetch a file from where the last attempt stopped, also one of an earlier run, and check its digest."""
        import filelock

        locks = self._cache / ".locks" / self._storage.name
        for folder in (blob.parent, locks):
            folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(locks / f"{blob.name}.lock"):  # the one that the hub's library takes for this file
            if blob.exists():
                return
            partial = blob.with_name(f"{blob.name}{_PARTIAL}")
            try:
                _append(url, partial, size, pulse)
            except TooLong as error:
                partial.unlink()
                raise BesaError(
                    f"the hub sends more of {name} of {self.repo} than the {error} bytes that it has",
                    "check HF_ENDPOINT, or try again later",
                ) from error
            if not cache.is_as_named(partial, blob.name, pulse.hear):
                partial.unlink()
                raise BesaError(f"{name} of {self.repo} arrived damaged", "run the same command again")
            partial.replace(blob)


class TooLong(Exception):
    """More came than there is."""


def _append(url: str, partial: Path, size: int | None, pulse: Pulse) -> None:
    """Fetch what `partial` lacks of its bytes.

    Raises
    ------
    TooLong
        More came than the file has.
    """
    most = _UNDECLARED if size is None else size
    with partial.open("ab") as file:
        have = file.tell()
        if have > most or size is None:
            file.truncate(have := 0)
        if have == size:
            return
        with answers.asked(url, have) as response:
            if response.status_code != 206:
                file.truncate(have := 0)
            length = response.headers.get("Content-Length", "0")
            if length.isdecimal() and int(length[:20]) > most - have:
                raise TooLong(most)
            for chunk in response.iter_raw():
                have += len(chunk)
                pulse.hear(len(chunk))
                if have > most:
                    raise TooLong(most)
                file.write(chunk)
                file.flush()


def _link(blob: Path, place: Path) -> None:
    """Let a snapshot's file be the blob: a link as the hub's library makes it, a copy where there are no links."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(os.path.relpath(blob, place.parent))
    except FileExistsError:
        return
    except OSError:
        shutil.copyfile(blob, place)
