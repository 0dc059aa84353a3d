"""The errors a user may meet: one line says what is wrong, with the value and the place; a hint says what to do."""

import contextlib
import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


class BesaError(Exception):
    """Something that could not be done (exit code 1).

    Parameters
    ----------
    message : str
        What is wrong, naming the value and the place (path, option, tensor).
    hint : str
        What the user can do about it; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = " ".join(message.split())
        self.hint = " ".join(hint.split())


class UsageError(BesaError):
    """An option or argument that cannot be meant (exit code 2)."""

    exit_code = 2


class Interrupted(BesaError):
    """The command was interrupted, and there is more to say than that nothing finished is lost (exit code 130).

    Parameters
    ----------
    hint : str
        What was kept, and how to go on.
    """

    exit_code = 130

    def __init__(self, hint: str) -> None:
        super().__init__("interrupted", hint)


_LONGEST_REASON = 300


def reason_of(error: BaseException) -> str:
    """What an error of another library says, on one line of at most 300 characters."""
    said = getattr(error, "strerror", None) or str(error)
    words = " ".join(said.split()) or type(error).__name__
    return words if len(words) <= _LONGEST_REASON else f"{words[: _LONGEST_REASON - 1]}…"


@contextlib.contextmanager
def reading(what: Path | str, hint: str = "restore the file, or fetch it again") -> Iterator[None]:
    """Turn whatever a library raises while it reads a file that besa did not write into one line that names the file.

    Wrap the library's own call and nothing else: a fault of ours must not be taken for one of the file.

    Parameters
    ----------
    what : Path or str
        The file or directory that is read.
    hint : str
        The remedy.

    Raises
    ------
    BesaError
        The library raised anything but a `BesaError`, out of memory, or an interruption.
    """
    try:
        yield
    except (BesaError, MemoryError):
        raise
    except Exception as error:
        raise BesaError(f"cannot read {what}: {reason_of(error)}", hint) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a panic of a library in Rust is no `Exception`
            raise
        raise BesaError(f"cannot read {what}: {reason_of(error)}", hint) from error


def unknown(kind: str, value: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not among `known`, with the nearest one as a suggestion.

    Parameters
    ----------
    kind : str
        What the name stands for, e.g. ``"method"``.
    value : str
        The name that was given.
    known : iterable of str
        All names that would have been accepted.
    """
    names = list(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    meant = f"did you mean '{near[0]}'? " if near else ""
    return UsageError(f"unknown {kind} '{value}'", f"{meant}known: {', '.join(names)}")


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
    """Refuse numbers below 1, by the options' names; None was not given.

    Raises
    ------
    UsageError
        There is one.
    """
    for name, value in options.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is less than 1", "give 1 or more")


def require_factors(**options: float | None) -> None:
    """Refuse what is not a number from 0 up, by the options' names; None was not given.

    Raises
    ------
    UsageError
        There is one.
    """
    for name, value in options.items():
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} {value} is not a number from 0 up", "leave it out")
