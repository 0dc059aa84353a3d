"""BESA's learned allocation: mixtures over candidate sparsities, pruning probability, straight-through gradient.

Letters as in the paper (arXiv 2402.16880, section 3.2): candidates p_d, mixture β = softmax(θ), sparsity α = Σ β_d p_d.
A *group* is a set of rows that share one mixture: a row alone (row-wise) or all rows of a linear (layer-wise).
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor


def candidates(count: int) -> Float[Tensor, " candidates"]:
    """p_d = d/D for d = 0 … D with D = `count`: D + 1 sparsities from 0 to 1."""
    return torch.arange(count + 1, dtype=torch.float32) / count


def initial_logits(
    groups: int, candidates: Float[Tensor, " candidates"], target: float
) -> Float[Tensor, "groups candidates"]:
    """θ whose softmax has the expected sparsity `target`: the mixture of greatest entropy with that mean, θ_d = t·p_d.

    Parameters
    ----------
    groups : int
        Rows of the result, all alike.
    target : float
        Expected sparsity, strictly between 0 and 1.
    """
    p = candidates.double()
    tilt = _solve_tilt([torch.zeros_like(p).unsqueeze(0)], [1.0], p, target)
    return (tilt * candidates).repeat(groups, 1)


def mixture(logits: Float[Tensor, "groups candidates"]) -> Float[Tensor, "groups candidates"]:
    """β = softmax(θ); every sparsity between the least and the greatest candidate can be reached."""
    return logits.softmax(dim=1)


def expected_sparsity(
    mixture: Float[Tensor, "groups candidates"], candidates: Float[Tensor, " candidates"]
) -> Float[Tensor, " groups"]:
    """α = Σ_d β_d p_d (BESA Eq. 3)."""
    return mixture @ candidates


def prune_probability(mixture: Float[Tensor, "groups candidates"], cols: int) -> Float[Tensor, "groups cols"]:
    """P(j) = Σ_{d : p_d·C > j} β_d for every rank j (BESA Eq. 4).

    The plain form, kept as the oracle of `straight_through`.
    """
    count = mixture.shape[1] - 1
    probability = [mixture[:, cuts_above].sum(1) for cuts_above in _above(count, cols)]
    return torch.stack(probability, dim=1)


def _above(count: int, cols: int) -> list[list[int]]:
    return [[d for d in range(count + 1) if d * cols > rank * count] for rank in range(cols)]


def cuts(count: int, cols: int) -> list[int]:
    """How many ranks j satisfy j < p_d·C, for d = 0 … D: ⌈d·C/D⌉, by whole numbers."""
    return [-(-d * cols // count) for d in range(count + 1)]


class _StraightThrough(torch.autograd.Function):
    """W with its lowest ranks zeroed; the gradient goes to the mixture as if each weight were W·(1 − P)."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        mixture: Tensor,
        weight: Tensor,
        order: Tensor,
        ranks: Tensor,
        counts: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(mixture, weight, order)
        return weight.masked_fill(ranks < counts.to(ranks.dtype).unsqueeze(1), 0.0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        mixture, weight, order = ctx.saved_tensors  # type: ignore[attr-defined]
        return (
            _mixture_gradient(gradient, weight, order, mixture.shape[1] - 1, mixture.shape[0]),
            None,
            None,
            None,
            None,
        )


_CHUNK = 1 << 22  # weights whose 64-bit indices exist at a time


def _mixture_gradient(gradient: Tensor, weight: Tensor, order: Tensor, count: int, groups: int) -> Tensor:
    """dL/dβ_d = − Σ_{j < p_d·C} g_j with g = (∂L/∂Ŵ)·W in rank order: one cumulative sum a row, read at the cuts."""
    rows, cols = weight.shape
    ends = torch.tensor(cuts(count, cols), device=weight.device)
    result = torch.empty(rows, count + 1, device=weight.device)
    step = max(_CHUNK // cols, 1)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        product = gradient[part].float() * weight[part].float()
        sums = product.gather(1, order[part].long()).cumsum(1)
        result[part] = torch.nn.functional.pad(sums, (1, 0))[:, ends]
    if groups == 1:
        result = result.sum(0, keepdim=True)
    return -result


def straight_through(
    mixture: Float[Tensor, "groups candidates"],
    weight: Float[Tensor, "rows cols"],
    order: Int[Tensor, "rows cols"],
    ranks: Int[Tensor, "rows cols"],
    counts: Real[Tensor, " rows"],
) -> Float[Tensor, "rows cols"]:
    """Ŵ: the weight without the `counts[r]` lowest ranks of row r; its gradient reaches the mixture through 1 − P.

    No gradient goes to the weight. No probability matrix is formed.

    Parameters
    ----------
    mixture : Tensor of shape (rows, candidates) or (1, candidates)
    weight, order, ranks : Tensors of shape (rows, cols)
        `order` and `ranks` as from `besa_cli.ops.masks`.
    counts : Tensor of shape (rows,)
        Weights pruned in each row: round(α·C), whole numbers of any type.
    """
    result: Tensor = _StraightThrough.apply(mixture, weight, order, ranks, counts)  # type: ignore[no-untyped-call]
    return result


def project(
    logits: Sequence[Float[Tensor, "_ candidates"]],
    weights: Sequence[float],
    candidates: Float[Tensor, " candidates"],
    target: float,
) -> list[Float[Tensor, " _"]]:
    """The groups' sparsities after one common tilt θ_d + t·p_d that brings their weighted mean to `target`.

    Parameters
    ----------
    logits : one Tensor of shape (groups, candidates) a linear
    weights : one number a linear
        Weights in each of its groups.
    target : float
        Asked sparsity of the window, strictly between 0 and 1.

    Returns
    -------
    one Tensor of shape (groups,) a linear, float64
    """
    doubles = [theta.double() for theta in logits]
    p = candidates.double()
    tilt = _solve_tilt(doubles, weights, p, target)
    return [expected_sparsity(mixture(theta + tilt * p), p) for theta in doubles]


def _solve_tilt(logits: Sequence[Tensor], weights: Sequence[float], p: Tensor, target: float) -> float:
    total = sum(weight * len(theta) for weight, theta in zip(weights, logits, strict=True))

    def mean(tilt: float) -> float:
        sums = [
            weight * float(expected_sparsity(mixture(theta + tilt * p), p).sum())
            for weight, theta in zip(weights, logits, strict=True)
        ]
        return math.fsum(sums) / total

    low, high = -1.0, 1.0
    while mean(low) > target and low > -1e6:
        low *= 2
    while mean(high) < target and high < 1e6:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < target else (low, middle)
    return (low + high) / 2
