"""What became of a window: checked against what was asked, rounded as it is stored, and reported."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from besa_cli.checkpoint.reports import BlockReport, LinearReport
from besa_cli.ops import affine, masks
from besa_cli.stream.block import Block, Decision
from besa_cli.stream.windows import Window


@dataclass(frozen=True, kw_only=True)
class WindowOutcome:
    """What became of a window; `stored` are its weights as they will be stored, by the names of its linears."""

    window: Window
    pruned: Decision
    stored: Mapping[str, Tensor]


def snap_codes(weights: Mapping[str, Tensor], pruned: Decision) -> Decision:
    """The same with codes that the weights still tell when they are stored in the dtype of `weights`, the source's.

    Where codes move, the weights of `pruned` are written over.
    """
    quantized = {}
    for name, each in pruned.quantized.items():
        quantized[name] = affine.survive_dtype(each, weights[name].dtype)
        if quantized[name] is not each:
            pruned.weights[name].copy_(affine.dequantize(quantized[name]))
    return replace(pruned, quantized=quantized)


def apply_mask(weights: Mapping[str, Tensor], pruned: Decision) -> dict[str, Tensor]:
    """The weights as they will be stored: in the source's dtype, zero where the mask is false."""
    return {
        name: pruned.weights.get(name, weights[name]).to(weights[name].dtype).masked_fill(~mask, 0.0)
        for name, mask in pruned.masks.items()
    }


def check_counts(block: Block, pruned: Decision) -> None:
    """No pruner gets away with another count than the one asked: it would be wrong in every table."""
    if set(pruned.masks) != set(block.linears):
        raise RuntimeError(f"the pruner gave masks for {sorted(pruned.masks)}, the block has {sorted(block.linears)}")
    existing = sum(masks.count_zeros(weight) for weight in block.weights.values())
    count = sum(masks.count_zeros(mask) for mask in pruned.masks.values())
    if block.must_meet_budget and pruned.exact and count != max(block.budget, existing):
        raise RuntimeError(f"the pruner pruned {count} weights of block {block.index}, {block.budget} were asked")


def linear_report(name: str, weight: Tensor, mask: Tensor) -> LinearReport:
    """The report of one linear, from its weight as stored."""
    rows, cols = mask.shape
    return LinearReport(
        name=name, rows=rows, cols=cols, pruned=masks.count_zeros(mask), zeros=masks.count_zeros(weight)
    )


def block_report(
    index: int,
    blocks: int,
    linears: Sequence[LinearReport],
    decided: Sequence[WindowOutcome],
    error: float | None,
) -> BlockReport:
    """The report of one block; errors are those of its window's end, so only the window's last block has them."""
    alone = decided[0].pruned if len(decided) == 1 and error is not None else None
    learned = [each.pruned.learned_loss for each in decided if each.pruned.learned_loss is not None]
    return BlockReport(
        index=index,
        blocks=blocks,
        linears=tuple(linears),
        error_before=alone.error_before if alone else None,
        error_after=alone.error_after if alone and alone.error_after is not None else error,
        learned_loss=math.fsum(learned) / len(learned) if learned else None,
        kept_uniform=any(each.pruned.kept_uniform for each in decided),
    )
