"""Learning losses: the distance of the output from its target, and of the sparsity from the target sparsity.

Beside them the divergence of a model's predictions from another's.

If a step's samples are spread over several ranks, each computes its part of a loss, and the parts add up to the loss of
all samples: `total` turns a sum over one rank's tokens into the sum over all ranks.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

_SMALL = 1e-20

Total = Callable[[Tensor], Tensor]


def _identity(part: Tensor) -> Tensor:
    return part


def token(
    output: Float[Tensor, "*batch hidden"],
    target: Float[Tensor, "*batch hidden"],
    total: Total = _identity,
    channels: Float[Tensor, " hidden"] | None = None,
) -> Float[Tensor, ""]:
    """Compute the mean over tokens of ‖output − target‖² / ‖target‖²; like the next block's norm, it scales each token.

    In many models a few tokens have activations a thousand times larger than all others; under one common norm
    (`frobenius`), only these would be learned from.

    With `channels`, the weights of `channel_weights`, output and target are both multiplied by them: the loss
    `sensitivity`.
    """
    error, size = output.float() - target.float(), target.float()
    if channels is not None:
        error, size = error * channels, size * channels
    relative = error.square().sum(-1) / size.square().sum(-1).clamp_min(_SMALL)
    return relative.sum() / total(torch.tensor(float(relative.numel()), device=relative.device))


def channel_weights(sensitivity: Float[Tensor, " hidden"]) -> Float[Tensor, " hidden"]:
    """Return the sensitivity of every channel divided by their root mean square, fp32; ones if all are zero."""
    values = sensitivity.float()
    largest = values.amax()
    if not bool(largest > 0):
        return torch.ones_like(values)
    relative = values / largest  # so that no square underflows
    return relative / relative.square().mean().sqrt()


def frobenius(
    output: Float[Tensor, "*batch hidden"], target: Float[Tensor, "*batch hidden"], total: Total = _identity
) -> Float[Tensor, ""]:
    """Compute ‖output − target‖²_F / ‖target‖²_F: BESA Eq. 1, independent of the activations' scale."""
    error = (output.float() - target.float()).square().sum()
    return error / total(target.float().square().sum()).clamp_min(_SMALL)


def channel(
    output: Float[Tensor, "*batch hidden"], target: Float[Tensor, "*batch hidden"], total: Total = _identity
) -> Float[Tensor, ""]:
    """Compute the mean over channels of Σ error² / Σ target², normalized per channel (the released program's form)."""
    hidden = target.shape[-1]
    error = (output.float() - target.float()).reshape(-1, hidden).square().sum(0)
    return (error / total(target.float().reshape(-1, hidden).square().sum(0)).clamp_min(_SMALL)).mean()


def sparsity_penalty(sparsity: Float[Tensor, ""], target: float) -> Float[Tensor, ""]:
    """Compute ((s − ŝ)/ŝ)², the penalty on missing ŝ (BESA Eq. 1 in the released program's relative form)."""
    return ((sparsity - target) / target).square()


def divergence(
    logits: Float[Tensor, "*batch vocabulary"], target: Float[Tensor, "*batch vocabulary"]
) -> Float[Tensor, ""]:
    """Compute Σ KL(softmax(target) ‖ softmax(logits)) over all positions, in nats and fp32; the target is constant."""
    wanted = target.detach().float().log_softmax(-1)
    return torch.nn.functional.kl_div(logits.float().log_softmax(-1), wanted, reduction="sum", log_target=True)
