"""Shared parts of gradient-based learning: loss functions, optimizer, learning-rate schedule and final comparison."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import TypedDict

from besa_cli.choices import Loss
from besa_cli.errors import BesaError
from besa_cli.ops import losses
from besa_cli.stream.block import Block, Phase
from besa_cli.system import compute

_EPSILON = 1e-16  # AdamW's epsilon: gradients shrink with the size of the block and must stay well above it
CURVE_POINTS = 50  # points of a learning curve in the report of a block
_COMPARED, _SAMPLES = 4096, 8  # minimum tokens and samples on which learned and unlearned masks are compared


class LearnedFacts(TypedDict):
    """The fields of a `Decision` that describe its learning."""

    learned_loss: float
    curve: tuple[float, ...]


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


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps of a learning, and what they minimise.

    Attributes
    ----------
    loss : {"token", "sensitivity", "channel", "frobenius"}
    epochs : int
        Passes over the samples, each in an order drawn by the block's seed.
    batch_size : int
        Samples in one step.
    phase : Phase
        Name of the work in the live display.
    rate_option : str
        Option of the learning rate, named where it is too large.
    """

    loss: Loss
    epochs: int = 1
    batch_size: int = 1
    phase: Phase = "learning"
    rate_option: str = "--lr"


def minimise(
    block: Block,
    weights: Callable[[], Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
) -> list[float]:
    """Change the optimizer's parameters so that the block keeps its output, and return the loss of every step.

    All rates decay along a half cosine from those that the optimizer has.

    Parameters
    ----------
    block : Block
    weights : function
        Returns the linears' weights, by name and in the compute dtype, as they follow from the parameters now.
    optimizer : torch.optim.Optimizer
    schedule : Schedule

    Raises
    ------
    BesaError
        The loss is not finite.
    """
    measured, world, samples = measure(block, schedule.loss), block.rank_share.world, block.rank_share.samples
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(block.seed)
    order = [torch.randperm(samples, generator=generator) for _ in range(schedule.epochs)]
    steps = [part for epoch in order for part in torch.split(epoch, schedule.batch_size)]
    history: list[float] = []
    with compute.repeated_passes():
        for chosen in steps:
            inputs, target = block.step_batch(chosen)
            output = block.forward(inputs, weights())
            scale = len(chosen) * output.shape[1]  # a token's gradient would be lost in fp16 after the mean over all
            objective = scale * measured(output, target.to(output.device), world.all_reduce_)
            if objective.requires_grad:  # not so on a rank that has none of the samples
                objective.backward()
            loss = objective.detach() / scale
            for parameter in learned:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            world.all_reduce_list_([loss, *(parameter.grad for parameter in learned)])
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * half_cosine(len(history) / len(steps))
            optimizer.step()
            optimizer.zero_grad()
            history.append(require_finite(float(loss), block.index, schedule.rate_option))
            block.on_step(len(history), len(steps), schedule.phase)
    return history


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


def curve(history: Sequence[float]) -> tuple[float, ...]:
    """Return the loss over the steps in at most `CURVE_POINTS` points: means of equal parts of the steps, in order."""
    points = min(CURVE_POINTS, len(history))
    edges = [len(history) * point // points for point in range(points + 1)] if points else []
    return tuple(math.fsum(history[start:end]) / (end - start) for start, end in pairwise(edges))


def learned(history: Sequence[float]) -> LearnedFacts:
    """Return what a decision says of its learning."""
    return {"learned_loss": tail_mean(history), "curve": curve(history)}


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
