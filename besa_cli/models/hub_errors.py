"""Errors of the hub, each translated to one line with its own remedy."""

import errno

from besa_cli.errors import BesaError

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


class Transient(BesaError):
    """The hub cannot be asked at the moment; a complete copy in the cache can be used instead."""


def is_transient(error: BesaError) -> bool:
    """Check whether an error concerns the connection to the hub only, not the model."""
    return isinstance(error, Transient)


def transport() -> tuple[type[Exception], ...]:
    """Return the exceptions of a request: no connection, no answer, a broken connection, or a refusal."""
    from huggingface_hub.errors import HfHubHTTPError

    return (HfHubHTTPError.__bases__[0],)  # the base class of httpx's errors


def broken() -> tuple[type[Exception], ...]:
    """Return the exceptions of a broken connection; some of them are refusals (`is_answer`)."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return (*transport(), LocalEntryNotFoundError)  # raised by the hub's library for a request without an answer


def kinds() -> tuple[type[Exception], ...]:
    """Return all exceptions with which a transfer fails."""
    from huggingface_hub.errors import HFValidationError

    return (*transport(), OSError, HFValidationError, BesaError)


def is_answer(error: Exception) -> bool:
    """Check whether the hub did answer, with a refusal."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError) or isinstance(error.__cause__, HfHubHTTPError)


def offline(repo: str) -> BesaError:
    """Return the error for a model that is not in the cache while the network is not allowed."""
    from huggingface_hub import constants

    return BesaError(
        f"{repo} is not complete in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids the network",
        "unset HF_HUB_OFFLINE, or name a local directory with --model",
    )


def require_cache() -> None:
    """Refuse to fetch without a directory for the hub's cache: the library would create a directory named ``~``.

    Raises
    ------
    BesaError
        There is no home directory, and no variable names another directory.
    """
    from huggingface_hub import constants

    if str(constants.HF_HUB_CACHE).startswith("~"):
        raise BesaError(
            "there is no home directory to keep the hub's files in", "set HF_HOME=DIR to a directory for them"
        )


def unreachable(repo: str, reason: str) -> BesaError:
    """Return the error for a hub that does not answer."""
    from huggingface_hub import constants

    return Transient(
        f"cannot reach the hub at {constants.ENDPOINT} for {repo}: {reason}",
        "check the network (HF_ENDPOINT, proxies), or name a local directory, a GGUF file or smollm2-135m with --model",
    )


def cut_off(repo: str, reason: str, have: int, total: int) -> BesaError:
    """Return the error for a transfer that broke off."""
    return BesaError(
        f"the transfer of {repo} broke off after {size(have)} of {size(total)}: {reason}",
        "run the same command again: it resumes the transfer",
    )


def size(count: int) -> str:
    """Format a number of bytes for people, e.g. ``1.5 MB``."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def translate(error: BaseException, repo: str, revision: str | None) -> BesaError:
    """Translate an exception of the hub's library to a one-line error."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return BesaError(f"{repo} is gated", f"accept its terms at {page}, then log in with `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return BesaError(f"{repo} has no revision '{revision}'", f"see {page}/tree/main for its branches and tags")
    if isinstance(error, errors.HFValidationError):
        return BesaError(f"'{repo}' is not a valid model name on the hub", "write org/name")
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error.response.status_code, error, repo)
    if isinstance(error, OSError) and error.errno in _DISK:
        return BesaError(
            f"cannot write the hub's cache {constants.HF_HUB_CACHE}: {error.strerror}",
            "free disk space, or set the environment variable HF_HOME to another directory",
        )
    return unreachable(repo, reason(error))


def _refusal(status: int, error: BaseException, repo: str) -> BesaError:
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
    return Transient(f"the hub answered {status} for {repo}", "try again later, or name a local directory with --model")


def reason(error: BaseException) -> str:
    """Return the first line of the innermost cause."""
    while error.__cause__ is not None and not isinstance(error.__cause__, type(error)):
        error = error.__cause__
    text = str(error).splitlines()
    return text[0] if text and text[0] else type(error).__name__
