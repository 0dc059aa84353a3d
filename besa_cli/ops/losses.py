"""Learning losses: the distance of the output from its target, and of the sparsity from the target sparsity.

Beside them the divergence of a model's predictions from another's.

If a step's samples are spread over several ranks, each computes its part of a loss, and the parts add up to the loss of
all samples: `total` turns a sum over one rank's tokens into the sum over all ranks.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_SMALL = 1e-20
_VALUES = 1 << 20  # logits that a sweep over the positions looks at together: they stay in a processor's cache
_VALUES_OFF_CPU = 1 << 26

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
    """Compute Σ KL(softmax(target) ‖ softmax(logits)) over all positions, in nats and fp32; the target is constant.

    The gradient at the logits, softmax(logits) − softmax(target), is computed in the same sweep, a few positions at a
    time: fresh memory for several tensors of the size of all logits costs more than the arithmetic.
    """
    wanted = target.detach().flatten(0, -2)

    def piece(own: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        found, expected = own.float().log_softmax(-1), wanted[rows].float().log_softmax(-1)
        weights = expected.exp()
        loss = expected.sub_(found).mul_(weights).sum(-1)
        return loss, found.exp_().sub_(weights)

    return _sum(logits, piece)


def compare_predictions(
    logits: Float[Tensor, "*batch vocabulary"], target: Float[Tensor, "*batch vocabulary"]
) -> tuple[Float[Tensor, "*batch"], Bool[Tensor, "*batch"]]:
    """Compare the predictions of a model with those of another one, the target, at every position.

    A few positions are compared at a time, see `divergence`.

    Returns
    -------
    divergence : Tensor of the shape of all positions
        KL(softmax(target) ‖ softmax(logits)), in nats and fp32. Where the target gives −inf, nothing is added; where
        only the other logits are −inf, it is infinite.
    same : boolean Tensor of this shape
        True where both have the same largest logit; of equal ones, that of the lowest index.
    """
    found, expected = (each.reshape(-1, each.shape[-1]) for each in (logits, target))
    few = _rows_at_once(found)
    divergences = found.new_empty(len(found), dtype=torch.float32)
    same = found.new_empty(len(found), dtype=torch.bool)
    for start in range(0, len(found), few):
        rows = slice(start, start + few)
        own, wanted = found[rows].float(), expected[rows].float()
        logs = wanted.log_softmax(-1)
        weights = logs.exp()
        terms = logs.sub_(own.log_softmax(-1)).mul_(weights).masked_fill_(weights == 0, 0.0)
        divergences[rows] = terms.sum(-1)
        same[rows] = own.argmax(-1) == wanted.argmax(-1)
    return divergences.view(logits.shape[:-1]), same.view(logits.shape[:-1])


def own_labels(
    logits: Float[Tensor, "*batch vocabulary"], generator: torch.Generator | None = None
) -> Float[Tensor, ""]:
    """Compute the summed cross-entropy of labels drawn from the logits' own distribution, in nats and fp32."""

    def piece(own: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        found = own.float().softmax(-1)
        labels = torch.multinomial(found, 1, generator=generator)
        chosen = found.gather(-1, labels)
        return -chosen.log(), found.scatter_add_(-1, labels, torch.full_like(chosen, -1.0))

    return _sum(logits, piece)


def _rows_at_once(logits: Tensor) -> int:
    """Return the number of rows of a matrix of logits to look at together."""
    values = _VALUES if logits.device.type == "cpu" else _VALUES_OFF_CPU
    return max(1, values // logits.shape[1])


_Piece = Callable[[Tensor, slice], tuple[Tensor, Tensor]]  # logits of some rows → their losses, and the gradient


def _sum(logits: Tensor, piece: _Piece) -> Tensor:
    """Return the sum of the losses of all positions, a few positions at a time, with the gradient of `piece`."""
    total: Tensor = _Summed.apply(logits.flatten(0, -2), piece)  # type: ignore[no-untyped-call]
    return total


class _Summed(torch.autograd.Function):
    """Sum over rows of a loss whose gradient is known in closed form."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, piece: _Piece) -> Tensor:
        few = _rows_at_once(logits)
        gradient = torch.empty_like(logits) if logits.requires_grad else None
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for start in range(0, len(logits), few):
            rows = slice(start, start + few)
            losses, own = piece(logits[rows], rows)
            total += losses.sum(dtype=torch.float64)
            if gradient is not None:
                gradient[rows] = own
        ctx.gradient = gradient
        return total.float()

    @staticmethod
    def backward(ctx: Any, arrived: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.mul_(arrived), None
