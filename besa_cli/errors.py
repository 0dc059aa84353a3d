"""Errors shown to the user: one line naming the value and the place, and a hint with the remedy."""

import contextlib
import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


class BesaError(Exception):
    """Failure of a command (exit code 1).

    Parameters
    ----------
    message : str
        Description of the problem, naming the value and the place (path, option, tensor).
    hint : str
        Remedy; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = " ".join(message.split())
        self.hint = " ".join(hint.split())


class UsageError(BesaError):
    """Invalid option or argument (exit code 2)."""

    exit_code = 2


class Interrupted(BesaError):
    """Interruption of a command that has its own hint on how to resume (exit code 130).

    Parameters
    ----------
    hint : str
        Description of what was kept and how to resume.
    """

    exit_code = 130

    def __init__(self, hint: str) -> None:
        super().__init__("interrupted", hint)


_LONGEST_REASON = 300


def reason_of(error: BaseException) -> str:
    """Return the message of another library's error, on one line of at most 300 characters."""
    message = getattr(error, "strerror", None) or str(error)
    line = " ".join(message.split()) or type(error).__name__
    return line if len(line) <= _LONGEST_REASON else f"{line[: _LONGEST_REASON - 1]}…"


@contextlib.contextmanager
def reading(source: Path | str, hint: str = "restore the file, or fetch it again") -> Iterator[None]:
    """Convert any exception of a library that reads a foreign file into a `BesaError` that names the file.

    Wrap nothing but the library's call, so that a bug in besa is not reported as an invalid file.

    Parameters
    ----------
    source : Path or str
        File or directory that is read.
    hint : str
        Remedy.

    Raises
    ------
    BesaError
        The library raised an exception other than `BesaError`, `MemoryError` or an interruption.
    """
    try:
        yield
    except (BesaError, MemoryError):
        raise
    except Exception as error:
        raise BesaError(f"cannot read {source}: {reason_of(error)}", hint) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a panic in a Rust library is not an `Exception`
            raise
        raise BesaError(f"cannot read {source}: {reason_of(error)}", hint) from error


def unknown(kind: str, value: str, known: Iterable[str]) -> UsageError:
    """Return the error for an unknown name, with the most similar known name as a suggestion.

    Parameters
    ----------
    kind : str
        Kind of name, e.g. ``"method"``.
    value : str
        The unknown name.
    known : iterable of str
        All valid names.
    """
    names = list(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    suggestion = f"did you mean '{near[0]}'? " if near else ""
    return UsageError(f"unknown {kind} '{value}'", f"{suggestion}known: {', '.join(names)}")


def require_options(
    given: Iterable[str], kind: str, name: str, known: Iterable[str], options: Callable[[str], Iterable[str]]
) -> None:
    """Refuse an option that the chosen method or format does not have.

    Parameters
    ----------
    given : iterable of str
        Options that were given, with underscores.
    kind : str
        Option that chooses, e.g. ``"method"``.
    name : str
        What it chose.
    known : iterable of str
        All that it can choose.
    options : callable
        Names of the options of a choice.

    Raises
    ------
    UsageError
        Names the option, and the choices that have it.
    """
    for option in given:
        if option not in options(name):
            having = [other for other in known if option in options(other)]
            raise UsageError(
                f"--{option.replace('_', '-')} is not an option of --{kind} {name}",
                f"{kind}s with that option: {', '.join(having) or 'none'}",
            )


def require_counts(**options: int | None) -> None:
    """Check that every option is at least 1; None stands for an option that was not given.

    Raises
    ------
    UsageError
        An option is less than 1.
    """
    for name, value in options.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is less than 1", "give 1 or more")


def require_factors(**options: float | None) -> None:
    """Check that every option is finite and not negative; None stands for an option that was not given.

    Raises
    ------
    UsageError
        An option is negative, infinite or NaN.
    """
    for name, value in options.items():
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} {value} is not a finite number of 0 or more", "leave it out")
