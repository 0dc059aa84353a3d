"""Shared parts of gradient-based learning: loss functions, optimizer, learning-rate schedule and final comparison."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from besa_cli.choices import Loss
from besa_cli.errors import BesaError
from besa_cli.ops import losses
from besa_cli.stream.block import Block
from besa_cli.system import compute

_EPSILON = 1e-16  # AdamW's epsilon: gradients shrink with the size of the block and must stay well above it
_COMPARED, _SAMPLES = 4096, 8  # minimum tokens and samples on which learned and unlearned masks are compared


class Measure(Protocol):
    """Loss of an output against its target; see `besa_cli.ops.losses`."""

    def __call__(self, output: Tensor, target: Tensor, total: losses.Total = ..., /) -> Tensor:
        """Return the loss, a scalar."""


def measure(block: Block, loss: Loss) -> Measure:
    """Return the function that computes a loss of the block's output."""
    if loss == "sensitivity":
        if block.sensitivity is None:
            raise RuntimeError("the method did not ask for the sensitivity of the channels")
        return error_measure(block)
    return {"token": losses.token, "channel": losses.channel, "frobenius": losses.frobenius}[loss]


def error_measure(block: Block) -> Measure:
    """Return the function that computes the block's reported error: per token, by sensitivity where that is known."""
    if block.sensitivity is None:
        return losses.token
    return partial(losses.token, channels=losses.channel_weights(block.sensitivity))


def adamw(learned: Sequence[Tensor], rate: float) -> torch.optim.AdamW:
    """Return an AdamW optimizer without weight decay."""
    return torch.optim.AdamW(list(learned), lr=rate, weight_decay=0.0, eps=_EPSILON, fused=True)


def half_cosine(progress: float) -> float:
    """Return the learning-rate factor of a half-cosine schedule, from 1 at `progress` 0 to 0 at `progress` 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def require_finite(value: float, index: int, *smaller: str) -> float:
    """Return the loss `value` of block `index` unchanged, after checking that it is finite.

    Raises
    ------
    BesaError
        The loss is NaN or infinite; the hint names the options `smaller`, whose values may be too large.
    """
    if not math.isfinite(value):
        raise BesaError(
            f"the loss became {value} while learning block {index}",
            f"compute with --dtype float32, or give a smaller {' or '.join(smaller)}",
        )
    return value


def tail_mean(history: Sequence[float]) -> float:
    """Return the mean loss over the last tenth of all steps."""
    last = history[-max(len(history) // 10, 1) :]
    return math.fsum(last) / len(last)


def compare_errors(block: Block, weights: Mapping[str, Tensor], loss: Loss) -> tuple[float, float]:
    """Return the mean loss and the mean relative error per token of fixed weights, over the first samples of all ranks.

    The error is that of the block's report: see `error_measure`.

    Parameters
    ----------
    block : Block
    weights : mapping of linear name to Tensor of shape (rows, cols), in the compute dtype
    loss : {"token", "sensitivity", "channel", "frobenius"}
    """
    world, measured, reported = block.rank_share.world, measure(block, loss), error_measure(block)
    compared = min(block.rank_share.samples, max(math.ceil(_COMPARED / block.tokens.shape[1]), _SAMPLES))
    pairs: list[tuple[float, float]] = []  # (loss, relative error) of each sample
    with torch.no_grad(), compute.repeated_passes():
        for chosen in torch.split(torch.arange(compared), world.size):
            inputs, target = block.step_batch(chosen)
            if len(inputs):
                output = block.forward(inputs, weights)
                target = target.to(output.device)
                pairs.append((float(measured(output, target)), float(reported(output, target))))
    mean_loss, error = (world.all_reduce_float(math.fsum(pair[which] for pair in pairs)) / compared for which in (0, 1))
    return mean_loss, error
