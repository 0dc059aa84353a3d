"""Learned clipping: how far towards its extreme weights the grid of a group reaches (BESA Eq. 7; OmniQuant's LWC).

γ0, γ1 = sigmoid of learned numbers, one pair a group, one number where the grid is symmetric:

    h = (γ1·max(W) − γ0·min(W)) / (2^N − 1)      z = −round(γ0·min(W)/h)

Every rounding is straight-through: of a weight inside the grid the gradient goes to h, of a clipped one to the end at
which it was clipped.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from besa_cli.ops import affine, kernels
from besa_cli.ops.affine import Grid, Quantized

_WIDEST, _NARROWEST, _STEP = 4.0, -2.0, 0.25  # sigmoid(4) = 0.982, sigmoid(-1.75) = 0.148


def widest(weight: Float[Tensor, "rows cols"], grid: Grid) -> Float[Tensor, "rows groups ends"]:
    """Logits of a grid that reaches nearly to the extremes; `ends` is 1 on a symmetric grid, else 2."""
    rows, cols = weight.shape
    return torch.full((rows, grid.groups(cols), 1 if grid.symmetric else 2), _WIDEST, device=weight.device)


class _RoundHalf(torch.autograd.Function):
    """To the nearest fp16 number above zero, straight-through."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        return affine.representable(value).float()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient


class _Round(torch.autograd.Function):
    """To the nearest code, straight-through."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, top: int) -> Tensor:
        return value.round().clamp(0, top)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _OnGrid(torch.autograd.Function):
    """(clamp(round(W/h) + z) − z)·h; gradients to h and z."""

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
    """One linear whose grid is learned.

    Parameters
    ----------
    weight : Tensor of shape (rows, cols)
    grid : Grid
    """

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        self.weight, self.grid = weight, grid
        self.low, self.high = affine.extremes(weight, grid)

    def bounds(self, logits: Float[Tensor, "rows groups ends"]) -> tuple[Tensor, Tensor]:
        """Where the grid of each group begins and ends: γ0·min(W) and γ1·max(W), of shape (rows, groups)."""
        strengths = logits.sigmoid()
        return strengths[..., 0] * self.low, strengths[..., -1] * self.high

    def weights(self, logits: Float[Tensor, "rows groups ends"]) -> Float[Tensor, "rows cols"]:
        """Ŵ, differentiable in the logits; the same numbers as those of `quantized`."""
        low, high = self.bounds(logits)
        scales = _RoundHalf.apply((high - low) / self.grid.top)  # type: ignore[no-untyped-call]
        if self.grid.symmetric:
            zeros = torch.full_like(scales, float(self.grid.middle))
        else:
            zeros = _Round.apply(-low / scales, self.grid.top)  # type: ignore[no-untyped-call]
        found: Tensor = _OnGrid.apply(self.weight, scales, zeros, self.grid)  # type: ignore[no-untyped-call]
        return found

    def searched(self, sums: Float[Tensor, " cols"]) -> Float[Tensor, "rows groups ends"]:
        """The logits, of 24 and alike at both ends, that make Σ_c ‖X_:,c‖²·(ŵ − w)² of each group least.

        Parameters
        ----------
        sums : Tensor of shape (cols,)
            ‖X_:,c‖² of the linear's inputs: `besa_cli.ops.importance.squared_sums`.
        """
        found = widest(self.weight, self.grid)
        least = torch.full(found.shape[:2], torch.inf, device=found.device)
        for logit in torch.arange(_WIDEST, _NARROWEST, -_STEP).tolist():
            differences = self.weights(torch.full_like(found, logit)) - self.weight.float()
            error = affine.grouped(differences.square() * sums, self.grid).sum(2)
            found[error < least] = logit
            least = torch.minimum(least, error)
        return found

    def quantized(self, logits: Float[Tensor, "rows groups ends"]) -> Quantized:
        """The codes at these logits."""
        scales, zeros = affine.scales_and_zeros(*self.bounds(logits), self.grid)
        codes = affine.encode(self.weight, scales, zeros, self.grid)
        return Quantized(codes=codes, scales=scales, zeros=zeros, grid=self.grid)
