"""Gradient learning of the mixtures over candidate sparsities, with a straight-through mask (BESA Eqs. 3 to 6)."""

import math
from collections.abc import Iterator, Mapping

import torch
from prodigyopt import Prodigy
from torch import Tensor

from besa_cli.ops import allocation, losses
from besa_cli.pruners.besa.options import BesaOptions
from besa_cli.pruners.besa.window import RankedWindow
from besa_cli.stream import descent
from besa_cli.system import compute


def learn(window: RankedWindow) -> tuple[Tensor, dict[str, Tensor], list[float]]:
    """Minimise the reconstruction error within the budget; if existing zeros meet it, learn only the grids.

    The budget is met at every step, unless a `penalty` pulls towards it instead.

    Returns the mixture logits, those of each linear's clipping strengths, and the loss of every step.
    """
    block, options, rules = window.block, window.options, window.options.rules
    keeps_budget = options.penalty is None and not window.budget_met
    theta = _initial_logits(window).requires_grad_()
    strengths = {name: logits.clone().requires_grad_() for name, logits in window.start.items()}
    learners = optimizers(theta, list(strengths.values()), options)
    samples = block.rank_share.samples
    steps = options.epochs * math.ceil(samples / options.batch_size)
    measure, world = descent.measure(block, options.loss), block.rank_share.world
    history: list[float] = []
    with compute.repeated_passes():
        for chosen in _chosen(samples, options, block.seed):
            if keeps_budget:
                _project_to_budget(window, theta)
            weights, mixture = _soft_weights(window, theta, strengths)
            inputs, target = block.step_batch(chosen)
            output = block.forward(inputs, weights)
            reconstruction = measure(output, target.to(output.device), world.all_reduce_)
            penalty = len(inputs) / len(chosen) * _penalty(window, mixture)
            scale = len(chosen) * output.shape[1]  # a token's gradient would be lost in fp16 after the mean over all
            objective = scale * (reconstruction + penalty)
            if objective.requires_grad:  # not so on a rank that has none of the samples, where nothing is pruned
                objective.backward()
            loss = reconstruction.detach()
            world.all_reduce_list_(
                [loss, *_gradients([theta, *strengths.values()], 1 if rules.summed_gradient else 1 / scale)]
            )
            if keeps_budget and mixture is not None and theta.grad is not None:
                theta.grad = allocation.project_gradient(theta.grad, mixture.detach(), window.sizes, window.candidates)
            factor = _rate_factor(options, len(history) / steps)
            for optimizer, rate in learners:
                # no scheduler of torch: with its optimizer it would lie in memory until a garbage collection
                optimizer.param_groups[0]["lr"] = rate * factor
                optimizer.step()
                optimizer.zero_grad()
            history.append(_finite(float(loss), block.index))
            block.on_step(len(history), steps, "learning")
    _finite(float(theta.detach().sum()), block.index)
    return theta.detach(), {name: each.detach() for name, each in strengths.items()}, history


def _rate_factor(options: BesaOptions, progress: float) -> float:
    """Return the factor on the learning rates at a share of the steps, in [0, 1)."""
    return descent.half_cosine(progress) if options.rules.decaying else 1.0


def _project_to_budget(window: RankedWindow, theta: Tensor) -> None:
    """Project the mixtures back onto the budget, in place."""
    with torch.no_grad():
        theta += allocation.newton_tilt(theta, window.sizes, window.candidates, window.budget_share) * window.candidates


def _penalty(window: RankedWindow, mixture: Tensor | None) -> Tensor | float:
    if mixture is None or not window.options.penalty:
        return 0.0
    sparsity, _ = allocation.mean_and_slope(mixture, window.sizes, window.candidates)
    return window.options.penalty * losses.sparsity_penalty(sparsity, window.budget_share)


def _initial_logits(window: RankedWindow) -> Tensor:
    if window.budget_met or window.options.rules.sigmoid_logits:
        return torch.zeros(len(window.sizes), len(window.candidates), device=window.device)
    return allocation.initial_logits(len(window.sizes), window.candidates, window.budget_share)


def _chosen(samples: int, options: BesaOptions, seed: int) -> Iterator[Tensor]:
    """Yield the sample numbers of every step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(options.epochs):
        shuffled = options.rules.shuffled
        order = torch.randperm(samples, generator=generator) if shuffled else torch.arange(samples)
        yield from torch.split(order, options.batch_size)


def _gradients(learned: list[Tensor], factor: float) -> list[Tensor]:
    """Return the gradients times a factor; zeros where nothing on this rank depends on a parameter."""
    for each in learned:
        each.grad = torch.zeros_like(each) if each.grad is None else each.grad.mul_(factor)
    return [each.grad for each in learned if each.grad is not None]


def optimizers(
    theta: Tensor, strengths: list[Tensor], options: BesaOptions
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return the optimizers of the mixture logits and of the clipping strengths, each with its learning rate."""
    if options.optimizer == "prodigy":
        prodigy: torch.optim.Optimizer = Prodigy(
            [theta], lr=options.rate, weight_decay=0.0, decouple=True, d_coef=options.d_coef
        )
        found = [(prodigy, options.rate)]
    else:
        found = [(descent.adamw([theta], options.rate), options.rate)]
    if strengths:
        found.append((descent.adamw(strengths, options.clip_lr or 0.0), options.clip_lr or 0.0))
    return found


def _finite(value: float, index: int) -> float:
    return descent.require_finite(value, index, "--lr", "--penalty")


def _soft_weights(
    window: RankedWindow, theta: Tensor, strengths: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the masked weights, differentiable in the logits, and the mixtures; None if zeros meet the budget."""
    sources = {
        name: linear.clipped.weights(strengths[name]).to(linear.masked.dtype) if linear.clipped else linear.weight
        for name, linear in window.linears.items()
    }
    if window.budget_met:  # and a zero is zero on every grid
        return sources, None
    mixture = window.mixture(theta)
    alpha = allocation.expected_sparsity(mixture, window.candidates)
    weights = {
        name: allocation.straight_through(
            part,
            sources[name],
            linear.ranks,
            count,
            linear.group,
            linear.masked,
            floored=window.options.rules.floor_counts,
        )
        for (name, linear), part, count in zip(
            window.linears.items(), window.split(mixture), window.learning_counts(alpha), strict=True
        )
    }
    return weights, mixture
