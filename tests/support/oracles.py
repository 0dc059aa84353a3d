"""Slow, plain second opinions: Python loops and exact fractions."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor, nn


def levelled(shares: Sequence[Fraction], total: int, lower: Sequence[int], upper: Sequence[int]) -> list[Fraction]:
    """Shares shifted by one number, between their bounds, so that they sum to `total`: exact, by the sum's corners."""

    def at(shift: Fraction) -> list[Fraction]:
        return [
            min(max(share + shift, Fraction(low)), Fraction(high))
            for share, low, high in zip(shares, lower, upper, strict=True)
        ]

    if total <= sum(lower):
        return [Fraction(low) for low in lower]
    if total >= sum(upper):
        return [Fraction(high) for high in upper]
    corners = sorted({bound - share for bounds in (lower, upper) for share, bound in zip(shares, bounds, strict=True)})
    for left, right in pairwise(corners):
        below, above = sum(at(left)), sum(at(right))
        if below <= total <= above:
            slope = (above - below) / (right - left)
            return at(left + (total - below) / slope if slope else left)
    raise AssertionError("a total between the bounds lies between two corners")


def rounded(
    shares: Sequence[Fraction], total: int, lower: Sequence[int], upper: Sequence[int], ties: Sequence[float]
) -> list[int]:
    """The floor of each levelled share; the rest by largest remainder, then smallest tie, then index."""
    real = levelled(shares, total, lower, upper)
    counts = [share.numerator // share.denominator for share in real]
    places = sorted(range(len(real)), key=lambda place: (counts[place] - real[place], ties[place], place))
    while sum(counts) < min(max(total, sum(lower)), sum(upper)):
        counts[places.pop(0)] += 1
    return counts


def row_wise(scores: Tensor, total: int) -> Tensor:
    """The mask with an equal share in every row; −1 marks weights that are zero already. True = keep."""
    values = scores.tolist()
    rows, cols = len(values), len(values[0])
    order = [sorted(range(cols), key=lambda col: (row[col], col)) for row in values]
    zeros = [sum(score < 0 for score in row) for row in values]
    share, bounds = [Fraction(total, rows)] * rows, [cols] * rows
    floors = [int(real) for real in levelled(share, total, zeros, bounds)]
    following = [values[row][order[row][min(floors[row], cols - 1)]] for row in range(rows)]
    counts = rounded(share, total, zeros, bounds, following)
    keep = [[col not in order[row][: counts[row]] for col in range(cols)] for row in range(rows)]
    return torch.tensor(keep)


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """The n:m mask, window by window; −1 marks weights that are zero already. True = keep."""
    keep = []
    for row in scores.tolist():
        kept = [score >= 0 for score in row]
        for start in range(0, len(row) - m + 1, m):
            for col in sorted(range(start, start + m), key=lambda col: (row[col], col))[:n]:
                kept[col] = False
        keep.append(kept)
    return torch.tensor(keep)


def prune_probability(mixture: Tensor, cols: int) -> Tensor:
    """P(j) = Σ_{d : p_d·C > j} β_d with p_d = d/D (BESA Eq. 4), term by term in float64."""
    count = mixture.shape[1] - 1
    return torch.tensor(
        [
            [sum(beta for d, beta in enumerate(row) if Fraction(d, count) * cols > rank) for rank in range(cols)]
            for row in mixture.double().tolist()
        ],
        dtype=torch.float64,
    )


def surgeon(weight: Tensor, gram: Tensor, keep: Tensor, damping: float) -> Tensor:
    """Optimal brain surgeon with a fixed mask: left to right, with the inverse Hessian of the columns still to come.

    Removing weight q changes the columns to come by −w_q / [H⁻¹]_qq · [H⁻¹]_q: (Hassibi & Stork 1992).
    """
    updated, hessian = weight.double().clone(), damped(gram, damping)
    for row in range(weight.shape[0]):
        for col in range(weight.shape[1]):
            if not keep[row, col]:
                inverse = torch.linalg.inv(hessian[col:, col:])
                updated[row, col:] -= updated[row, col] / inverse[0, 0] * inverse[0]
                updated[row, col] = 0.0
    return updated


def saliency(weight: Tensor, gram: Tensor, damping: float) -> Tensor:
    """w_q² / [H⁻¹]_qq, the inverse being that of column q and those to its right."""
    hessian = damped(gram, damping)
    cols = weight.shape[1]
    inverse = torch.stack([torch.linalg.inv(hessian[col:, col:])[0, 0] for col in range(cols)])
    return weight.double().square() / inverse


def damped(gram: Tensor, damping: float) -> Tensor:
    """XᵀX + damping · mean(diagonal) · 1 in float64, 1 on the diagonal of columns that never saw an input."""
    hessian = gram.double().clone()
    for col in range(len(hessian)):
        if hessian[col, col] == 0:
            hessian[col, col] = 1.0
    return hessian + damping * float(hessian.diagonal().mean()) * torch.eye(len(hessian), dtype=torch.float64)


def prune_plainly(model: nn.Module, block: nn.Module, rows: Tensor, sparsity: float) -> None:
    """Zero the weights with the lowest |W|·‖X‖ in every row; the share is a whole number of weights in every linear."""
    norms: dict[nn.Linear, Tensor] = {}
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    handles = [
        linear.register_forward_pre_hook(
            lambda module, args: norms.update({module: args[0].flatten(0, -2).square().sum(0).sqrt()})
        )
        for linear in linears
    ]
    with torch.no_grad():
        model(rows, use_cache=False)
        for handle in handles:
            handle.remove()
        for linear in linears:
            scores = linear.weight.abs() * norms[linear]
            lowest = scores.argsort(1)[:, : round(sparsity * scores.shape[1])]
            linear.weight.scatter_(1, lowest, 0.0)
