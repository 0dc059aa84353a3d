"""Uploads of finished exports to the Hugging Face hub; nothing else needs write access there."""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from besa_cli.errors import BesaError, UsageError, reason_of
from besa_cli.models import answers, hub_errors

Found = TypeVar("Found")

ANSWER_SECONDS = 30.0  # for the first answer
_LINE_SECONDS = 60.0  # for the next bytes of a line, in either direction
_LEAST_RATE = 10_000  # bytes a second that an upload has to go on with, beside ten minutes for the commit
_COMMIT_SECONDS = 600.0

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def check(repo: str) -> None:
    """Refuse an invalid repository name, or a machine that is not logged in, before any work.

    Raises
    ------
    BesaError
        Says which.
    """
    from huggingface_hub import constants, get_token

    if not _NAME.fullmatch(repo):
        raise UsageError(f"--push-to '{repo}' is not a valid repository name", "write org/name")
    if constants.HF_HUB_OFFLINE:
        raise BesaError("HF_HUB_OFFLINE forbids the network that --push-to needs", "unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise BesaError(f"not logged in at {constants.ENDPOINT}, so nothing can go to {repo}", "type `hf auth login`")


def push(directory: Path, repo: str, *, private: bool) -> str:
    """Create the repository if it does not exist, upload every file as one commit, and return its address.

    Raises
    ------
    BesaError
        The hub cannot be reached, or refuses. The export stays where it is.
    """
    from huggingface_hub import HfApi, get_session

    answers.set_clients(get_session().event_hooks, _LINE_SECONDS)  # it sets no time for most of its requests
    api = HfApi()
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    message = f"besa export: {directory.name}"
    try:
        address = _within(ANSWER_SECONDS, repo, lambda: api.create_repo(repo, private=private, exist_ok=True))
        _within(
            _COMMIT_SECONDS + size / _LEAST_RATE,
            repo,
            lambda: api.upload_folder(repo_id=repo, folder_path=directory, commit_message=message),
        )
    except BesaError as error:
        hint = "check the network, then type the same command again" if hub_errors.is_transient(error) else error.hint
        raise BesaError(f"{directory} was not pushed: {error.message}", hint) from error
    return str(address)


def _within(seconds: float, repo: str, ask: Callable[[], Found]) -> Found:
    """Call the hub in a thread and give up after a time limit; name look-ups and slow answers have none of their own.

    Raises
    ------
    BesaError
        It gave no answer, refused, or cannot be understood.
    """
    answered: list[Found | Exception] = []

    def work() -> None:
        try:
            answered.append(ask())
        except Exception as error:  # noqa: BLE001  # whatever an answer makes the library raise, it is said once
            answered.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answered:
        raise hub_errors.unreachable(repo, f"no answer within {seconds:.0f} s")
    found = answered[0]
    if not isinstance(found, Exception):
        return found
    if isinstance(found, BesaError):
        raise found
    if not isinstance(found, hub_errors.kinds()):
        raise BesaError(f"cannot read what the hub answers for {repo}: {reason_of(found)}", "try again") from found
    raise hub_errors.translate(found, repo, None) from found
