"""The errors a user may meet: one line says what is wrong, with the value and the place; a hint says what to do."""

import difflib
import math
from collections.abc import Iterable


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
