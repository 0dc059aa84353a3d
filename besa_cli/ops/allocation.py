"""BESA's learned allocation: mixtures over candidate sparsities, pruning probability, straight-through gradient.

Symbols as in the paper (arXiv 2402.16880, section 3.2): candidates p_d, mixture β = softmax(θ), sparsity α = Σ β_d p_d.
A *group* is `size` consecutive rows that share one mixture: a single row (row-wise), all rows of a linear (layer-wise),
or any number; the last group of a linear may be smaller.
"""

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from besa_cli.ops import kernels

SPREAD = 0.1  # standard deviation of the initial mixtures, unless truncated at the ends
_STEPS = 200  # far more than Newton's method needs, and enough for bisection alone
_FLAT = 1e-9  # slope of mixtures that have nearly collapsed to one candidate each


def candidates(count: int) -> Float[Tensor, " candidates"]:
    """Return the D + 1 candidate sparsities p_d = d/D for d = 0 … D, with D = `count`."""
    return torch.arange(count + 1, dtype=torch.float32) / count


def initial_logits(
    groups: int, candidates: Float[Tensor, " candidates"], target: float, spread: float = SPREAD
) -> Float[Tensor, "groups candidates"]:
    """Compute logits θ_d = t·p_d − p_d²/2σ² of the mixture of greatest entropy with mean `target` and its own variance.

    The straight-through gradient of a candidate treats all ranks between it and the mask as linear, which holds near
    the target. A mixture spread over all candidates would learn from ranks far from any mask that it will have.

    Parameters
    ----------
    groups : int
        Number of rows of the result, all equal.
    candidates : Tensor of shape (candidates,)
    target : float
        Expected sparsity, strictly between 0 and 1.
    spread : float
        σ, in sparsity.
    """
    gaussian = (-(candidates.double() - target).square() / (2 * spread**2)).unsqueeze(0)
    tilt = _solve_tilt(gaussian, torch.ones_like(gaussian[:, 0]), candidates.double(), target)
    return (gaussian + tilt * candidates).float().repeat(groups, 1)


def mixture(logits: Float[Tensor, "groups candidates"]) -> Float[Tensor, "groups candidates"]:
    """Compute the mixture β = softmax(θ).

    Its sparsity can reach every value between the smallest and the largest candidate.
    """
    return logits.softmax(dim=1)


def smoothed_range(count: int) -> tuple[float, float]:
    """Return the smallest and largest α of softmax(sigmoid(θ)) over the candidates 0, 1/D … 1, with D = `count`.

    Logits of the softmax differ by at most 1, so the weights of candidates differ by at most a factor e; the largest α
    gives the larger weight to all candidates from some index on.
    """
    p = candidates(count).double()
    upper = [torch.where(p >= start, torch.e, 1.0).double() for start in p]
    largest = max(float(weights @ p / weights.sum()) for weights in upper)
    return 1 - largest, largest


def expected_sparsity(
    mixture: Float[Tensor, "groups candidates"], candidates: Float[Tensor, " candidates"]
) -> Float[Tensor, " groups"]:
    """Compute α = Σ_d β_d p_d (BESA Eq. 3)."""
    return mixture @ candidates


def sum_groups(rows: Float[Tensor, "rows ..."], size: int) -> Float[Tensor, "groups ..."]:
    """Sum rows over each group of `size` rows."""
    if size == 1:
        return rows
    short = -len(rows) % size
    padded = torch.cat([rows, rows.new_zeros(short, *rows.shape[1:])]) if short else rows
    return padded.reshape(-1, size, *rows.shape[1:]).sum(1)


def repeat_rows(groups: Real[Tensor, " groups"], size: int, rows: int) -> Real[Tensor, " rows"]:
    """Repeat each group's value for each of its rows."""
    return groups if size == 1 else groups.repeat_interleave(size)[:rows]


