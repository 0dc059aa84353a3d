"""One file of a data set from the Hugging Face hub or its cache; a hub that cannot be reached is noticed in seconds."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from besa_cli.errors import BesaError
from besa_cli.models import answers, cache, hub_errors, transfer

TIMEOUT = 8.0  # seconds until the hub counts as unreachable


class Unreachable(BesaError):
    """The hub, or the file on it, cannot be reached.

    Parameters
    ----------
    reason : str
        Why, in a few words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"the hub cannot be reached: {reason}")
        self.reason = " ".join(reason.split())


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Which hub, how long to wait for its first answer, and where its files are kept.

    Parameters
    ----------
    endpoint : str
        Address, without a slash at the end.
    offline : bool
        Use only what is in the cache.
    timeout : float, default=8.0
        Seconds for the first answer, name look-up included.
    cache : Path or None, default=None
        The hub's cache directory; None for the user's own.
    """

    endpoint: str
    offline: bool
    timeout: float = TIMEOUT
    cache: Path | None = None


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a data set's repository."""

    repository: str
    path: str
    revision: str = "main"


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A file of the hub on this machine, and the commit that it is of."""

    path: Path
    commit: str


def from_environment() -> Hub:
    """The hub that ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` name."""
    from huggingface_hub import constants

    return Hub(endpoint=constants.ENDPOINT, offline=constants.HF_HUB_OFFLINE)


def fetch(file: RemoteFile, hub: Hub, *, notify: Callable[[str], None]) -> Fetched:
    """The file from the hub's cache, else from the hub; a download that was cut off goes on where it stopped.

    Raises
    ------
    Unreachable
        The hub gave no answer within ``hub.timeout`` seconds, or does not give the file out.
    BesaError
        The hub answered, but what it says is not what a hub does, or the download broke off.
    """
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(
        file.repository, file.path, cache_dir=hub.cache, revision=file.revision, repo_type="dataset"
    )
    if isinstance(cached, str):
        if cache.is_undamaged(Path(cached)):
            return _fetched(Path(cached), file)
        if hub.offline:
            raise BesaError(f"{cached} is damaged: it is not what it was when it was fetched", "unset HF_HUB_OFFLINE")
    if hub.offline:
        raise Unreachable("HF_HUB_OFFLINE is set, and the file is not in the hub's cache")
    commit, size = _probe(file, hub)
    if hub.cache is None:
        hub_errors.require_cache()
    notify(f"fetching {file.path} of {file.repository} from {hub.endpoint}")
    download = transfer.Download(
        repo=file.repository,
        commit=commit,
        sizes={file.path: size or 0},
        notify=notify,
        kind="dataset",
        cache=hub.cache,
        endpoint=hub.endpoint,
    )
    download.fetch([file.path])
    download.remember(file.revision)
    return Fetched(path=download.snapshot / file.path, commit=commit)


def _fetched(path: Path, file: RemoteFile) -> Fetched:
    """The commit is in the path: …/snapshots/<commit>/<path in the repository>."""
    return Fetched(path=path, commit=path.parents[len(Path(file.path).parts) - 1].name)


def _probe(file: RemoteFile, hub: Hub) -> tuple[str, int | None]:
    """Ask once whether the hub gives the file out, of which commit, and how long it is.

    In a thread, since a name look-up knows no time limit of its own.
    """
    found: list[tuple[str, int | None] | BesaError] = []

    def ask() -> None:
        try:
            found.append(_asked(file, hub))
        except BesaError as error:
            found.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(hub.timeout)
    if not found:
        raise Unreachable(f"no answer from {hub.endpoint} within {hub.timeout:g} s")
    if isinstance(found[0], BesaError):
        raise found[0]
    return found[0]


def _asked(file: RemoteFile, hub: Hub) -> tuple[str, int | None]:
    import huggingface_hub

    url = huggingface_hub.hf_hub_url(
        file.repository, file.path, repo_type="dataset", revision=file.revision, endpoint=hub.endpoint
    )
    try:
        found = huggingface_hub.get_hf_file_metadata(url, timeout=hub.timeout, endpoint=hub.endpoint)
        if found.commit_hash is None:
            raise Unreachable(f"what answers at {hub.endpoint} is not a model hub")
        if not found.location.startswith(hub.endpoint):  # the files lie elsewhere: is that place reachable too?
            huggingface_hub.get_session().head(found.location, timeout=hub.timeout)
    except _network_errors() as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise Unreachable(f"{hub.endpoint}: {first_line}") from error
    commit = answers.digest(found.commit_hash, f"the commit of {file.repository}")
    return commit, answers.file_metadata(found, file.path, commit).size


def _network_errors() -> tuple[type[Exception], ...]:
    """What the hub library raises; the base class of its HTTP client's errors differs between its versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)
