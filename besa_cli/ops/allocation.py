"""BESA's learned allocation: mixtures over candidate sparsities, pruning probability, straight-through gradient.

Letters as in the paper (arXiv 2402.16880, section 3.2): candidates p_d, mixture β = softmax(θ), sparsity α = Σ β_d p_d.
A *group* is `size` consecutive rows that share one mixture: a row alone (row-wise), all rows of a linear (layer-wise),
or some; the last group of a linear may be smaller.
"""

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from besa_cli.ops import kernels

SPREAD = 0.1  # standard deviation of the mixtures at the start, where the ends do not cut them off
_STEPS = 200  # far more than Newton needs, and enough for halving alone
_FLAT = 1e-9  # the slope of mixtures that have all but run into one candidate each


def candidates(count: int) -> Float[Tensor, " candidates"]:
    """p_d = d/D for d = 0 … D with D = `count`: D + 1 sparsities from 0 to 1."""
    return torch.arange(count + 1, dtype=torch.float32) / count


def initial_logits(
    groups: int, candidates: Float[Tensor, " candidates"], target: float, spread: float = SPREAD
) -> Float[Tensor, "groups candidates"]:
    """θ of a mixture around `target`: of greatest entropy with that mean and its own variance, θ_d = t·p_d − p_d²/2σ².

    The straight-through gradient of a candidate takes all ranks between it and the mask for linear: near the target
    that holds. A mixture that is spread over all candidates learns from what lies far from any mask it will have.

    Parameters
    ----------
    groups : int
        Rows of the result, all alike.
    target : float
        Expected sparsity, strictly between 0 and 1.
    spread : float
        σ, in sparsity.
    """
    around = (-(candidates.double() - target).square() / (2 * spread**2)).unsqueeze(0)
    tilt = _solve_tilt(around, torch.ones_like(around[:, 0]), candidates.double(), target)
    return (around + tilt * candidates).float().repeat(groups, 1)


def mixture(logits: Float[Tensor, "groups candidates"]) -> Float[Tensor, "groups candidates"]:
    """β = softmax(θ); every sparsity between the least and the greatest candidate can be reached."""
    return logits.softmax(dim=1)


def smoothed_range(count: int) -> tuple[float, float]:
    """The least and the greatest α of softmax(sigmoid(θ)) over the candidates 0, 1/D … 1, D = `count`.

    No logit of the softmax is further than 1 from another, so no candidate weighs more than e times another; the
    greatest α gives that weight to all candidates from some one on.
    """
    p = candidates(count).double()
    upper = [torch.where(p >= start, torch.e, 1.0).double() for start in p]
    greatest = max(float(weights @ p / weights.sum()) for weights in upper)
    return 1 - greatest, greatest


def expected_sparsity(
    mixture: Float[Tensor, "groups candidates"], candidates: Float[Tensor, " candidates"]
) -> Float[Tensor, " groups"]:
    """α = Σ_d β_d p_d (BESA Eq. 3)."""
    return mixture @ candidates


def sum_groups(rows: Float[Tensor, "rows ..."], size: int) -> Float[Tensor, "groups ..."]:
    """Sums over each group of `size` rows."""
    if size == 1:
        return rows
    short = -len(rows) % size
    padded = torch.cat([rows, rows.new_zeros(short, *rows.shape[1:])]) if short else rows
    return padded.reshape(-1, size, *rows.shape[1:]).sum(1)


def repeat_rows(groups: Real[Tensor, " groups"], size: int, rows: int) -> Real[Tensor, " rows"]:
    """Each group's value for each of its rows."""
    return groups if size == 1 else groups.repeat_interleave(size)[:rows]


