"""A finished export → a repository on the Hugging Face hub. Nothing else needs the hub's write access."""

import re
from pathlib import Path

from besa_cli.errors import BesaError, UsageError
from besa_cli.models import hub_errors

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def check(repo: str) -> None:
    """Refuse, before any work, a name that cannot be one, and a machine that is not logged in.

    Raises
    ------
    BesaError
        Says which.
    """
    from huggingface_hub import constants, get_token

    if not _NAME.fullmatch(repo):
        raise UsageError(f"--push-to '{repo}' cannot be the name of a repository", "write org/name")
    if constants.HF_HUB_OFFLINE:
        raise BesaError("HF_HUB_OFFLINE forbids the network that --push-to needs", "unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise BesaError(f"not logged in at {constants.ENDPOINT}, so nothing can go to {repo}", "type `hf auth login`")


def push(directory: Path, repo: str, *, private: bool) -> str:
    """Make the repository if it is not there, and upload every file as one commit; returns the repository's address.

    Raises
    ------
    BesaError
        The hub cannot be reached, or refuses. The export stays where it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=directory, commit_message=f"besa export: {directory.name}")
    except hub_errors.kinds() as error:
        told = error if isinstance(error, BesaError) else hub_errors.translate(error, repo, None)
        raise BesaError(f"{directory} was not pushed: {told.message}", told.hint) from error
    return str(address)
