"""Loading of the C++ libraries, which are built when the package is installed."""

import ctypes
from functools import cache
from pathlib import Path


@cache
def load(path: Path) -> ctypes.CDLL | None:
    """Return the library at a path; None if it was not built, for lack of a compiler."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None