class _StraightThrough(torch.autograd.Function):
    """W, its lowest ranks zeroed; the gradient goes to the mixture as if each were W·(1 − P), to W where kept."""

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
        sums = kernels.candidate_sums(gradient, weight, ranks, count, floored=floored)
        of_weight = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            rows = repeat_rows(counts, ctx.size, len(weight))  # type: ignore[attr-defined]
            of_weight = kernels.mask(gradient, ranks, rows, torch.empty_like(gradient))
        return sum_groups(sums, ctx.size), of_weight, None, None, None, None, None  # type: ignore[attr-defined]


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
    """Ŵ: the weight without the `counts[g]` lowest ranks of each row of group g; its gradient goes to 1 − P (Eq. 6).

    dL/dβ_d = − Σ_{j < p_d·C} g_j with g = (∂L/∂Ŵ)∘W in rank order. No probability matrix is formed. A weight that is
    learned itself (its grid, say) gets the gradient of what is kept of it.

    Parameters
    ----------
    mixture : Tensor of shape (groups, candidates)
    weight, ranks : Tensors of shape (rows, cols)
        `ranks` as from `besa_cli.ops.kernels.ranks`.
    counts : integer Tensor of shape (groups,)
        Weights pruned in each row of a group: α·C as a whole number.
    size : int
        Rows in a group.
    out : Tensor of shape (rows, cols), optional
        Written and returned; its dtype is the result's. It must not be needed by a backward pass that is still to come.
    floored : bool
        The gradient sums over j < ⌊p_d·C⌋, by default over j < p_d·C.
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
    """The groups' sparsities after one common tilt θ_d + t·p_d that brings their weighted mean to `target`.

    Parameters
    ----------
    logits : Tensor of shape (groups, candidates)
    weights : Tensor of shape (groups,)
        Weights (numbers in the linear) in each group.
    target : float
        Asked sparsity of the window, strictly between 0 and 1.

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
    """The groups' mean sparsity, and how fast it rises with a common tilt t of θ_d + t·p_d: the mean of Var_β(p)."""
    shares = weights / weights.sum()
    first, variance = _moments(mixture, candidates)
    return shares @ first, shares @ variance


def _moments(mixture: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of p under each group's mixture."""
    first = expected_sparsity(mixture, candidates)
    return first, mixture @ candidates.square() - first.square()


def newton_tilt(
    logits: Float[Tensor, "groups candidates"],
    weights: Float[Tensor, " groups"],
    candidates: Float[Tensor, " candidates"],
    target: float,
) -> Float[Tensor, ""]:
    """The t of θ_d + t·p_d that one step of Newton's method gives for what a step of learning has lost of the target.

    Where it ends is the tilt of `project`.
    """
    mean, slope = mean_and_slope(mixture(logits), weights, candidates)
    steepest = float(len(candidates))  # a tilt that makes one candidate e times as likely as the one before it
    return ((target - mean) / slope.clamp_min(_FLAT)).clamp(-steepest, steepest)


def project_gradient(
    gradient: Float[Tensor, "groups candidates"],
    mixture: Float[Tensor, "groups candidates"],
    weights: Float[Tensor, " groups"],
    candidates: Float[Tensor, " candidates"],
) -> Float[Tensor, "groups candidates"]:
    """∂L/∂θ where a common tilt follows every change of θ so that the mean sparsity s stays.

    That is G − μ·∂s/∂θ with the Lagrange multiplier μ = Σ G_gd·p_d ÷ the slope of `mean_and_slope`, and ∂s/∂θ_gd = the
    group's share of the weights · β_d·(p_d − α).

    Parameters
    ----------
    gradient : Tensor of shape (groups, candidates)
        G = ∂L/∂θ with nothing that holds the sparsity.
    mixture : Tensor of shape (groups, candidates)
        β = softmax(θ).
    weights : Tensor of shape (groups,)
        Weights (numbers in the linear) in each group.
    """
    shares = weights / weights.sum()
    sparsity, variance = _moments(mixture, candidates)
    multiplier = (gradient @ candidates).sum() / (shares @ variance).clamp_min(_FLAT)
    risen = candidates - sparsity.unsqueeze(1)
    risen *= (multiplier * shares).unsqueeze(1)
    return torch.addcmul(gradient, mixture, risen, value=-1, out=risen)  # one matrix of this size, not five


def _solve_tilt(theta: Tensor, weights: Tensor, p: Tensor, target: float) -> float:
    """Newton's method on the mean sparsity, which rises with the tilt; halving wherever a step leaves the bracket."""
    low, high, tilt = -1e6, 1e6, 0.0
    for _ in range(_STEPS):
        mean, slope = map(float, mean_and_slope(mixture(theta + tilt * p), weights, p))
        low, high = (tilt, high) if mean < target else (low, tilt)
        step = tilt + (target - mean) / slope if slope > 0 else low
        following = step if low < step < high else (low + high) / 2
        if abs(mean - target) < 1e-13 or following in (low, high):
            break
        tilt = following
    return tilt
