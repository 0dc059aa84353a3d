"""What learning minimises: how far the output is from its target, and the sparsity from the asked one.

Where a step's samples are spread over several processes, each gives its part of a loss and the parts add up to the loss
of all samples: `total` replaces a sum over a part's tokens by the sum over all.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

_SMALL = 1e-20

Total = Callable[[Tensor], Tensor]


def _alone(part: Tensor) -> Tensor:
    return part


def token(
    output: Float[Tensor, "*batch hidden"], target: Float[Tensor, "*batch hidden"], total: Total = _alone
) -> Float[Tensor, ""]:
    """Mean over tokens of ‖output − target‖² / ‖target‖²: each token by its own norm, as the next block sees it.

    A few tokens of many models carry activations a thousand times larger than all others; under one common norm
    (`frobenius`) nothing else would be learned from.
    """
    error = (output.float() - target.float()).square().sum(-1)
    relative = error / target.float().square().sum(-1).clamp_min(_SMALL)
    return relative.sum() / total(torch.tensor(float(relative.numel()), device=relative.device))


def frobenius(
    output: Float[Tensor, "*batch hidden"], target: Float[Tensor, "*batch hidden"], total: Total = _alone
) -> Float[Tensor, ""]:
    """‖output − target‖²_F / ‖target‖²_F: BESA Eq. 1, made free of the activations' scale."""
    error = (output.float() - target.float()).square().sum()
    return error / total(target.float().square().sum()).clamp_min(_SMALL)


def channel(
    output: Float[Tensor, "*batch hidden"], target: Float[Tensor, "*batch hidden"], total: Total = _alone
) -> Float[Tensor, ""]:
    """Mean over channels of Σ error² / Σ target²: each channel by its own norm (the released program's form)."""
    hidden = target.shape[-1]
    error = (output.float() - target.float()).reshape(-1, hidden).square().sum(0)
    return (error / total(target.float().reshape(-1, hidden).square().sum(0)).clamp_min(_SMALL)).mean()


def sparsity_penalty(sparsity: Float[Tensor, ""], target: float) -> Float[Tensor, ""]:
    """((s − ŝ)/ŝ)²: the pull towards the asked sparsity (BESA Eq. 1, in the released program's relative form)."""
    return ((sparsity - target) / target).square()
