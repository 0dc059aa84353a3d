"""One file of a data set from the Hugging Face hub or its cache; a hub that cannot be reached is noticed in seconds."""

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from besa_cli.errors import BesaError

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
        The hub answered, but the download broke off.
    """
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(
        file.repository, file.path, cache_dir=hub.cache, revision=file.revision, repo_type="dataset"
    )
    if isinstance(cached, str):
        return _fetched(Path(cached), file)
    if hub.offline:
        raise Unreachable("HF_HUB_OFFLINE is set, and the file is not in the hub's cache")
    _probe(file, hub)
    notify(f"fetching {file.path} of {file.repository} from {hub.endpoint}")
    with _no_progress_bars():
        try:
            path = huggingface_hub.hf_hub_download(
                file.repository,
                file.path,
                revision=file.revision,
                repo_type="dataset",
                cache_dir=hub.cache,
                endpoint=hub.endpoint,
                etag_timeout=hub.timeout,
            )
        except _network_errors() as error:
            raise BesaError(
                f"the download of {file.path} of {file.repository} broke off: {error}",
                "run the same command again: the download goes on where it stopped",
            ) from error
    return _fetched(Path(path), file)


def _fetched(path: Path, file: RemoteFile) -> Fetched:
    """The commit is in the path: …/snapshots/<commit>/<path in the repository>."""
    return Fetched(path=path, commit=path.parents[len(Path(file.path).parts) - 1].name)


def _probe(file: RemoteFile, hub: Hub) -> None:
    """Ask once whether the hub gives the file out; in a thread, since a name look-up knows no time limit of its own."""
    answers: list[str | None] = []
    thread = threading.Thread(target=lambda: answers.append(_refusal(file, hub)), daemon=True)
    thread.start()
    thread.join(hub.timeout)
    if not answers:
        raise Unreachable(f"no answer from {hub.endpoint} within {hub.timeout:g} s")
    if answers[0] is not None:
        raise Unreachable(answers[0])


def _refusal(file: RemoteFile, hub: Hub) -> str | None:
    """Why the hub would not give the file out, or None where it would."""
    import huggingface_hub

    url = huggingface_hub.hf_hub_url(
        file.repository, file.path, repo_type="dataset", revision=file.revision, endpoint=hub.endpoint
    )
    try:
        found = huggingface_hub.get_hf_file_metadata(url, timeout=hub.timeout, endpoint=hub.endpoint)
        if found.commit_hash is None:
            return f"what answers at {hub.endpoint} is not a model hub"
        if not found.location.startswith(hub.endpoint):  # the files lie elsewhere: is that place reachable too?
            huggingface_hub.get_session().head(found.location, timeout=hub.timeout)
    except _network_errors() as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        return f"{hub.endpoint}: {first_line}"
    return None


def _network_errors() -> tuple[type[Exception], ...]:
    """What the hub library raises; the base class of its HTTP client's errors differs between its versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """The hub library draws no bars within; as it was afterwards."""
    bars = importlib.import_module("huggingface_hub.utils")  # documented names, but not exported for type checkers
    were_disabled = bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            bars.enable_progress_bars()
