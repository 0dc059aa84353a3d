"""Single files of data sets from the Hugging Face hub or its cache; an unreachable hub is noticed within seconds."""

import threading
from dataclasses import dataclass
from pathlib import Path

from besa_cli.errors import BesaError
from besa_cli.models import answers, cache, hub_errors, transfer
from besa_cli.system.notes import Notify

TIMEOUT = 8.0  # seconds until the hub counts as unreachable


class Unreachable(BesaError):
    """Failure to reach the hub, or the file on it.

    Parameters
    ----------
    reason : str
        The cause, in a few words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"the hub cannot be reached: {reason}")
        self.reason = " ".join(reason.split())


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Address, time limit and cache directory of a hub.

    Parameters
    ----------
    endpoint : str
        Address, without a trailing slash.
    offline : bool
        Use only what is in the cache.
    timeout : float, default=8.0
        Seconds to wait for the first answer, including DNS.
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
    """A local copy of a file on the hub, and its commit."""

    path: Path
    commit: str


def from_environment() -> Hub:
    """Return the hub that ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` define."""
    from huggingface_hub import constants

    return Hub(endpoint=constants.ENDPOINT, offline=constants.HF_HUB_OFFLINE)


def fetch(file: RemoteFile, hub: Hub, *, notify: Notify) -> Fetched:
    """Return the file from the hub's cache, or fetch it, resuming an interrupted download.

    Raises
    ------
    Unreachable
        The hub did not answer within ``hub.timeout`` seconds, or does not serve the file.
    BesaError
        The answer is not that of a hub, or the download broke off.
    """
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(
        file.repository, file.path, cache_dir=hub.cache, revision=file.revision, repo_type="dataset"
    )
    if isinstance(cached, str):
        if cache.is_undamaged(Path(cached)):
            return _fetched(Path(cached), file)
        if hub.offline:
            raise BesaError(f"{cached} is damaged: it has changed since it was fetched", "unset HF_HUB_OFFLINE")
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
    """Take the commit from the path: …/snapshots/<commit>/<path in the repository>."""
    return Fetched(path=path, commit=path.parents[len(Path(file.path).parts) - 1].name)


def _probe(file: RemoteFile, hub: Hub) -> tuple[str, int | None]:
    """Ask the hub for the commit and size of the file, in a thread since DNS look-ups have no time limit."""
    results: list[tuple[str, int | None] | BesaError] = []

    def ask() -> None:
        try:
            results.append(_request_metadata(file, hub))
        except BesaError as error:
            results.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(hub.timeout)
    if not results:
        raise Unreachable(f"no answer from {hub.endpoint} within {hub.timeout:g} s")
    if isinstance(results[0], BesaError):
        raise results[0]
    return results[0]


def _request_metadata(file: RemoteFile, hub: Hub) -> tuple[str, int | None]:
    import huggingface_hub

    url = huggingface_hub.hf_hub_url(
        file.repository, file.path, repo_type="dataset", revision=file.revision, endpoint=hub.endpoint
    )
    try:
        metadata = huggingface_hub.get_hf_file_metadata(url, timeout=hub.timeout, endpoint=hub.endpoint)
        if metadata.commit_hash is None:
            raise Unreachable(f"the server at {hub.endpoint} is not a model hub")
        if not metadata.location.startswith(hub.endpoint):  # the file is on another server, which must be reachable too
            huggingface_hub.get_session().head(metadata.location, timeout=hub.timeout)
    except _network_errors() as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise Unreachable(f"{hub.endpoint}: {first_line}") from error
    commit = answers.digest(metadata.commit_hash, f"the commit of {file.repository}")
    return commit, answers.file_metadata(metadata, file.path, commit).size


def _network_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of the hub library; the base class of its HTTP errors differs between versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)
