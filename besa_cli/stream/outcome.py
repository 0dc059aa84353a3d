"""Post-processing of a window's decision: check its counts, round to the stored dtype, and report."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from torch import Tensor

from besa_cli.checkpoint.reports import BlockReport, LinearReport
from besa_cli.checkpoint.tensor_places import TensorPlace
from besa_cli.ops import affine, masks
from besa_cli.stream.block import Block, Decision
from besa_cli.stream.windows import Window


@dataclass(frozen=True, kw_only=True)
class WindowOutcome:
    """Decision for a window, with its weights as they will be stored, by linear name, and its unreached linears."""

    window: Window
    decision: Decision
    stored: Mapping[str, Tensor]
    unreached: Set[str] = frozenset()


def snap_codes(weights: Mapping[str, Tensor], decision: Decision) -> Decision:
    """Adjust codes so that they can be recovered from weights stored in the source's dtype, that of `weights`.

    Where codes change, the weights of `decision` are overwritten in place.
    """
    quantized = {}
    for name, original in decision.quantized.items():
        quantized[name] = affine.survive_dtype(original, weights[name].dtype)
        if quantized[name] is not original:
            decision.weights[name].copy_(affine.dequantize(quantized[name]))
    return replace(decision, quantized=quantized)


def apply_mask(weights: Mapping[str, Tensor], decision: Decision) -> dict[str, Tensor]:
    """Return the weights as they will be stored: in the source's dtype, zero where the mask is False."""
    return {
        name: decision.weights.get(name, weights[name]).to(weights[name].dtype).masked_fill(~mask, 0.0)
        for name, mask in decision.masks.items()
    }


def check_counts(block: Block, decision: Decision) -> None:
    """Check that the decision has a mask for every linear and prunes exactly the requested number of weights.

    Raises
    ------
    RuntimeError
        The check fails, because of a bug in the method.
    """
    if set(decision.masks) != set(block.linears):
        raise RuntimeError(
            f"the method returned masks for {sorted(decision.masks)}, but the block has {sorted(block.linears)}"
        )
    existing = sum(masks.count_zeros(weight) for weight in block.weights.values())
    count = sum(masks.count_zeros(mask) for mask in decision.masks.values())
    if block.must_meet_budget and decision.exact and count != max(block.budget, existing):
        raise RuntimeError(f"the pruner pruned {count} weights of block {block.index} instead of {block.budget}")


def linear_report(
    name: str, place: TensorPlace, weight: Tensor, mask: Tensor, *, unreached: bool = False
) -> LinearReport:
    """Return the report of one linear, from its place in the checkpoint, its mask and its weight as stored."""
    rows, cols = mask.shape
    plain = f".{place.tensor}".endswith(f".{name}.weight") and place.expert is None
    return LinearReport(
        name=name,
        rows=rows,
        cols=cols,
        pruned=masks.count_zeros(mask),
        zeros=masks.count_zeros(weight),
        tensor=None if plain else place.tensor,
        expert=place.expert,
        transposed=place.transposed,
        unreached=unreached,
    )


def block_report(
    index: int,
    blocks: int,
    linears: Sequence[LinearReport],
    outcomes: Sequence[WindowOutcome],
    error: float | None,
) -> BlockReport:
    """Return the report of one block.

    Errors are measured at the end of a window, so `error` is None for all blocks of a window but the last.
    """
    single = outcomes[0].decision if len(outcomes) == 1 and error is not None else None
    learned = [outcome.decision.learned_loss for outcome in outcomes if outcome.decision.learned_loss is not None]
    curves = [outcome.decision.curve for outcome in outcomes if outcome.decision.curve]
    return BlockReport(
        index=index,
        blocks=blocks,
        linears=tuple(linears),
        error_before=single.error_before if single else None,
        error_after=single.error_after if single and single.error_after is not None else error,
        learned_loss=math.fsum(learned) / len(learned) if learned else None,
        curve=tuple(math.fsum(losses) / len(losses) for losses in zip(*curves, strict=True)),
        kept_uniform=any(outcome.decision.kept_uniform for outcome in outcomes),
    )
