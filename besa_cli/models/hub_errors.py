"""What can go wrong with the hub, each as one line with its own remedy."""

import errno

from besa_cli.errors import BesaError

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


class Passing(BesaError):
    """The hub cannot be asked at the moment; a complete copy in the cache may stand in."""


def is_passing(error: BesaError) -> bool:
    """Whether the error says nothing about the model, only about the way to it."""
    return isinstance(error, Passing)


def transport() -> tuple[type[Exception], ...]:
    """The exceptions of a request: no connection, no answer, broken off, or an answer of refusal."""
    from huggingface_hub.errors import HfHubHTTPError

    return (HfHubHTTPError.__bases__[0],)  # the base class of httpx, under whatever name that goes this year


def broken() -> tuple[type[Exception], ...]:
    """The exceptions of a line that broke; some of them are answers (`is_answer`)."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return (*transport(), LocalEntryNotFoundError)  # what the hub's library makes of a question without an answer


def kinds() -> tuple[type[Exception], ...]:
    """All exceptions by which a transfer fails."""
    from huggingface_hub.errors import HFValidationError

    return (*transport(), OSError, HFValidationError, BesaError)


def is_answer(error: Exception) -> bool:
    """Whether the hub did answer, with a refusal."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError) or isinstance(error.__cause__, HfHubHTTPError)


def offline(repo: str) -> BesaError:
    """No network is allowed and the model is not in the cache."""
    from huggingface_hub import constants

    return BesaError(
        f"{repo} is not (completely) in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids the network",
        "unset HF_HUB_OFFLINE, or name a local directory with --model",
    )


def require_cache() -> None:
    """Refuse to fetch where the hub's library has no place for it: it would make a directory called ``~``.

    Raises
    ------
    BesaError
        There is no home directory, and no variable names another.
    """
    from huggingface_hub import constants

    if str(constants.HF_HUB_CACHE).startswith("~"):
        raise BesaError("there is no home directory to keep the hub's files in", "name one for them: HF_HOME=DIR")


def unreachable(repo: str, reason: str) -> BesaError:
    """The hub does not answer."""
    from huggingface_hub import constants

    return Passing(
        f"cannot reach the hub at {constants.ENDPOINT} for {repo}: {reason}",
        "check the network (HF_ENDPOINT, proxies), or name a local directory, a GGUF file or smollm2-135m with --model",
    )


def cut_off(repo: str, reason: str, have: int, total: int) -> BesaError:
    """The transfer broke off in the middle."""
    return BesaError(
        f"the hub broke off after {size(have)} of {size(total)} of {repo}: {reason}",
        "run the same command again: it goes on where it stopped",
    )


def size(count: int) -> str:
    """A number of bytes for people."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def translate(error: BaseException, repo: str, revision: str | None) -> BesaError:
    """The line for an exception of the hub's library."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return BesaError(f"{repo} is gated", f"accept its terms at {page}, then log in with `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return BesaError(f"{repo} has no revision '{revision}'", f"look at {page}/tree/main for its branches and tags")
    if isinstance(error, errors.HFValidationError):
        return BesaError(f"'{repo}' cannot be the name of a model on the hub", "write org/name")
    if isinstance(error, errors.HfHubHTTPError):
        return _answered(error.response.status_code, error, repo)
    if isinstance(error, OSError) and error.errno in _DISK:
        return BesaError(
            f"cannot write the hub's cache {constants.HF_HUB_CACHE}: {error.strerror}",
            "free disk space, or name another place with the environment variable HF_HOME",
        )
    return unreachable(repo, reason(error))


def _answered(status: int, error: BaseException, repo: str) -> BesaError:
    from huggingface_hub import constants, errors

    if status in (401, 403):
        return BesaError(
            f"{repo} does not exist on {constants.ENDPOINT} or is private (the hub answered {status})",
            "check the spelling; for a private model log in with `hf auth login`",
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return BesaError(
            f"there is no model {repo} on {constants.ENDPOINT}", "check the spelling, or name a local directory"
        )
    return Passing(f"the hub answered {status} for {repo}", "try again later, or name a local directory with --model")


def reason(error: BaseException) -> str:
    """The innermost cause in few words."""
    while error.__cause__ is not None and not isinstance(error.__cause__, type(error)):
        error = error.__cause__
    text = str(error).splitlines()
    return text[0] if text and text[0] else type(error).__name__
