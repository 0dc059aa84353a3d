"""Fetching files from the hub: what has come is kept when the line is cut, and nothing is waited for without end.

Large files are fetched here, because `hf_hub_download` throws away what it has of a file when it is cut off. They end
where it would have put them, in the hub's own cache, and it makes the rest of the entry.
"""

import contextlib
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from besa_cli.disk import sha256_file
from besa_cli.errors import BesaError
from besa_cli.models import hub_errors

ANSWER_SECONDS = 8.0
STALL_SECONDS = 60.0
NOTE_SECONDS = 10.0
TRIES = 3

_SHA256 = re.compile(r"[0-9a-f]{64}")  # the tag of a large file is its digest, that of a small one is git's
_PARTIAL = ".besa.incomplete"


@dataclass(frozen=True, kw_only=True)
class Download:
    """The files of one commit of one model.

    Parameters
    ----------
    repo, commit : str
        ``org/name``, and the commit that every file is taken from.
    sizes : dict
        The length in bytes of every file of the commit.
    notify : callable
        Takes one-line notes.
    """

    repo: str
    commit: str
    sizes: dict[str, int]
    notify: Callable[[str], None]

    @property
    def snapshot(self) -> Path:
        """Where the files lie when they are complete."""
        return self._storage / "snapshots" / self.commit

    @property
    def _storage(self) -> Path:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.repo, repo_type="model")

    def fetch(self, names: list[str]) -> None:
        """Fetch those of the files that are not in the hub's cache yet.

        Raises
        ------
        BesaError
            A file is missing, the disk is full, or the transfer broke off or stood still.
        """
        wanted = [name for name in names if not (self.snapshot / name).exists()]
        for name in wanted:
            if name not in self.sizes:
                raise BesaError(f"{self.repo} on the hub lacks {name}, named in its index", "tell the model's owner")
        if not wanted:
            return
        self._check_space(wanted)
        failures: list[Exception] = []

        def work() -> None:
            try:
                for name in wanted:
                    self._file(name)
            except hub_errors.kinds() as error:
                failures.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self._watch(thread, wanted)
        if failures:
            raise self._explain(failures[0], wanted) from failures[0]

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

    def _watch(self, thread: threading.Thread, names: list[str]) -> None:
        """Wait for the transfer, say how far it is, and give it up when it stands still."""
        total, have = self._total(names), self._have(names, "*.incomplete")
        moved = noted = time.monotonic()
        while thread.is_alive():
            thread.join(0.2)
            now, seen = time.monotonic(), self._have(names, "*.incomplete")
            if seen != have:
                have, moved = seen, now
            if now - noted > NOTE_SECONDS:
                noted = now
                self.notify(f"{self.repo}: {hub_errors.size(min(have, total))} of {hub_errors.size(total)}")
            if now - moved > STALL_SECONDS:
                raise hub_errors.cut_off(
                    self.repo, f"nothing came for {STALL_SECONDS:.0f} s", min(self._have(names), total), total
                )

    def _explain(self, error: Exception, names: list[str]) -> BesaError:
        if isinstance(error, BesaError):
            return error
        translated = hub_errors.translate(error, self.repo, self.commit)
        if not hub_errors.is_passing(translated):
            return translated
        total = self._total(names)
        return hub_errors.cut_off(self.repo, hub_errors.reason(error), min(self._have(names), total), total)

    def _file(self, name: str) -> None:
        """Put one file into the hub's cache; a line that breaks is taken up again as long as anything comes."""
        tries = 0
        while True:
            before = self._have([name])
            try:
                return self._once(name)
            except hub_errors.broken() as error:
                tries = 1 if self._have([name]) > before else tries + 1
                if tries >= TRIES or hub_errors.is_answer(error):
                    raise
                time.sleep(tries)

    def _once(self, name: str) -> None:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

        url = hf_hub_url(self.repo, name, revision=self.commit)
        known = get_hf_file_metadata(url, timeout=ANSWER_SECONDS)
        large = known.etag is not None and _SHA256.fullmatch(known.etag) is not None
        if large and known.size is not None and known.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            self._resume(url, self._storage / "blobs" / str(known.etag), known.size)
        hf_hub_download(self.repo, name, revision=self.commit, etag_timeout=ANSWER_SECONDS)

    def _resume(self, url: str, blob: Path, size: int) -> None:
        """Fetch a large file from where the last attempt stopped, also one of an earlier run, and check its digest."""
        import filelock
        from huggingface_hub import constants

        locks = Path(constants.HF_HUB_CACHE) / ".locks" / self._storage.name
        for folder in (blob.parent, locks):
            folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(locks / f"{blob.name}.lock"):  # the one that the hub's library takes for this file
            if blob.exists():
                return
            partial = blob.with_name(f"{blob.name}{_PARTIAL}")
            _append(url, partial, size)
            if sha256_file(partial) != blob.name:
                partial.unlink()
                raise BesaError(f"a file of {self.repo} arrived damaged", "run the same command again")
            partial.replace(blob)


def _append(url: str, partial: Path, size: int) -> None:
    """Fetch what `partial` lacks of its `size` bytes."""
    from huggingface_hub import get_session, get_token, hf_raise_for_status

    with partial.open("ab") as file:
        have = file.tell()
        if have > size:
            file.truncate(have := 0)
        if have == size:
            return
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
        if token := get_token():
            headers["Authorization"] = f"Bearer {token}"
        with get_session().stream("GET", url, headers=headers, timeout=ANSWER_SECONDS) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:
                file.truncate(0)
            for chunk in response.iter_raw():
                file.write(chunk)
                file.flush()
