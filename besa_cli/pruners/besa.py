"""BESA: learn how much to prune in every row or linear so that the block keeps its output (arXiv 2402.16880).

Per block: score and rank once, learn the mixtures over candidate sparsities with a straight-through mask, project onto
the exact budget, and keep the uniform allocation where learning did not beat it on the same samples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from besa_cli.errors import BesaError, UsageError
from besa_cli.ops import allocation, budget, losses, masks
from besa_cli.pruners import wanda
from besa_cli.stream import Block, Pruned, batches

Granularity = Literal["row", "layer"]
Target = Literal["block", "stream"]
Loss = Literal["token", "channel", "frobenius"]

_MEASURES = {"token": losses.token, "channel": losses.channel, "frobenius": losses.frobenius}
_EPSILON = 1e-16  # AdamW's; the gradient of one logit falls with the size of the block, and must not drown in it
_COMPARED = 32  # samples on which the learned allocation has to beat the uniform one


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of BESA.

    Attributes
    ----------
    granularity : {"row", "layer"}
        What gets a sparsity of its own: every row, or every linear.
    target : {"block", "stream"}
        What the block should keep: its own dense output on the compressed inputs, or the dense model's hidden states.
    epochs, batch_size : int
        Passes over the calibration samples, and samples in one step.
    lr : float
        Learning rate of the mixture logits (AdamW), decaying to 0 along a half cosine.
    penalty : float
        Weight of the sparsity penalty ((s − ŝ)/ŝ)².
    candidates : int
        D: candidate sparsities are 0, 1/D, …, 1.
    loss : {"token", "channel", "frobenius"}
        Squared error relative to each token's norm, to each channel's norm, or to the norm of the whole.
    """

    granularity: Granularity = "row"
    target: Target = "block"
    epochs: int = 1
    batch_size: int = 1
    lr: float = 0.1
    penalty: float = 5.0
    candidates: int = 100
    loss: Loss = "token"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "candidates"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} is less than 1", "give 1 or more")
        for name in ("lr", "penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"--{name} {getattr(self, name)} is not a number from 0 up", "leave it out")


class _Linear:
    """One linear while its allocation is learned."""

    def __init__(self, weight: Tensor, scores: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight.to(dtype)
        self.scores = masks.zeros_first(scores, weight)
        self.order = masks.order(self.scores)
        self.ranks = masks.ranks(self.order)
        self.rows, self.cols = weight.shape
        self.zeros = (weight == 0).sum(1)


def prune(block: Block, options: Options) -> Pruned:
    """Learn the block's allocation, project it onto the exact budget and compare it with the uniform one."""
    scores = wanda.scores(block)
    dtype = next(iter(block.linears.values())).weight.dtype
    linears = {name: _Linear(weight, scores.pop(name), dtype) for name, weight in block.weights.items()}
    sizes = {name: linear.rows * linear.cols for name, linear in linears.items()}
    goal = block.budget / sum(sizes.values())
    uniform = _masks(linears, _uniform_shares(linears, block.budget), block.budget)
    if block.budget <= sum(int(linear.zeros.sum()) for linear in linears.values()):
        return Pruned(masks=uniform)
    p = allocation.candidates(options.candidates).to(block.inputs.device)
    logits, learned_loss = _learn(block, linears, p, goal, options)
    group_weights = [sizes[name] / len(theta) for name, theta in zip(linears, logits, strict=True)]
    sparsities = allocation.project(logits, group_weights, p, goal)
    learned = _masks(linears, _shares(linears, sparsities), block.budget)
    before, after = (_errors(block, linears, kept, options.loss) for kept in (uniform, learned))
    better = after[0] < before[0]
    return Pruned(
        masks=learned if better else uniform,
        error_before=before[1],
        error_after=after[1] if better else before[1],
        learned_loss=learned_loss,
        kept_uniform=not better,
    )


def _learn(
    block: Block, linears: Mapping[str, _Linear], p: Tensor, goal: float, options: Options
) -> tuple[list[Tensor], float]:
    """Minimise reconstruction + penalty; returns the mixture logits and the mean loss of the last tenth of steps."""
    groups = [linear.rows if options.granularity == "row" else 1 for linear in linears.values()]
    logits = [allocation.initial_logits(count, p, goal).requires_grad_() for count in groups]
    optimizer = torch.optim.AdamW(logits, lr=options.lr, weight_decay=0.0, eps=_EPSILON)
    samples = len(block.inputs)
    steps = options.epochs * math.ceil(samples / options.batch_size)
    generator = torch.Generator().manual_seed(block.seed)
    measure = _MEASURES[options.loss]
    total = sum(linear.rows * linear.cols for linear in linears.values())
    history: list[float] = []
    for _ in range(options.epochs):
        for chosen in torch.split(torch.randperm(samples, generator=generator), options.batch_size):
            weights, expected = _soft_weights(linears, logits, p)
            output = block.forward(block.inputs[chosen], weights)
            reconstruction = measure(output, block.target[chosen])
            penalty = losses.sparsity_penalty(expected / total, goal)
            scale = output[..., 0].numel()  # one gradient a token would be lost in fp16 after the mean over tokens
            (scale * (reconstruction + options.penalty * penalty)).backward()  # type: ignore[no-untyped-call]
            # not a scheduler of torch: that and its optimizer hold each other until a garbage collection finds them
            optimizer.param_groups[0]["lr"] = options.lr * (0.5 * (1 + math.cos(math.pi * len(history) / steps)))
            optimizer.step()
            optimizer.zero_grad()
            history.append(_finite(float(reconstruction.detach()), block.index))
            block.on_step(len(history), steps, "learning")
    _finite(math.fsum(float(theta.detach().sum()) for theta in logits), block.index)
    last = history[-max(len(history) // 10, 1) :]
    return [theta.detach() for theta in logits], math.fsum(last) / len(last)


def _finite(value: float, index: int) -> float:
    if not math.isfinite(value):
        raise BesaError(
            f"learning in block {index} gave {value}",
            "compute with --dtype float32, or give a smaller --lr or --penalty",
        )
    return value


def _soft_weights(
    linears: Mapping[str, _Linear], logits: Sequence[Tensor], p: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The masked weights, differentiable in the logits, and the expected number of pruned weights."""
    weights: dict[str, Tensor] = {}
    expected = torch.zeros((), device=p.device)
    for (name, linear), theta in zip(linears.items(), logits, strict=True):
        mixture = allocation.mixture(theta)
        alpha = allocation.expected_sparsity(mixture, p)
        counts = (alpha.detach() * linear.cols).round().to(linear.order.dtype).expand(linear.rows)
        weights[name] = allocation.straight_through(mixture, linear.weight, linear.order, linear.ranks, counts)
        expected = expected + alpha.sum() * (linear.rows * linear.cols / len(theta))
    return weights, expected


def _uniform_shares(linears: Mapping[str, _Linear], total: int) -> dict[str, budget.Floats]:
    share = total / sum(linear.rows * linear.cols for linear in linears.values())
    return {name: np.full(linear.rows, share * linear.cols) for name, linear in linears.items()}


def _shares(linears: Mapping[str, _Linear], sparsities: Sequence[Tensor]) -> dict[str, budget.Floats]:
    """Real counts for each row from each group's sparsity."""
    return {
        name: (alpha.expand(linear.rows) * linear.cols).cpu().numpy()
        for (name, linear), alpha in zip(linears.items(), sparsities, strict=True)
    }


def _masks(linears: Mapping[str, _Linear], shares: Mapping[str, budget.Floats], total: int) -> dict[str, Tensor]:
    """Masks that prune exactly `total` weights, each row as near to its share as existing zeros allow."""
    wished = np.array([shares[name].sum() for name in linears])
    zeros = np.array([int(linear.zeros.sum()) for linear in linears.values()])
    sizes = np.array([linear.rows * linear.cols for linear in linears.values()])
    totals = budget.round_to_total(wished, total, zeros, sizes)
    kept = {}
    for (name, linear), count in zip(linears.items(), totals.tolist(), strict=True):
        counts = masks.row_counts(shares[name], count, linear.scores, linear.order)
        kept[name] = masks.keep_above(linear.ranks, counts)
    return kept


def _errors(
    block: Block, linears: Mapping[str, _Linear], kept: Mapping[str, Tensor], loss: Loss
) -> tuple[float, float]:
    """The mean loss and the mean relative error of each token under fixed masks, over the first `_COMPARED` samples."""
    weights = {name: linear.weight.masked_fill(~kept[name], 0.0) for name, linear in linears.items()}
    found: list[tuple[float, float]] = []
    with torch.no_grad():
        for sample in batches(min(len(block.inputs), _COMPARED), 1):
            output, target = block.forward(block.inputs[sample], weights), block.target[sample]
            found.append((float(_MEASURES[loss](output, target)), float(losses.token(output, target))))
    return math.fsum(pair[0] for pair in found) / len(found), math.fsum(pair[1] for pair in found) / len(found)
