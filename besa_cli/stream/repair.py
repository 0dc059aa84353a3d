"""Repair of a window after its masks are decided: the kept weights change so that the window keeps its output.

It follows any pruner. The closed form looks at one linear after the other, the gradient at the window's own loss. Masks
stay as they are. `docs/method.md`, section "Repair", has the formulas.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from besa_cli.choices import DAMPING, Loss, Update
from besa_cli.ops import importance, surviving
from besa_cli.stream import descent
from besa_cli.stream.block import Block, Decision
from besa_cli.stream.memory_model import MemoryUse

RATE = 0.01  # default learning rate: a step of Adam, relative to the root mean square of a linear's kept weights
EPOCHS = 1
_BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class RepairOptions:
    """Options of the repair.

    Attributes
    ----------
    update : {"solve", "tune"}
        The closed form alone, or the gradient after it.
    epochs : int
        Passes over the samples with gradients.
    rate : float
        Learning rate, relative to the root mean square of each linear's kept weights.
    loss : {"sensitivity", "token", "channel", "frobenius"}
        Loss of the window's output.
    """

    update: Update
    epochs: int = EPOCHS
    rate: float = RATE
    loss: Loss = "sensitivity"

    @property
    def needs_sensitivity(self) -> bool:
        """True if the loss wants `Block.sensitivity`."""
        return self.update == "tune" and self.loss == "sensitivity"

    def memory_use(self, method: MemoryUse) -> MemoryUse:
        """Return the extra memory of a method that the repair follows."""
        learned = 25.0 if self.update == "tune" else 0.0  # weights, gradient, moments, masked weights; the mask
        return replace(
            method,
            state=max(method.state, 1 + 4 * 5),  # the mask, and the tensors of the closed form
            learned=max(method.learned or 0.0, learned) if learned else method.learned,
            grams=True,
            changes=True,
        )


def repair(block: Block, decision: Decision, options: RepairOptions) -> Decision:
    """Change the kept weights of a decision so that the block keeps its output.

    Parameters
    ----------
    block : Block
        Its linears hold their own weights.
    decision : Decision
        Without quantized weights.
    options : RepairOptions

    Raises
    ------
    BesaError
        The loss is not finite.
    """
    if block.must_meet_budget and not block.budget:
        return decision
    weights = _solved(block, decision)
    if options.update == "tune":
        weights, error = _tuned(block, decision.masks, weights, options)
        return replace(decision, weights=weights, error_after=error)
    return replace(decision, weights=weights, error_after=None)


def _solved(block: Block, decision: Decision) -> dict[str, Tensor]:
    grams = block.observe(importance.gram)
    found = {}
    for done, (name, weight) in enumerate(block.weights.items(), 1):
        found[name] = surviving.solve(weight, decision.masks[name], grams[name], damping=DAMPING)
        block.on_step(done, len(block.weights), "update")
    return found


def _tuned(
    block: Block, masks: Mapping[str, Tensor], start: Mapping[str, Tensor], options: RepairOptions
) -> tuple[dict[str, Tensor], float]:
    """Return weights that learned from the window's loss, or the start where it is better; and their error."""
    dtype = next(iter(block.linears.values())).weight.dtype
    learned = {name: weight.clone().requires_grad_() for name, weight in start.items()}
    rates = [options.rate * _root_mean_square(start[name], masks[name]) for name in learned]
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(learned.values(), rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=_BETAS, fused=True)

    def weights() -> dict[str, Tensor]:
        return {name: (weight * masks[name]).to(dtype) for name, weight in learned.items()}

    schedule = descent.Schedule(loss=options.loss, epochs=options.epochs, phase="repair", rate_option="--update-lr")
    descent.minimise(block, weights, optimizer, schedule)
    final = {name: weight.detach() * masks[name] for name, weight in learned.items()}
    before, after = (
        descent.compare_errors(block, {name: weight.to(dtype) for name, weight in found.items()}, options.loss)
        for found in (start, final)
    )
    descent.require_finite(after[0], block.index, "--update-lr")
    return (final, after[1]) if after[0] < before[0] else (dict(start), before[1])


def _root_mean_square(weight: Tensor, mask: Tensor) -> float:
    return math.sqrt(float(weight.square().sum()) / max(int(mask.sum()), 1))