class _StraightThrough(torch.autograd.Function):
    """Weight W with its lowest ranks zeroed; the backward pass treats it as W·(1 − P), and as W where kept."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        mixture: Tensor,
        weight: Tensor,
        ranks: Tensor,
        counts: Tensor,
        size: int,
        out: Tensor,
        floored: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight, ranks, counts)
        ctx.size, ctx.count, ctx.floored = size, mixture.shape[1] - 1, floored  # type: ignore[attr-defined]
        kernels.mask(weight, ranks, repeat_rows(counts, size, len(weight)), out)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, ranks, counts = ctx.saved_tensors  # type: ignore[attr-defined]
        count, floored = ctx.count, ctx.floored  # type: ignore[attr-defined]
        mixture_gradient = kernels.candidate_sums(gradient, weight, ranks, count, floored=floored)
        weight_gradient = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            rows = repeat_rows(counts, ctx.size, len(weight))  # type: ignore[attr-defined]
            weight_gradient = kernels.mask(gradient, ranks, rows, torch.empty_like(gradient))
        return sum_groups(mixture_gradient, ctx.size), weight_gradient, None, None, None, None, None  # type: ignore[attr-defined]


def straight_through(
    mixture: Float[Tensor, "groups candidates"],
    weight: Float[Tensor, "rows cols"],
    ranks: Int[Tensor, "rows cols"],
    counts: Int[Tensor, " groups"],
    size: int = 1,
    out: Float[Tensor, "rows cols"] | None = None,
    *,
    floored: bool = False,
) -> Float[Tensor, "rows cols"]:
    """Compute Ŵ, the weight without the `counts[g]` lowest ranks of each row of group g; its gradient goes to 1 − P.

    By BESA Eq. 6, dL/dβ_d = − Σ_{j < p_d·C} g_j with g = (∂L/∂Ŵ)∘W in rank order. No probability matrix is formed. If
    the weight itself is learned (for example through its grid), its gradient is that of the kept weights.

    Parameters
    ----------
    mixture : Tensor of shape (groups, candidates)
    weight, ranks : Tensors of shape (rows, cols)
        `ranks` as returned by `besa_cli.ops.kernels.ranks`.
    counts : integer Tensor of shape (groups,)
        Number of weights pruned in each row of a group: α·C as an integer.
    size : int
        Number of rows in a group.
    out : Tensor of shape (rows, cols), optional
        Written and returned; its dtype is the result's. No pending backward pass may need it.
    floored : bool
        Sum gradients over j < ⌊p_d·C⌋ instead of j < p_d·C.
    """
    buffer = torch.empty_like(weight) if out is None else out.detach()
    result: Tensor = _StraightThrough.apply(  # type: ignore[no-untyped-call]
        mixture, weight, ranks, counts, size, buffer, floored
    )
    return result


def project(
    logits: Float[Tensor, "groups candidates"],
    weights: Float[Tensor, " groups"],
    candidates: Float[Tensor, " candidates"],
    target: float,
) -> Float[Tensor, " groups"]:
    """Compute the groups' sparsities after a common tilt θ_d + t·p_d that brings their weighted mean to `target`.

    Parameters
    ----------
    logits : Tensor of shape (groups, candidates)
    weights : Tensor of shape (groups,)
        Number of the linear's weights in each group.
    target : float
        Target sparsity of the window, strictly between 0 and 1.

    Returns
    -------
    Tensor of shape (groups,), float64
    """
    theta, p = logits.double(), candidates.double()
    tilt = _solve_tilt(theta, weights.double(), p, target)
    return expected_sparsity(mixture(theta + tilt * p), p)


def mean_and_slope(
    mixture: Float[Tensor, "groups candidates"],
    weights: Float[Tensor, " groups"],
    candidates: Float[Tensor, " candidates"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Compute the groups' mean sparsity, and its derivative in a common tilt t of θ_d + t·p_d: the mean of Var_β(p)."""
    shares = weights / weights.sum()
    sparsity, variance = _moments(mixture, candidates)
    return shares @ sparsity, shares @ variance


def _moments(mixture: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and variance of p under each group's mixture."""
    mean = expected_sparsity(mixture, candidates)
    return mean, mixture @ candidates.square() - mean.square()


def newton_tilt(
    logits: Float[Tensor, "groups candidates"],
    weights: Float[Tensor, " groups"],
    candidates: Float[Tensor, " candidates"],
    target: float,
) -> Float[Tensor, ""]:
    """Compute the tilt t of θ_d + t·p_d by which one step of Newton's method restores the target after a learning step.

    The iteration converges to the tilt of `project`.
    """
    mean, slope = mean_and_slope(mixture(logits), weights, candidates)
    limit = float(len(candidates))  # this tilt makes each candidate e times as likely as the previous one
    return ((target - mean) / slope.clamp_min(_FLAT)).clamp(-limit, limit)


def project_gradient(
    gradient: Float[Tensor, "groups candidates"],
    mixture: Float[Tensor, "groups candidates"],
    weights: Float[Tensor, " groups"],
    candidates: Float[Tensor, " candidates"],
) -> Float[Tensor, "groups candidates"]:
    """Project ∂L/∂θ so that the mean sparsity s stays constant, since a common tilt follows every change of θ.

    The result is G − μ·∂s/∂θ with the Lagrange multiplier μ = Σ G_gd·p_d ÷ the slope of `mean_and_slope`, and ∂s/∂θ_gd
    = (the group's share of the weights) · β_d·(p_d − α).

    Parameters
    ----------
    gradient : Tensor of shape (groups, candidates)
        G = ∂L/∂θ without any constraint on the sparsity.
    mixture : Tensor of shape (groups, candidates)
        β = softmax(θ).
    weights : Tensor of shape (groups,)
        Number of the linear's weights in each group.
    """
    shares = weights / weights.sum()
    sparsity, variance = _moments(mixture, candidates)
    multiplier = (gradient @ candidates).sum() / (shares @ variance).clamp_min(_FLAT)
    direction = candidates - sparsity.unsqueeze(1)
    direction *= (multiplier * shares).unsqueeze(1)
    # in place: one matrix of this size, not five
    return torch.addcmul(gradient, mixture, direction, value=-1, out=direction)


def _solve_tilt(theta: Tensor, weights: Tensor, p: Tensor, target: float) -> float:
    """Solve for the tilt by Newton's method on the mean sparsity, with bisection if a step leaves the bracket."""
    low, high, tilt = -1e6, 1e6, 0.0
    for _ in range(_STEPS):
        mean, slope = map(float, mean_and_slope(mixture(theta + tilt * p), weights, p))
        low, high = (tilt, high) if mean < target else (low, tilt)
        proposal = tilt + (target - mean) / slope if slope > 0 else low
        next_tilt = proposal if low < proposal < high else (low + high) / 2
        if abs(mean - target) < 1e-13 or next_tilt in (low, high):
            break
        tilt = next_tilt
    return tilt
