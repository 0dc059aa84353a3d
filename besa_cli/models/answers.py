"""Checked answers of the hub: bounded in bytes and validated before any part becomes a local path.

The hub is the server that `HF_ENDPOINT` names, so its answers are not trusted. Commits and ETags must be digests of 40
or 64 hexadecimal digits, file names must lie below the repository, and a file must have its declared size and the
digest in its ETag.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from besa_cli.errors import BesaError
from besa_cli.system.disk import Json, parse_json

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

ANSWER_SECONDS = 8.0

_LARGEST_LISTING = 100_000_000
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_FILE = re.compile(r"[^/\\\x00-\x1f\x7f]{1,255}")
Response = Any  # of httpx, whose package has another name in each version of the hub's library
CHECK_ENDPOINT = "check HF_ENDPOINT: the server there does not answer like the Hugging Face hub"


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A commit and its files.

    Attributes
    ----------
    commit : str
    sizes : dict
        Size of every file in bytes; 0 if the hub does not state it.
    digests : dict
        SHA-256 of the large (LFS) files.
    """

    commit: str
    sizes: dict[str, int]
    digests: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class FileMetadata:
    """Metadata of one file on the hub: its ETag (the digest of its content) and its size in bytes, None if unknown."""

    tag: str
    size: int | None


def listing(repo: str, revision: str | None) -> Listing:
    """List the files of a model at a revision.

    Raises
    ------
    BesaError
        The answer is not a listing, names an invalid commit or file, or is too long.
    Exception
        Raised by the hub's library when the hub refuses; see `hub_errors.kinds`.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented

    validate_repo_id(repo)
    url = f"{constants.ENDPOINT}/api/models/{repo}"
    url += f"/revision/{quote(revision, safe='')}" if revision is not None else ""
    body = bytearray()
    with open_response(f"{url}?blobs=true") as response:
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > _LARGEST_LISTING:
                raise BesaError(
                    f"the listing of {repo} at {constants.ENDPOINT} is larger than {_LARGEST_LISTING} bytes",
                    CHECK_ENDPOINT,
                )
    return _listing(parse_json(bytes(body), f"the answer from {url}"), repo)


def _listing(answer: Json, repo: str) -> Listing:
    commit = digest(answer.get("sha"), f"the commit of {repo}")
    siblings = answer.get("siblings") or []
    sizes, digests = dict[str, int](), dict[str, str]()
    if not isinstance(siblings, list) or not all(isinstance(entry, dict) for entry in siblings):
        raise BesaError(f"the listing of {repo} has no list of files", CHECK_ENDPOINT)
    for entry in siblings:
        name, size, large = entry.get("rfilename"), entry.get("size") or 0, entry.get("lfs") or {}
        if not _is_below(name):
            raise BesaError(f"the listing of {repo} has an invalid file name {str(name)[:80]!r}", CHECK_ENDPOINT)
        if type(size) is not int or size < 0 or not isinstance(large, dict):
            raise BesaError(
                f"the listing of {repo} states an invalid size for {name}: {str(size)[:80]}", CHECK_ENDPOINT
            )
        sizes[name] = size
        if large.get("sha256") is not None:
            digests[name] = digest(large["sha256"], f"the digest of {name}")
    return Listing(commit=commit, sizes=sizes, digests=digests)


def _is_below(name: object) -> bool:
    """Check that a name is that of a file below the repository."""
    return isinstance(name, str) and all(_FILE.fullmatch(part) and part not in (".", "..") for part in name.split("/"))


def digest(value: object, subject: str) -> str:
    """Return `value` after checking that it is a digest of 40 or 64 hexadecimal digits and so safe as part of a path.

    Raises
    ------
    BesaError
        The value is not a digest.
    """
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise BesaError(f"the hub states {subject} as {str(value)[:80]!r}, which is not a digest", CHECK_ENDPOINT)
    return value


def file_metadata(header: "HfFileMetadata", name: str, commit: str) -> FileMetadata:
    """Extract a file's metadata from the header of its answer, checked against the requested commit.

    Raises
    ------
    BesaError
        The ETag or the commit is not a digest, the commit differs from the requested one, or the size is negative.
    """
    tag = digest(header.etag, f"the tag of {name}")
    if digest(header.commit_hash, f"the commit of {name}") != commit:
        raise BesaError(f"the hub states the commit {header.commit_hash} for {name}, not {commit}", CHECK_ENDPOINT)
    if header.size is not None and header.size < 0:
        raise BesaError(f"the hub states an invalid size for {name}: {header.size} bytes", CHECK_ENDPOINT)
    return FileMetadata(tag=tag, size=header.size)


@contextmanager
def open_response(url: str, start: int = 0) -> Iterator[Response]:
    """Open the hub's answer to a GET request, streamed and not decompressed.

    It begins at byte `start` if the server supports that.

    Raises
    ------
    Exception
        Raised by the hub's library for a refusal; the body of the answer is not read.
    """
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with get_session().stream("GET", url, headers=headers, timeout=ANSWER_SECONDS) as response:
        if response.status_code >= 400:
            details = {
                name: response.headers[name] for name in ("X-Error-Code", "X-Error-Message") if name in response.headers
            }
            hf_raise_for_status(type(response)(response.status_code, headers=details, request=response.request))
        yield response


@contextmanager
def guarded(tag: str | None = None, commit: str | None = None) -> Iterator[None]:
    """Check every answer that the hub's library receives in this context.

    Parameters
    ----------
    tag, commit : str, optional
        Required ETag and commit of every answer; any digest is accepted if not given.
    """
    from huggingface_hub import get_session

    hooks, seconds = get_session().event_hooks, get_session().timeout

    def check(response: Response) -> None:
        answered = response.headers.get("X-Repo-Commit")
        if answered is None:
            return
        _require_match(answered, commit, "commit")
        etag = response.headers.get("X-Linked-Etag") or response.headers.get("ETag")
        if etag is not None and response.request.method == "HEAD":
            _require_match(etag.removeprefix("W/").strip('"'), tag, "tag")

    set_clients({**hooks, "response": [*hooks.get("response", []), check]}, seconds)
    try:
        yield
    finally:
        set_clients(hooks, seconds)


def set_clients(hooks: Mapping[str, list[Callable[..., object]]], seconds: Any) -> None:
    """Set the event hooks and the read timeout of every client that the hub's library makes from now on.

    The library makes a new client whenever a connection fails.

    Parameters
    ----------
    hooks : dict
        Event hooks of httpx.
    seconds : float or httpx.Timeout
        Longest wait for the next bytes.
    """
    from huggingface_hub import get_session, set_client_factory

    kind = type(get_session())
    set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=seconds))


def _require_match(value: str, expected: str | None, subject: str) -> None:
    """Refuse a commit or ETag that is not a digest or differs from the expected one."""
    if digest(value, f"the {subject}") != (expected or value):
        raise BesaError(f"the hub states the {subject} {value}, but stated {expected} before", CHECK_ENDPOINT)
