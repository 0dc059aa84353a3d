"""The threshold search of BESA's released program: move it until the denser columns hold about half of what is kept."""

from collections.abc import Callable

from besa_cli.sim.cost import Split

_TRIES = 5
_STEP = 0.1
_FEW, _MANY = 0.4, 0.6  # shares of the kept weights in denser columns between which the search ends


def searched(split: Callable[[float], Split], kept: int, start: float) -> Split:
    """The split with the fewest cycles of those that the moving threshold comes to, `start` the first.

    Parameters
    ----------
    split : callable
        The split at a threshold.
    kept : int
        Kept weights of the linear.
    """
    threshold, tried = start, []
    for _ in range(_TRIES):
        tried.append(split(threshold))
        share = tried[-1].kept / kept if kept else 0.5
        if _FEW < share < _MANY:
            break
        threshold += _STEP if share >= _MANY else -_STEP
    return min(tried, key=lambda each: each.slower)
