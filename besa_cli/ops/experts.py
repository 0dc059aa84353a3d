"""Whole experts of a mixture: the score of each, how many are removed, and which of them stay."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from jaxtyping import Float, Int
from torch import Tensor


def contribution_sum(contributions: Float[Tensor, "tokens hidden"]) -> Float[Tensor, ""]:
    """Sum ‖g_t · E(x_t)‖₂ over the tokens t that reach an expert E, in fp64.

    Parameters
    ----------
    contributions : Tensor of shape (tokens, hidden)
        What the expert adds to the output of its block for each of these tokens: its output times the router's weight.
    """
    norms: Tensor = torch.linalg.vector_norm(contributions.float(), dim=-1)
    return norms.double().sum()


def scores(sums: Float[Tensor, "*experts"], tokens: Int[Tensor, "*experts"]) -> Float[Tensor, "*experts"]:
    """Compute REAP's score of every expert (arXiv 2510.13999, Eq. 9): the mean of ‖g_t · E(x_t)‖₂ over its tokens.

    An expert that no token reached scores 0.

    Parameters
    ----------
    sums : Tensor, fp64
        `contribution_sum` of all tokens that reached each expert.
    tokens : integer Tensor of the same shape
        The number of these tokens.
    """
    return torch.where(tokens > 0, sums / tokens.clamp_min(1), torch.zeros_like(sums))


def removed_count(share: float, experts: int) -> int:
    """Return how many of the experts a share of them is, rounded; the share is parsed as a decimal number."""
    return round(Fraction(str(share)) * experts)


def remaining(scores: Sequence[float], count: int, groups: int = 1) -> list[int]:
    """Return the numbers of the `count` experts that stay, in order: of each group as many, those with high scores.

    Of equal scores the lower number stays. Groups are equally many consecutive experts.

    Raises
    ------
    ValueError
        The groups do not divide the experts or the count.
    """
    size, kept = len(scores) // groups, count // groups
    if size * groups != len(scores) or kept * groups != count:
        raise ValueError(f"{count} of {len(scores)} experts cannot stay in {groups} equal groups")
    chosen: list[int] = []
    for start in range(0, len(scores), size):
        order = sorted(range(start, start + size), key=lambda number: (-scores[number], number))
        chosen += order[:kept]
    return sorted(chosen)
