"""BESA: learn how much to prune in every row or linear so that the block keeps its output (arXiv 2402.16880).

With `bits` the weights are put on a grid first, and what is pruned are the quantized weights: how far each group's grid
reaches is learned together with the mixtures (section 3.3, Eq. 7).

Per block: score and rank once, learn the mixtures over candidate sparsities with a straight-through mask, project onto
the exact budget, and keep the uniform allocation where learning did not beat it on the same samples.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from prodigyopt import Prodigy
from torch import Tensor

from besa_cli import compute, windows
from besa_cli.choices import Importance, Loss, Optimizer, Preset, Target
from besa_cli.errors import BesaError, UsageError
from besa_cli.ops import affine, allocation, budget, clipping, importance, kernels, losses, masks, obs
from besa_cli.ops.affine import Grid, Quantized
from besa_cli.ops.clipping import Clipped
from besa_cli.pruners import wanda
from besa_cli.stream import Block, Pruned, batches

_MEASURES = {"token": losses.token, "channel": losses.channel, "frobenius": losses.frobenius}
_RATES = {"adamw": 0.1, "prodigy": 1.0}
_EPSILON = 1e-16  # AdamW's; the gradient of one logit falls with the size of the block, and must not drown in it
_DAMPING = 0.01
_CLIP_RATE = 0.01
_TIE = 1e-6  # of the source's scores beside those on the grid
_COMPARED = 16  # samples on which the learned allocation has to beat the uniform one


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of BESA.

    Attributes
    ----------
    window : "block", "attn-mlp" or a number
        What is reconstructed together: a block, its halves one after the other, or so many blocks.
    granularity : "row", "layer" or a number
        What gets a sparsity of its own: every row, every linear, or every so many rows.
    importance : {"wanda", "magnitude", "sparsegpt"}
        What ranks the weights of a row.
    target : {"block", "stream"}
        What the block should keep: its own dense output on the compressed inputs, or the dense model's hidden states.
    epochs, batch_size : int
        Passes over the calibration samples, and samples in one step.
    optimizer : {"adamw", "prodigy"}
    lr : float, optional
        Learning rate of the mixture logits, 0.1 for AdamW, decaying to 0 along a half cosine, and 1 for Prodigy.
    d_coef : float
        Prodigy's factor on its own estimate of the rate.
    penalty : float
        Weight of the sparsity penalty ((s − ŝ)/ŝ)².
    candidates : int
        D: candidate sparsities are 0, 1/D, …, 1.
    loss : {"token", "channel", "frobenius"}
        Squared error relative to each token's norm, to each channel's norm, or to the norm of the whole.
    bits, group_size, symmetric : optional
        The grid on which the weights are put, see `besa_cli.ops.affine.grid`; 128 and symmetric with `bits` alone.
    clip_lr : float, optional
        AdamW's rate for the clipping strengths; 0.01 with `bits`.
    preset : {"authors"}, optional
        ``authors``: smoothed mixtures that start at 0.5, a rate that stays, rows that prune the floor of their learned
        share, and neither projection onto the exact budget nor a comparison with the uniform masks.
    """

    window: str = windows.BLOCK
    granularity: str = "row"
    importance: Importance = "wanda"
    target: Target = "block"
    epochs: int = 1
    batch_size: int = 1
    optimizer: Optimizer = "adamw"
    lr: float | None = None
    d_coef: float = 1.0
    penalty: float = 5.0
    candidates: int = 100
    loss: Loss = "token"
    bits: int | None = None
    group_size: str | None = None
    symmetric: bool | None = None
    clip_lr: float | None = None
    preset: Preset | None = None

    def __post_init__(self) -> None:
        if self.lr is None:
            object.__setattr__(self, "lr", _RATES[self.optimizer])
        windows.check(self.window)
        self._settle_grid()
        for name in ("epochs", "batch_size", "candidates"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} is less than 1", "give 1 or more")
        for name in ("lr", "penalty", "d_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                place = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise UsageError(f"{place} is not a number from 0 up", "leave it out")
        if self.granularity not in ("row", "layer") and not (self.granularity.isdecimal() and int(self.granularity)):
            raise UsageError(
                f"--granularity '{self.granularity}' is neither row nor layer nor a number of rows",
                "row gives every row a sparsity of its own",
            )

    def _settle_grid(self) -> None:
        own = {"group_size": affine.GROUP, "symmetric": True, "clip_lr": _CLIP_RATE}
        for name, default in own.items():
            if self.bits is not None and getattr(self, name) is None:
                object.__setattr__(self, name, default)
            if self.bits is None and getattr(self, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} says nothing without --bits", "give --bits 4 with it")
        if self.bits is not None and self.preset:
            raise UsageError(
                f"--bits {self.bits} and --preset {self.preset} exclude each other", "leave one of them out"
            )
        if self.clip_lr is not None and not 0 <= self.clip_lr < math.inf:
            raise UsageError(f"--clip-lr {self.clip_lr} is not a number from 0 up", "leave it out")
        _ = self.grid

    @property
    def grid(self) -> Grid | None:
        """The grid on which the weights are put."""
        if self.bits is None:
            return None
        return affine.grid(self.bits, self.group_size or affine.GROUP, symmetric=self.symmetric is not False)

    @property
    def rate(self) -> float:
        """The learning rate that is used."""
        return float(self.lr or 0)

    def group(self, rows: int) -> int:
        """Rows of a linear with `rows` rows that share one mixture."""
        return {"row": 1, "layer": rows}.get(self.granularity) or min(int(self.granularity), rows)


def authors(granularity: str = "row") -> dict[str, Any]:
    """The released program's options: see docs/method.md, section 3."""
    target = "stream" if granularity == "layer" else "block"
    return {"target": target, "loss": "channel", "optimizer": "prodigy", "d_coef": 5.0, "penalty": 5.0}


class _Linear:
    """One linear while its allocation is learned: ranks, not scores, are what is kept for every weight."""

    def __init__(
        self, weight: Tensor, scores: Tensor, dtype: torch.dtype, group: int, clipped: Clipped | None = None
    ) -> None:
        exact = weight.dtype in (dtype, torch.bfloat16) and dtype != torch.float16
        self.weight = (weight if exact else weight.to(dtype)).contiguous()
        self.ranks = kernels.ranks(scores)
        self.masked = torch.empty_like(self.weight, dtype=dtype)
        self.rows, self.cols = weight.shape
        self.zeros = int((weight == 0).sum())
        self.group = group
        self.groups = math.ceil(self.rows / group)
        self.clipped = clipped

    def put(self, quantized: Quantized) -> None:
        """Take the weights of a grid that is settled."""
        self.weight = affine.dequantize(quantized).to(self.masked.dtype)

    @property
    def size(self) -> int:
        """Weights in the linear."""
        return self.rows * self.cols

    def group_sizes(self) -> Tensor:
        """Weights in each group, fp32."""
        ones = torch.ones(self.rows, device=self.weight.device)
        return allocation.of_groups(ones, self.group) * self.cols


class _Window:
    """All linears of one reconstruction window, and the block that they belong to."""

    def __init__(self, block: Block, options: Options) -> None:
        self.block, self.options = block, options
        self.scores = _scores(block, options.importance)
        dtype = next(iter(block.linears.values())).weight.dtype
        grid = options.grid
        self.clipped = {name: Clipped(weight, grid) for name, weight in block.weights.items()} if grid else {}
        self.linears = {
            name: _Linear(weight, self.score(name), dtype, options.group(len(weight)), self.clipped.get(name))
            for name, weight in block.weights.items()
        }
        self.device = next(iter(block.linears.values())).weight.device
        self.sizes = torch.cat([linear.group_sizes() for linear in self.linears.values()])
        self.cols = torch.cat([torch.full((x.groups,), float(x.cols)) for x in self.linears.values()]).to(self.device)
        self.p = allocation.candidates(options.candidates).to(self.device)
        self.goal = block.budget / sum(linear.size for linear in self.linears.values())

    def score(self, name: str) -> Tensor:
        """The scores of one linear, below zero where a weight is zero already."""
        weight = self.block.weights[name]
        scores = self.scores(name, weight)
        if name in self.clipped:  # on the grid many weights are alike: the source's decide between them
            scores = self.scores(name, self.clipped[name].nearest()) + _TIE * scores
        return masks.zeros_first(scores, weight)

    def split(self, groups: Tensor) -> list[Tensor]:
        """The part of each linear in a tensor with one row a group."""
        return list(torch.split(groups, [linear.groups for linear in self.linears.values()]))

    def mixture(self, theta: Tensor) -> Tensor:
        """β from the logits."""
        return allocation.mixture(theta.sigmoid() if self.options.preset == "authors" else theta)

    def counts(self, alpha: Tensor) -> list[Tensor]:
        """Weights that each row of a group prunes while learning, from the groups' sparsities; one tensor a linear."""
        real = alpha.detach() * self.cols
        return self.split((real.floor() if self.options.preset == "authors" else real.round()).to(torch.int32))

    def shares(self, sparsities: Tensor) -> dict[str, budget.Floats]:
        """Real counts for each row from each group's sparsity."""
        return {
            name: (allocation.of_rows(alpha, linear.group, linear.rows) * linear.cols).cpu().numpy()
            for (name, linear), alpha in zip(self.linears.items(), self.split(sparsities), strict=True)
        }

    def uniform_shares(self) -> dict[str, budget.Floats]:
        """The same share for every row."""
        return {name: np.full(linear.rows, self.goal * linear.cols) for name, linear in self.linears.items()}


def prune(block: Block, options: Options) -> Pruned:
    """Learn the block's allocation, project it onto the exact budget and compare it with the uniform one."""
    window = _Window(block, options)
    if block.budget <= sum(linear.zeros for linear in window.linears.values()):
        kept = _masks(window, window.uniform_shares())
        nearest = {name: affine.nearest(clipped.weight, clipped.grid) for name, clipped in window.clipped.items()}
        return Pruned(masks=kept, **_on_grid(nearest, kept))
    theta, strengths, learned_loss = _learn(window)
    quantized = {name: clipped.quantized(strengths[name]) for name, clipped in window.clipped.items()}
    for name, each in quantized.items():
        window.linears[name].put(each)
    if options.preset == "authors":
        return Pruned(masks=_learned_masks(window, theta), learned_loss=learned_loss, exact=False)
    sparsities = allocation.project(theta, window.sizes, window.p, window.goal)
    uniform, learned = (_masks(window, shares) for shares in (window.uniform_shares(), window.shares(sparsities)))
    before, after = (_errors(window, kept) for kept in (uniform, learned))
    better = after[0] < before[0]
    kept = learned if better else uniform
    return Pruned(
        masks=kept,
        **_on_grid(quantized, kept),
        error_before=before[1],
        error_after=after[1] if better else before[1],
        learned_loss=learned_loss,
        kept_uniform=not better,
    )


def _on_grid(quantized: Mapping[str, Quantized], kept: Mapping[str, Tensor]) -> dict[str, Any]:
    """The linears on a grid, what is pruned at its zero, as fields of `Pruned`."""
    pruned = {name: affine.pruned(each, kept[name]) for name, each in quantized.items()}
    return {"weights": {name: affine.dequantize(each) for name, each in pruned.items()}, "quantized": pruned}


def _scores(block: Block, kind: Importance) -> Callable[[str, Tensor], Tensor]:
    """The function that scores a linear by its name and weight; what it needs to know is gathered now, and is small."""
    if kind == "magnitude":
        return lambda name, weight: importance.magnitude(weight)
    if kind == "sparsegpt":
        grams = block.observe(importance.gram)
        diagonals: dict[int, Tensor] = {}
        for gram in grams.values():
            if id(gram) not in diagonals:
                diagonals[id(gram)] = obs.inverse_diagonal(gram, _DAMPING)
        columns = {name: diagonals[id(gram)] for name, gram in grams.items()}
        return lambda name, weight: importance.sparsegpt(weight, columns[name])
    norms = wanda.norms(block)
    return lambda name, weight: importance.wanda(weight, norms[name])


def _optimizers(theta: Tensor, strengths: list[Tensor], options: Options) -> list[tuple[torch.optim.Optimizer, float]]:
    """What learns the mixtures, and the clipping strengths where there are any, each with its rate."""
    if options.optimizer == "prodigy":
        prodigy: torch.optim.Optimizer = Prodigy(
            [theta], lr=options.rate, weight_decay=0.0, decouple=True, d_coef=options.d_coef
        )
        found = [(prodigy, options.rate)]
    else:
        found = [(_adamw([theta], options.rate), options.rate)]
    if strengths:
        found.append((_adamw(strengths, options.clip_lr or 0.0), options.clip_lr or 0.0))
    return found


def _adamw(learned: list[Tensor], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(learned, lr=rate, weight_decay=0.0, eps=_EPSILON, fused=True)


def _learn(window: _Window) -> tuple[Tensor, dict[str, Tensor], float]:
    """Minimise reconstruction + penalty.

    Returns the mixture logits, those of each linear's clipping strengths, and the mean loss of the last tenth of steps.
    """
    block, options = window.block, window.options
    theta = allocation.initial_logits(len(window.sizes), window.p, window.goal)
    if options.preset == "authors":
        theta = torch.zeros_like(theta)
    theta.requires_grad_()
    strengths = {
        name: clipping.initial(linear.weight, linear.grid).requires_grad_() for name, linear in window.clipped.items()
    }
    optimizers = _optimizers(theta, list(strengths.values()), options)
    samples = len(block.inputs)
    steps = options.epochs * math.ceil(samples / options.batch_size)
    generator = torch.Generator().manual_seed(block.seed)
    measure = _MEASURES[options.loss]
    history: list[float] = []
    order = [torch.randperm(samples, generator=generator) for _ in range(options.epochs)]
    with compute.repeated_passes():
        for chosen in (part for epoch in order for part in torch.split(epoch, options.batch_size)):
            weights, sparsity = _soft_weights(window, theta, strengths)
            output = block.forward(block.inputs[chosen], weights)
            reconstruction = measure(output, block.target[chosen].to(output.device))
            penalty = losses.sparsity_penalty(sparsity, window.goal)
            scale = output[..., 0].numel()  # one gradient a token would be lost in fp16 after the mean over tokens
            (scale * (reconstruction + options.penalty * penalty)).backward()  # type: ignore[no-untyped-call]
            for optimizer, rate in optimizers:
                if options.preset != "authors":
                    # no scheduler of torch: with its optimizer it would lie in memory until a garbage collection
                    optimizer.param_groups[0]["lr"] = rate * _half_cosine(len(history) / steps)
                optimizer.step()
                optimizer.zero_grad()
            history.append(_finite(float(reconstruction.detach()), block.index))
            block.on_step(len(history), steps, "learning")
    _finite(float(theta.detach().sum()), block.index)
    last = history[-max(len(history) // 10, 1) :]
    settled = {name: logits.detach() for name, logits in strengths.items()}
    return theta.detach(), settled, math.fsum(last) / len(last)


def _half_cosine(progress: float) -> float:
    """From 1 at the start to 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def _finite(value: float, index: int) -> float:
    if not math.isfinite(value):
        raise BesaError(
            f"learning in block {index} gave {value}",
            "compute with --dtype float32, or give a smaller --lr or --penalty",
        )
    return value


def _soft_weights(window: _Window, theta: Tensor, strengths: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The masked weights, differentiable in the logits, and the window's expected sparsity."""
    sources = {
        name: linear.clipped.weights(strengths[name]).to(linear.masked.dtype) if linear.clipped else linear.weight
        for name, linear in window.linears.items()
    }
    mixture = window.mixture(theta)
    alpha = allocation.expected_sparsity(mixture, window.p)
    weights = {
        name: allocation.straight_through(part, sources[name], linear.ranks, count, linear.group, linear.masked)
        for (name, linear), part, count in zip(
            window.linears.items(), window.split(mixture), window.counts(alpha), strict=True
        )
    }
    return weights, alpha @ (window.sizes / window.sizes.sum())


def _learned_masks(window: _Window, theta: Tensor) -> dict[str, Tensor]:
    """The masks of the last step, whatever their sparsity."""
    alpha = allocation.expected_sparsity(window.mixture(theta), window.p)
    return {
        name: masks.keep_above(linear.ranks, allocation.of_rows(count, linear.group, linear.rows))
        for (name, linear), count in zip(window.linears.items(), window.counts(alpha), strict=True)
    }


def _masks(window: _Window, shares: Mapping[str, budget.Floats]) -> dict[str, Tensor]:
    """Masks that prune exactly the budget, each row as near to its share as existing zeros allow."""
    wished = np.array([shares[name].sum() for name in window.linears])
    zeros = np.array([linear.zeros for linear in window.linears.values()])
    sizes = np.array([linear.size for linear in window.linears.values()])
    totals = budget.round_to_total(wished, window.block.budget, zeros, sizes)
    kept = {}
    for (name, linear), count in zip(window.linears.items(), totals.tolist(), strict=True):
        counts = masks.row_counts(shares[name], count, window.score(name), linear.ranks)
        kept[name] = masks.keep_above(linear.ranks, counts)
    return kept


def _errors(window: _Window, kept: Mapping[str, Tensor]) -> tuple[float, float]:
    """The mean loss and the mean relative error of each token under fixed masks, over the first `_COMPARED` samples."""
    block, measure = window.block, _MEASURES[window.options.loss]
    weights = {
        name: linear.masked.copy_(linear.weight).masked_fill_(~kept[name], 0.0)
        for name, linear in window.linears.items()
    }
    found: list[tuple[float, float]] = []
    with torch.no_grad(), compute.repeated_passes():
        for sample in batches(min(len(block.inputs), _COMPARED), 1):
            output = block.forward(block.inputs[sample], weights)
            target = block.target[sample].to(output.device)
            found.append((float(measure(output, target)), float(losses.token(output, target))))
    return math.fsum(pair[0] for pair in found) / len(found), math.fsum(pair[1] for pair in found) / len(found)
