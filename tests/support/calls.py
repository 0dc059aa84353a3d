"""Functions that note their calls."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
Result = TypeVar("Result")


def noting(function: Callable[P, Result], note: Callable[P, object]) -> Callable[P, Result]:
    """The same function, which first hands its arguments to `note`."""

    def noted(*args: P.args, **kwargs: P.kwargs) -> Result:
        note(*args, **kwargs)
        return function(*args, **kwargs)

    return noted
