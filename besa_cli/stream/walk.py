"""The one loop over the model: load a block, let one function change it, store it, pass the activations on, drop it."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from besa_cli.checkpoint.reports import BlockReport, LinearReport
from besa_cli.choices import Target
from besa_cli.decoder.decoder import Decoder
from besa_cli.ops import affine, losses
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.block import Block, Decision, OnStep
from besa_cli.stream.outcome import WindowOutcome, apply_mask, block_report, check_counts, linear_report, snap_codes
from besa_cli.stream.propagation import advance, batches, collected, embed
from besa_cli.stream.rank_share import RankShare, SharedStore, Store
from besa_cli.stream.windows import Segment, Window
from besa_cli.system import compute
from besa_cli.system.ranks import Ranks

Keep = Callable[[BlockReport, Mapping[str, Tensor], Mapping[str, Tensor]], None]


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """What `compress` does to a model: how it is cut into windows, and what decides each.

    Attributes
    ----------
    change : function of a Block to what becomes of it
    segments : the model's windows
    budgets : one number a window, or None
        Weights to prune; None where a pattern N:M decides.
    target : {"block", "stream"}
        What a window should keep: its own dense output on the compressed inputs, or the dense model's hidden states.
    batch : int
        Samples in a pass without gradients.
    seed : int
        Of the command; every block makes one of its own from it.
    """

    change: Callable[[Block], Decision]
    segments: Sequence[Segment]
    budgets: Sequence[int] | None
    target: Target
    batch: int
    seed: int


def compress(
    decoder: Decoder,
    store: Store | None,
    tokens: Tensor,
    assignment: PrunePlan,
    *,
    on_step: OnStep = lambda done, total, phase: None,
    shelf: ActivationStore | None = None,
    ahead: bool = False,
    world: Ranks | None = None,
) -> Iterator[BlockReport]:
    """Walk the model, let the assignment decide each window, store its blocks and go on from what was stored.

    Blocks that `store` has already are replayed, so that an interrupted run ends in the same bytes; where only some
    blocks of a window are there, the window is pruned again.

    Parameters
    ----------
    store : Store, optional
        Of several ranks only the first has it.
    tokens : Tensor of shape (samples, seqlen)
        Those of all ranks. Without any nothing passes through the blocks, and their weights alone decide.
    assignment : PrunePlan
    shelf : ActivationStore, optional
        Where the hidden states lie; in memory by default.
    ahead : bool
        Read the blocks of the next window while one is decided.
    world : Ranks, optional
        All ranks have to walk alike; alone by default.
    """
    share = RankShare(len(tokens), world)
    shared = SharedStore(store, share.world)
    finished = shared.finished()
    if finished == len(decoder):
        yield from (shared.report(index) for index in range(finished))
        return
    walk = BlockWalk(
        decoder, shared.write, tokens, assignment, on_step=on_step, shelf=shelf or ActivationStore(), share=share
    )
    counts = iter(assignment.budgets or [])
    for segment, following in zip_longest(assignment.segments, assignment.segments[1:]):
        start = time.perf_counter()
        own = [next(counts, None) for _ in segment.windows]
        after = following.blocks if ahead and following else range(0)
        reports = walk.replay(segment, shared) if segment.blocks.stop <= finished else walk.prune(segment, own, after)
        for index in segment.blocks:
            decoder.drop(index)
        seconds = (time.perf_counter() - start) / len(reports)
        for report in reports:
            yield replace(report, seconds=seconds, peak_memory=compute.peak_memory())


class BlockWalk:
    """The state of `compress`: the compressed stream, and the dense one where it is the target.

    `keep` takes a finished block's report, tensors and codes; the other parameters are those of `compress`.
    """

    def __init__(
        self,
        decoder: Decoder,
        keep: Keep,
        tokens: Tensor,
        assignment: PrunePlan,
        *,
        on_step: OnStep,
        shelf: ActivationStore,
        share: RankShare | None = None,
    ) -> None:
        self._shelf, self._share = shelf, share or RankShare(len(tokens))
        tokens = tokens[self._share.own.start : self._share.own.stop]
        self._decoder, self._keep, self._tokens, self._assignment = decoder, keep, tokens, assignment
        self._batch, self._on_step = assignment.batch, on_step
        self._inputs = embed(decoder, tokens, assignment.batch, shelf) if len(tokens) else torch.empty(0, 0, 0)
        self._dense = (
            embed(decoder, tokens, assignment.batch, shelf) if assignment.target == "stream" and len(tokens) else None
        )
        decoder.drop_embedding()  # no block needs it

    def replay(self, segment: Segment, store: Store) -> list[BlockReport]:
        """Pass the streams through blocks that are finished."""
        for index in segment.blocks:
            if self._dense is not None:
                self._decoder.load(index)
                self._advance(index, self._dense)
            self._decoder.load(index, store.read(index))
            self._advance(index, self._inputs)
        return [store.report(index) for index in segment.blocks]

    def prune(self, segment: Segment, budgets: Sequence[int | None], after: Sequence[int] = ()) -> list[BlockReport]:
        """Decide the segment's windows one after the other, then store its blocks; those `after` it are read ahead."""
        sources = {index: self._decoder.load(index) for index in segment.blocks}
        for index in after:
            self._decoder.prefetch(index)
        targets = self._dense_targets(segment)
        alone = len(segment.windows) == 1
        whole = None if alone else self._whole_target(segment)
        decided: list[WindowOutcome] = []
        for window, budget, target in zip(segment.windows, budgets, targets, strict=True):
            block = Block(
                window, self._weights(window, sources), budget=budget,
                inputs=self._inputs if alone else self._collect(window.inputs_from, self._inputs),
                tokens=self._tokens, batch=self._batch, target=target, seed=self._assignment.seed,
                on_step=self._on_step, shelf=self._shelf, rank_share=self._share,
            )  # fmt: skip
            pruned = snap_codes(block.weights, self._assignment.change(block))
            check_counts(block, pruned)
            stored = apply_mask(block.weights, pruned)
            self._share.world.broadcast_(list(stored.values()))
            decided.append(WindowOutcome(window=window, pruned=pruned, stored=stored))
            if whole is None:
                whole = block.target
            if not alone:
                self._write_into_block(decided[-1])
            del block
        return self._commit(segment, sources, decided, whole)

    def _advance(self, index: int, hidden: Tensor) -> None:
        advance(self._decoder, index, hidden, self._tokens, self._batch, lambda part, output: self._shelf.release())

    def _collect(self, function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor) -> Tensor:
        """`function` of the hidden states and their tokens, batch by batch."""
        device = self._decoder.device
        parts = batches(len(hidden), self._batch)
        with torch.no_grad():
            outputs = (function(hidden[part].to(device), self._tokens[part]) for part in parts)
            return collected(outputs, len(hidden), self._shelf)

    def _dense_targets(self, segment: Segment) -> list[Tensor | None]:
        """What each window should give in the dense stream, which is passed on."""
        if self._dense is None:
            return [None for _ in segment.windows]
        alone = len(segment.windows) == 1
        halves = [] if alone else [self._collect(window.output_from, self._dense) for window in segment.windows]
        for index in segment.blocks:
            self._advance(index, self._dense)
        return [self._dense] if alone else [*halves]

    def _whole_target(self, segment: Segment) -> Tensor:
        """What the block of several windows should give, for its report."""
        if self._dense is not None:
            return self._dense
        (index,) = segment.blocks
        return self._collect(lambda hidden, tokens: self._decoder.forward(index, hidden, tokens), self._inputs)

    def _weights(self, window: Window, sources: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        origins = {index: self._decoder.block_names(index) for index in window.blocks}
        return {
            name: sources[index][origins[index][f"{inner}.weight"]].to(self._decoder.device)
            for name, (index, inner) in window.locations.items()
        }

    def _write_into_block(self, decided: WindowOutcome) -> None:
        """Let the windows that follow in the same block see what was decided."""
        with torch.no_grad():
            for name, weight in decided.stored.items():
                decided.window.linears[name].weight.copy_(weight)

    def _commit(
        self,
        segment: Segment,
        sources: Mapping[int, Mapping[str, Tensor]],
        decided: Sequence[WindowOutcome],
        target: Tensor | None,
    ) -> list[BlockReport]:
        """Round to the source's dtype, pass the stream through what will be stored, store it, and report."""
        tensors = {index: dict(source) for index, source in sources.items()}
        codes: dict[int, dict[str, Tensor]] = {index: {} for index in segment.blocks}
        linears: dict[int, list[LinearReport]] = {index: [] for index in segment.blocks}
        for each in decided:
            for name, weight in each.stored.items():
                index, inner = each.window.locations[name]
                origin = self._decoder.block_names(index)[f"{inner}.weight"]
                tensors[index][origin] = weight.cpu()
                if name in each.pruned.quantized:
                    codes[index] |= affine.to_tensors(each.pruned.quantized[name], origin.removesuffix(".weight"))
                linears[index].append(linear_report(inner, weight, each.pruned.masks[name]))
        errors: list[float] = []

        def compare(part: slice, output: Tensor) -> None:
            if target is not None:
                errors.append(float(losses.token(output, target[part].to(output.device))) * len(output))
            self._shelf.release()
            self._on_step(part.stop, len(self._inputs), "propagation")

        for index in segment.blocks:
            self._decoder.load(index, tensors[index])
            last = index == segment.blocks[-1]
            advance(self._decoder, index, self._inputs, self._tokens, self._batch, compare if last else None)
        error = self._share.world.all_reduce_float(math.fsum(errors)) / self._share.samples if errors else None
        reports = [
            block_report(index, len(self._decoder), linears[index], decided, error if last else None)
            for index, last in ((index, index == segment.blocks[-1]) for index in segment.blocks)
        ]
        for report in reports:
            self._keep(report, tensors[report.index], codes[report.index])
        return reports
