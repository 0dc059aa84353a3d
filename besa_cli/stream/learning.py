"""What all learning by gradient shares: measures of an error, the optimizer and its falling rate, and what decides."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from besa_cli.choices import Loss
from besa_cli.errors import BesaError
from besa_cli.ops import losses
from besa_cli.stream.block import Block
from besa_cli.system import compute

MEASURES = {"token": losses.token, "channel": losses.channel, "frobenius": losses.frobenius}
_EPSILON = 1e-16  # AdamW's; the gradient of one number falls with the size of the block, and must not drown in it
_COMPARED, _SAMPLES = 4096, 8  # at least so many tokens and samples: on these what was learned has to beat what was not


def adamw(learned: Sequence[Tensor], rate: float) -> torch.optim.AdamW:
    """AdamW without decay of what is learned."""
    return torch.optim.AdamW(list(learned), lr=rate, weight_decay=0.0, eps=_EPSILON, fused=True)


def half_cosine(progress: float) -> float:
    """The share of the rate at a share of the steps: from 1 at the start to 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def require_finite(value: float, index: int, *smaller: str) -> float:
    """A loss as it is.

    Raises
    ------
    BesaError
        It is no number; `smaller` are the options that may be too large.
    """
    if not math.isfinite(value):
        raise BesaError(
            f"learning in block {index} gave {value}",
            f"compute with --dtype float32, or give a smaller {' or '.join(smaller)}",
        )
    return value


def tail_mean(history: Sequence[float]) -> float:
    """The mean loss of the last tenth of all steps."""
    last = history[-max(len(history) // 10, 1) :]
    return math.fsum(last) / len(last)


def compare_errors(block: Block, weights: Mapping[str, Tensor], loss: Loss) -> tuple[float, float]:
    """The mean loss and the mean relative error of each token under fixed weights, over the first samples of all ranks.

    Parameters
    ----------
    block : Block
    weights : one Tensor of shape (rows, cols) a linear, in the dtype of computation
    loss : {"token", "channel", "frobenius"}
    """
    world, measure = block.share.world, MEASURES[loss]
    compared = min(block.share.samples, max(math.ceil(_COMPARED / block.tokens.shape[1]), _SAMPLES))
    found: list[tuple[float, float]] = []
    with torch.no_grad(), compute.repeated_passes():
        for chosen in torch.split(torch.arange(compared), world.size):
            inputs, target = block.step_batch(chosen)
            if len(inputs):
                output = block.forward(inputs, weights)
                target = target.to(output.device)
                found.append((float(measure(output, target)), float(losses.token(output, target))))
    mean_loss, error = (world.all_reduce_float(math.fsum(pair[which] for pair in found)) / compared for which in (0, 1))
    return mean_loss, error
