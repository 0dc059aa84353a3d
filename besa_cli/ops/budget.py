"""Exact counts: what each window, linear and row prunes so that the whole is the asked sparsity to the weight."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

_TIE = 1e-6  # remainders closer than this (in weights) count as equal


def window_counts(sparsity: float, sizes: Sequence[int]) -> list[int]:
    """Weights that each window prunes: round(s·N_1…i) − round(s·N_1…i−1), N the windows' sizes in weights.

    The sparsity is taken as the decimal number that was typed, so that 0.1 is one tenth.
    """
    share = Fraction(str(sparsity))
    counts, before, done = [], 0, 0
    for size in sizes:
        before += size
        target = round(share * before)
        counts.append(target - done)
        done = target
    return counts


def fill(shares: Floats, total: float, lower: Floats, upper: Floats) -> Floats:
    """Shift all shares by one number, kept between their bounds, so that they sum to `total`.

    Parameters
    ----------
    shares, lower, upper : arrays of shape (n,)
        Wished real counts and the least and most that each place can take.
    total : float
        Sum to reach; beyond what the bounds allow the bounds themselves are returned.
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
    """Whole counts that sum to `total`: each share's floor, the rest by largest remainder, smallest tie, index.

    Parameters
    ----------
    shares : array of shape (n,)
        Wished real counts.
    total : int
        Sum to reach. Below the sum of `lower` the lower bounds are returned, above that of `upper` the upper ones.
    lower, upper : integer arrays of shape (n,)
        Bounds of each count, e.g. the zeros a row has already and its number of columns.
    tie : array of shape (n,), optional
        Decides between equal remainders, smallest first (the score of the next weight to go).

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
            room = counts < upper if step > 0 else counts > lower
            chosen = places[room[places]][: abs(missing)]
            counts[chosen] += step
            missing -= step * len(chosen)
    return counts
