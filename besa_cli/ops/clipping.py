"""Learned clipping: the range of each group's grid relative to its extreme weights (BESA Eq. 7; OmniQuant's LWC).

γ0, γ1 = sigmoid of learned logits, one pair per group, or one logit if the grid is symmetric:

    h = (γ1·max(W) − γ0·min(W)) / (2^N − 1)      z = −round(γ0·min(W)/h)

All roundings are straight-through: the gradient of a weight inside the grid goes to h, that of a clipped one to the end
at which it was clipped.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from besa_cli.ops import affine, kernels
from besa_cli.ops.affine import Grid, Quantized

_WIDEST, _NARROWEST, _STEP = 4.0, -2.0, 0.25  # sigmoid(4) = 0.982, sigmoid(-1.75) = 0.148


def widest(weight: Float[Tensor, "rows cols"], grid: Grid) -> Float[Tensor, "rows groups ends"]:
    """Return logits of a grid that nearly reaches the extremes; `ends` is 1 on a symmetric grid, else 2."""
    rows, cols = weight.shape
    return torch.full((rows, grid.groups(cols), 1 if grid.symmetric else 2), _WIDEST, device=weight.device)


class _RoundHalf(torch.autograd.Function):
    """Rounding to the nearest positive fp16 number, straight-through."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        return affine.representable(value).float()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient


class _Round(torch.autograd.Function):
    """Rounding to the nearest code, straight-through."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, top: int) -> Tensor:
        return value.round().clamp(0, top)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _OnGrid(torch.autograd.Function):
    """Weights on a grid, (clamp(round(W/h) + z) − z)·h, with gradients for h and z."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, weight: Tensor, scales: Tensor, zeros: Tensor, grid: Grid
    ) -> Tensor:
        ctx.save_for_backward(weight, scales, zeros)
        ctx.grid = grid  # type: ignore[attr-defined]
        return kernels.on_grid(weight, scales, zeros, grid.width(weight.shape[1]), grid.top)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales, zeros = ctx.saved_tensors  # type: ignore[attr-defined]
        grid: Grid = ctx.grid  # type: ignore[attr-defined]
        slopes = kernels.grid_slopes(
            gradient.contiguous(), weight, scales, zeros, grid.width(weight.shape[1]), grid.top
        )
        return None, *slopes, None


class Clipped:
    """One linear with a learned grid.

    Parameters
    ----------
    weight : Tensor of shape (rows, cols)
    grid : Grid
    """

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        self.weight, self.grid = weight, grid
        self.low, self.high = affine.extremes(weight, grid)

    def bounds(self, logits: Float[Tensor, "rows groups ends"]) -> tuple[Tensor, Tensor]:
        """Compute the ends of each group's grid, γ0·min(W) and γ1·max(W), each of shape (rows, groups)."""
        strengths = logits.sigmoid()
        return strengths[..., 0] * self.low, strengths[..., -1] * self.high

    def weights(self, logits: Float[Tensor, "rows groups ends"]) -> Float[Tensor, "rows cols"]:
        """Compute Ŵ, differentiable with respect to the logits and equal to the weights of `quantized`."""
        low, high = self.bounds(logits)
        scales = _RoundHalf.apply((high - low) / self.grid.top)  # type: ignore[no-untyped-call]
        if self.grid.symmetric:
            zeros = torch.full_like(scales, float(self.grid.middle))
        else:
            zeros = _Round.apply(-low / scales, self.grid.top)  # type: ignore[no-untyped-call]
        result: Tensor = _OnGrid.apply(self.weight, scales, zeros, self.grid)  # type: ignore[no-untyped-call]
        return result

    def searched(self, sums: Float[Tensor, " cols"]) -> Float[Tensor, "rows groups ends"]:
        """Search 24 logits, equal for both ends, for the smallest Σ_c ‖X_:,c‖²·(ŵ − w)² of each group.

        Parameters
        ----------
        sums : Tensor of shape (cols,)
            ‖X_:,c‖² of the linear's inputs, from `besa_cli.ops.importance.squared_sums`.
        """
        best = widest(self.weight, self.grid)
        least = torch.full(best.shape[:2], torch.inf, device=best.device)
        for logit in torch.arange(_WIDEST, _NARROWEST, -_STEP).tolist():
            differences = self.weights(torch.full_like(best, logit)) - self.weight.float()
            error = affine.grouped(differences.square() * sums, self.grid).sum(2)
            best[error < least] = logit
            least = torch.minimum(least, error)
        return best

    def quantized(self, logits: Float[Tensor, "rows groups ends"]) -> Quantized:
        """Quantize with these logits."""
        scales, zeros = affine.scales_and_zeros(*self.bounds(logits), self.grid)
        codes = affine.encode(self.weight, scales, zeros, self.grid)
        return Quantized(codes=codes, scales=scales, zeros=zeros, grid=self.grid)
