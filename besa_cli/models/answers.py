"""What a hub answers, bounded in bytes and checked before any of it becomes a path on this machine.

A hub is whatever `HF_ENDPOINT` names. Commits and tags are digests, 40 or 64 hexadecimal digits; names of files lie
below the repository; a file has the bytes that were declared, and the digest that its tag is.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from besa_cli.errors import BesaError
from besa_cli.system.disk import parse_json

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

ANSWER_SECONDS = 8.0

_LARGEST_LISTING = 100_000_000
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_FILE = re.compile(r"[^/\\\x00-\x1f\x7f]{1,255}")
DISTRUST = "check HF_ENDPOINT: what answers there does not answer as the hub does"


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A commit and its files.

    Attributes
    ----------
    commit : str
    sizes : dict
        The length in bytes of every file, 0 where the hub does not say.
    digests : dict
        The SHA-256 of the large files.
    """

    commit: str
    sizes: dict[str, int]
    digests: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What the hub says of one file: its tag, the digest of its content, and its bytes, None where it does not say."""

    tag: str
    size: int | None


def listing(repo: str, revision: str | None) -> Listing:
    """Ask for the files of a model's revision.

    Raises
    ------
    BesaError
        The answer is not a listing, names a commit or files that can be none, or is too long.
    Exception
        What the hub's library raises where the hub refuses, see `hub_errors.kinds`.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented

    validate_repo_id(repo)
    url = f"{constants.ENDPOINT}/api/models/{repo}"
    url += f"/revision/{quote(revision, safe='')}" if revision is not None else ""
    body = bytearray()
    with asked(f"{url}?blobs=true") as response:
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > _LARGEST_LISTING:
                raise BesaError(f"the listing of {repo} at {constants.ENDPOINT} does not end", DISTRUST)
    return _listing(parse_json(bytes(body), f"the answer of {url}"), repo)


def _listing(found: dict[str, Any], repo: str) -> Listing:
    commit = digest(found.get("sha"), f"the commit of {repo}")
    siblings = found.get("siblings") or []
    sizes, digests = dict[str, int](), dict[str, str]()
    if not isinstance(siblings, list) or not all(isinstance(each, dict) for each in siblings):
        raise BesaError(f"the listing of {repo} names no files", DISTRUST)
    for each in siblings:
        name, size, large = each.get("rfilename"), each.get("size") or 0, each.get("lfs") or {}
        if not _is_below(name):
            raise BesaError(f"the listing of {repo} names a file {str(name)[:80]!r}", DISTRUST)
        if type(size) is not int or size < 0 or not isinstance(large, dict):
            raise BesaError(f"the listing of {repo} says of {name} that it has {str(size)[:80]} bytes", DISTRUST)
        sizes[name] = size
        if large.get("sha256") is not None:
            digests[name] = digest(large["sha256"], f"the digest of {name}")
    return Listing(commit=commit, sizes=sizes, digests=digests)


def _is_below(name: object) -> bool:
    """Whether a name is that of a file below the repository."""
    return isinstance(name, str) and all(_FILE.fullmatch(part) and part not in (".", "..") for part in name.split("/"))


def digest(value: object, what: str) -> str:
    """The value, which is 40 or 64 hexadecimal digits: nothing else becomes a part of a path.

    Raises
    ------
    BesaError
        It is anything else.
    """
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise BesaError(f"{what}, says the hub, is {str(value)[:80]!r}, which is not a digest", DISTRUST)
    return value


def facts(known: "HfFileMetadata", name: str, commit: str) -> FileFacts:
    """What the header of a file's answer says, checked against the commit that was asked for.

    Raises
    ------
    BesaError
        Tag or commit are no digests, or the commit is another.
    """
    tag = digest(known.etag, f"the tag of {name}")
    if digest(known.commit_hash, f"the commit of {name}") != commit:
        raise BesaError(f"{name} is of the commit {known.commit_hash}, not of {commit}, says the hub", DISTRUST)
    if known.size is not None and known.size < 0:
        raise BesaError(f"{name} has {known.size} bytes, says the hub", DISTRUST)
    return FileFacts(tag=tag, size=known.size)


@contextmanager
def asked(url: str, start: int = 0) -> Iterator[Any]:  # a response of httpx, under whatever name that goes this year
    """The hub's answer, as it comes and not unpacked; from byte `start` on where it can.

    Raises
    ------
    Exception
        What the hub's library raises for a refusal; whatever stands below its header is not read.
    """
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with get_session().stream("GET", url, headers=headers, timeout=ANSWER_SECONDS) as response:
        if response.status_code >= 400:
            told = {
                name: response.headers[name] for name in ("X-Error-Code", "X-Error-Message") if name in response.headers
            }
            hf_raise_for_status(type(response)(response.status_code, headers=told, request=response.request))
        yield response


@contextmanager
def guarded(tag: str | None = None, commit: str | None = None) -> Iterator[None]:
    """Let the hub's library, or one that uses it, fetch what is within; an answer that is not a hub's ends it.

    Parameters
    ----------
    tag, commit : str, optional
        Those that every answer has to have; any digest will do if not given.
    """
    from huggingface_hub import get_session

    hooks, seconds = get_session().event_hooks, get_session().timeout

    def check(response: Any) -> None:
        said = response.headers.get("X-Repo-Commit")
        if said is None:
            return
        _same(said, commit, "commit")
        tagged = response.headers.get("X-Linked-Etag") or response.headers.get("ETag")
        if tagged is not None and response.request.method == "HEAD":
            _same(tagged.removeprefix("W/").strip('"'), tag, "tag")

    set_clients({**hooks, "response": [*hooks.get("response", []), check]}, seconds)
    try:
        yield
    finally:
        set_clients(hooks, seconds)


def set_clients(hooks: Any, seconds: Any) -> None:
    """Give every client that the hub's library makes from here on these hooks and seconds to wait for the next bytes.

    It makes another one whenever a connection fails.
    """
    from huggingface_hub import get_session, set_client_factory

    kind = type(get_session())
    set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=seconds))


def _same(said: str, expected: str | None, what: str) -> None:
    """Refuse a commit or tag that is not a digest, or another than before."""
    if digest(said, f"the {what}") != (expected or said):
        raise BesaError(f"the {what}, says the hub, is {said}, where it said {expected} before", DISTRUST)
