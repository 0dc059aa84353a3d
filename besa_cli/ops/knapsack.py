"""Knapsack over blocks: the sparsity of each block that keeps the sum of their errors least at one total."""

from itertools import pairwise

import numpy as np

from besa_cli.ops.budget import Floats

_TINY = 1e-30  # of an error; smaller ones have no logarithm


def error_curves(sparsities: Floats, errors: Floats, points: Floats) -> Floats:
    """Interpolate measured errors: log-linear in the sparsity, by the first and last slope beyond the measured ones.

    Parameters
    ----------
    sparsities : array of shape (k,), increasing
        Measured sparsities, at least two.
    errors : array of shape (n, k)
        Error of each of n blocks at these sparsities, not negative.
    points : array of shape (p,), increasing
        Sparsities to return the errors at.

    Returns
    -------
    array of shape (n, p)
    """
    logs = np.log(np.maximum(errors, _TINY))
    left = np.clip(np.searchsorted(sparsities, points, side="right") - 1, 0, len(sparsities) - 2)
    part = (points - sparsities[left]) / (sparsities[left + 1] - sparsities[left])
    return np.exp(logs[:, left] * (1 - part) + logs[:, left + 1] * part)


def convex_hull(points: Floats, errors: Floats) -> list[int]:
    """Return the places of the points on the lower convex hull of one error curve, the first and last included.

    Parameters
    ----------
    points, errors : arrays of shape (p,), points increasing
    """
    hull: list[int] = []
    for place in range(len(points)):
        while len(hull) > 1:
            first, middle = hull[-2], hull[-1]
            rise = (errors[middle] - errors[first]) * (points[place] - points[first])
            if rise < (errors[place] - errors[first]) * (points[middle] - points[first]):
                break
            hull.pop()
        hull.append(place)
    return hull


def allocate(sizes: Floats, points: Floats, errors: Floats, total: float) -> Floats:
    """Minimise the sum of the blocks' errors at a total number of pruned weights, each curve by its lower convex hull.

    The pieces of all hulls are taken by rising slope until the total is met, which is exact for convex curves: all
    blocks end on points of their hulls but one, which ends between two.

    Parameters
    ----------
    sizes : array of shape (n,)
        Weights of each block.
    points : array of shape (p,), increasing
        Sparsities that a block may have; the first and last are its bounds.
    errors : array of shape (n, p)
        Error of each block at these sparsities.
    total : float
        Number of weights to prune; outside the bounds of all blocks, the bounds themselves are returned.

    Returns
    -------
    array of shape (n,): weights that each block prunes
    """
    pieces: list[tuple[float, int, int, float]] = []  # slope, block, place on its hull, weights
    for block, curve in enumerate(errors):
        hull = convex_hull(points, curve)
        for place, (start, stop) in enumerate(pairwise(hull)):
            weights = float(sizes[block] * (points[stop] - points[start]))
            pieces.append((float(curve[stop] - curve[start]) / weights, block, place, weights))
    shares: Floats = sizes * points[0]
    left = total - float(shares.sum())
    for _, block, _, weights in sorted(pieces):
        if left <= 0:
            break
        taken = min(weights, left)
        shares[block] += taken
        left -= taken
    return shares
