"""Exact counts: the number of weights that each window, linear and row prunes to meet the target sparsity exactly."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

_TIE = 1e-6  # in weights; remainders closer than this count as equal


def window_counts(target_sparsity: float, sizes: Sequence[int]) -> list[int]:
    """Compute the weights that each window prunes: round(s·N_1…i) − round(s·N_1…i−1), N the windows' sizes in weights.

    The sparsity is parsed as a decimal number, so that 0.1 is exactly one tenth.
    """
    ratio = Fraction(str(target_sparsity))
    counts, total, pruned = [], 0, 0
    for size in sizes:
        total += size
        target = round(ratio * total)
        counts.append(target - pruned)
        pruned = target
    return counts


def fill(shares: Floats, total: float, lower: Floats, upper: Floats) -> Floats:
    """Shift all shares by one number, clamped to their bounds, so that they sum to `total`.

    Parameters
    ----------
    shares, lower, upper : arrays of shape (n,)
        Desired real counts, and the lower and upper bound of each.
    total : float
        Sum to reach; outside the range of the bounds, the bounds themselves are returned.
    """
    if total <= lower.sum():
        return lower.copy()
    if total >= upper.sum():
        return upper.copy()
    low, high = float((lower - shares).min()), float((upper - shares).max())
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if np.clip(shares + middle, lower, upper).sum() < total:
            low = middle
        else:
            high = middle
    return np.clip(shares + high, lower, upper)


def round_to_total(shares: Floats, total: int, lower: Integers, upper: Integers, tie: Floats | None = None) -> Integers:
    """Round shares to integers that sum to `total`: floors first, the rest by largest remainder, smallest tie, index.

    Parameters
    ----------
    shares : array of shape (n,)
        Desired real counts.
    total : int
        Sum to reach. Below the sum of `lower`, the lower bounds are returned; above that of `upper`, the upper bounds.
    lower, upper : integer arrays of shape (n,)
        Bounds of each count, e.g. a row's number of existing zeros and of columns.
    tie : array of shape (n,), optional
        Order of equal remainders, smallest first (the score of the next weight to be pruned).

    Returns
    -------
    integer array of shape (n,)
    """
    if not np.isfinite(shares).all():
        raise ValueError("shares must be finite")
    filled = fill(shares, float(total), lower.astype(np.float64), upper.astype(np.float64))
    counts = np.floor(filled + _TIE).astype(np.int64)
    remainders = np.round((filled - counts) / _TIE)
    ties = np.zeros(len(shares)) if tie is None else tie
    order = np.lexsort((np.arange(len(shares)), ties, -remainders))
    missing = int(min(max(total, lower.sum()), upper.sum()) - counts.sum())
    for step, places in ((1, order), (-1, order[::-1])):
        while missing * step > 0:
            has_room = counts < upper if step > 0 else counts > lower
            chosen = places[has_room[places]][: abs(missing)]
            counts[chosen] += step
            missing -= step * len(chosen)
    return counts
