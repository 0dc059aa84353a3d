"""Linears of one reconstruction window as BESA learns them: ranked rows, in groups that share a sparsity."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from besa_cli.choices import DAMPING, Importance
from besa_cli.ops import affine, allocation, budget, importance, kernels, masks, obs
from besa_cli.ops.affine import Quantized
from besa_cli.ops.clipping import Clipped
from besa_cli.pruners.besa.options import BesaOptions
from besa_cli.stream import uniform
from besa_cli.stream.block import Block


class BesaLinear:
    """One linear while its sparsities are learned; it keeps the rank of every weight, not its score.

    Its masked weights are written into `buffer`, the block's own weights in the compute dtype, from the weights as they
    are stored: nothing reads the block's weights between target and end, and a copy would be a third of the memory.
    """

    def __init__(
        self, weight: Tensor, scores: Tensor, buffer: Tensor, group: int, clipped: Clipped | None = None
    ) -> None:
        self.weight = weight.contiguous()
        self.ranks = kernels.ranks(scores)
        self.masked = buffer
        self.rows, self.cols = weight.shape
        self.zeros = masks.count_zeros(weight)
        self.group = group
        self.groups = math.ceil(self.rows / group)
        self.clipped = clipped

    def restore(self, weight: Tensor) -> None:
        """Write the linear's own weights back into the block."""
        self.masked.copy_(weight)

    def set_quantized(self, quantized: Quantized) -> None:
        """Replace the weights by those on the learned grid."""
        self.weight = affine.dequantize(quantized).to(self.masked.dtype)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.rows * self.cols

    def group_sizes(self) -> Tensor:
        """Number of weights of each group, fp32."""
        ones = torch.ones(self.rows, device=self.weight.device)
        return allocation.sum_groups(ones, self.group) * self.cols


class RankedWindow:
    """Linears of one reconstruction window with their block, ranked and grouped.

    With a grid, `clipped` are the linears on it, and `start` holds the logits at which their clipping strengths begin.
    `budget_met` is true if at least as many weights are already zero as must be pruned: there is nothing to allocate.
    """

    def __init__(self, block: Block, options: BesaOptions) -> None:
        self.block, self.options = block, options
        grid = options.grid
        norms = uniform.input_norms(block) if grid or options.importance == "wanda" else {}
        self.scores = _scores(block, options.importance, norms)
        _ = block.target  # before the block's weights are written over
        self.clipped = {name: Clipped(weight, grid) for name, weight in block.weights.items()} if grid else {}
        self.start = {name: clipped.searched(norms[name].square()) for name, clipped in self.clipped.items()}
        self.linears = {
            name: BesaLinear(
                weight,
                self.score(name),
                block.linears[name].weight.data,
                options.group(len(weight)),
                self.clipped.get(name),
            )
            for name, weight in block.weights.items()
        }
        self.device = next(iter(block.linears.values())).weight.device
        self.sizes = torch.cat([linear.group_sizes() for linear in self.linears.values()])
        self.cols = torch.cat([torch.full((x.groups,), float(x.cols)) for x in self.linears.values()]).to(self.device)
        self.candidates = allocation.candidates(options.candidates).to(self.device)
        self.budget_share = block.budget / sum(linear.size for linear in self.linears.values())
        self.budget_met = block.budget <= sum(linear.zeros for linear in self.linears.values())

    def score(self, name: str) -> Tensor:
        """Return the scores of one linear; negative where a weight is already zero."""
        weight = self.block.weights[name]
        return masks.mark_zeros_(self.scores(name, weight), weight)

    def split(self, groups: Tensor) -> list[Tensor]:
        """Split a tensor with one row per group into the parts of the linears."""
        return list(torch.split(groups, [linear.groups for linear in self.linears.values()]))

    def mixture(self, theta: Tensor) -> Tensor:
        """Return the mixtures β of the logits."""
        return allocation.mixture(theta.sigmoid() if self.options.rules.sigmoid_logits else theta)

    def learning_counts(self, alpha: Tensor) -> list[Tensor]:
        """Return how many weights each row of a group prunes while learning; one tensor per linear."""
        real = alpha.detach() * self.cols
        return self.split((real.floor() if self.options.rules.floor_counts else real.round()).to(torch.int32))

    def wished_counts(self, sparsities: Tensor) -> dict[str, budget.Floats]:
        """Return real-valued counts for each row from each group's sparsity."""
        return {
            name: (allocation.repeat_rows(alpha, linear.group, linear.rows) * linear.cols).cpu().numpy()
            for (name, linear), alpha in zip(self.linears.items(), self.split(sparsities), strict=True)
        }

    def uniform_counts(self) -> dict[str, budget.Floats]:
        """Return the same share for every row."""
        return {name: np.full(linear.rows, self.budget_share * linear.cols) for name, linear in self.linears.items()}


def _scores(block: Block, kind: Importance, norms: Mapping[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
    """Return a function that scores a linear by its name and weight; the statistics it needs are gathered now."""
    if kind == "magnitude":
        return lambda name, weight: importance.magnitude(weight)
    if kind == "sparsegpt":
        grams = block.observe(importance.gram)
        diagonals: dict[int, Tensor] = {}
        for gram in grams.values():
            if id(gram) not in diagonals:
                diagonals[id(gram)] = obs.inverse_diagonal(gram, DAMPING)
        columns = {name: diagonals[id(gram)] for name, gram in grams.items()}
        return lambda name, weight: importance.sparsegpt(weight, columns[name])
    return lambda name, weight: importance.wanda(weight, norms[name])
