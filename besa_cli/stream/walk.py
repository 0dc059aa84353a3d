"""Main loop of `prune` and `quantize`: load a block, compress it, store it, propagate the activations, drop it."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from besa_cli.checkpoint.reports import BlockReport, LinearReport
from besa_cli.checkpoint.tensor_places import TensorPlace, replaced
from besa_cli.choices import Target
from besa_cli.decoder.decoder import Decoder
from besa_cli.ops import affine, losses
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.block import Block, Decision, OnStep
from besa_cli.stream.held_out import HeldOutCheck
from besa_cli.stream.outcome import WindowOutcome, apply_mask, block_report, check_counts, linear_report, snap_codes
from besa_cli.stream.propagation import advance, batches, concatenate, embed
from besa_cli.stream.rank_share import RankShare, SharedStore, Store
from besa_cli.stream.windows import Segment, Window
from besa_cli.system import compute
from besa_cli.system.ranks import Ranks

WriteBlock = Callable[[BlockReport, Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor] | None], None]


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """Plan for `compress`: the model's windows, their budgets, and the method that decides each.

    Attributes
    ----------
    decide : function of a Block returning its Decision
    segments : sequence of Segment
        The model's windows.
    budgets : sequence of int, optional
        Weights to prune in each window; None where an N:M pattern decides.
    target : {"block", "stream"}
        Output that a window should reproduce: that of its dense weights on the compressed inputs, or the dense model's.
    batch : int
        Samples in a pass without gradients.
    seed : int
        Seed of the command, from which each block derives its own.
    sensitivity : Tensor of shape (blocks, hidden), optional
        Sensitivity of the channels at the output of every block, if the method asks for it. The reported errors are
        then weighted by it.
    held_out : Tensor of shape (samples, seqlen), optional
        Token ids of the samples on which the result is checked: see `besa_cli.stream.held_out`. Of the main rank alone.
    """

    decide: Callable[[Block], Decision]
    segments: Sequence[Segment]
    budgets: Sequence[int] | None
    target: Target
    batch: int
    seed: int
    sensitivity: Tensor | None = None
    held_out: Tensor | None = None


def compress(
    decoder: Decoder,
    store: Store | None,
    tokens: Tensor,
    plan: PrunePlan,
    *,
    on_step: OnStep = lambda done, total, phase: None,
    activations: ActivationStore | None = None,
    prefetch: bool = False,
    world: Ranks | None = None,
) -> Iterator[BlockReport]:
    """Compress a model block by block, yielding each block's report; activations propagate through the stored weights.

    Blocks that are already in `store` are replayed, so that a resumed run ends in the same bytes as an uninterrupted
    one. A window of which only some blocks are stored is compressed again.

    Parameters
    ----------
    store : Store, optional
        None on all ranks but the main one.
    tokens : Tensor of shape (samples, seqlen)
        Token ids of all ranks' samples. May have no samples: then the method only sees weights.
    plan : PrunePlan
    activations : ActivationStore, optional
        Storage of the hidden states; in memory by default.
    prefetch : bool
        Read the blocks of the next segment while the current one is computed.
    world : Ranks, optional
        Ranks that all run this loop in step; a single rank by default.
    """
    share = RankShare(len(tokens), world)
    shared = SharedStore(store, share.world, checked=plan.held_out is not None)
    finished = shared.finished()
    check = None
    if plan.held_out is not None:
        check = HeldOutCheck(decoder, plan.held_out, plan.batch, shared.read_state() if finished else {})
    if finished == len(decoder):
        yield from (shared.report(index) for index in range(finished))
    else:
        walk = BlockWalk(
            decoder, shared.write, tokens, plan,
            on_step=on_step, activations=activations or ActivationStore(), share=share, check=check,
        )  # fmt: skip
        yield from walk.reports(shared, finished, prefetch=prefetch)
    if check is not None:
        shared.write_held_out(check.figures())


class BlockWalk:
    """State of `compress`: the compressed stream, the dense stream if it is the target, and those of the check.

    `write` gets a finished block's report, tensors and codes, and the state of the check; the other parameters are
    those of `compress`.
    """

    def __init__(
        self,
        decoder: Decoder,
        write: WriteBlock,
        tokens: Tensor,
        plan: PrunePlan,
        *,
        on_step: OnStep,
        activations: ActivationStore,
        share: RankShare | None = None,
        check: HeldOutCheck | None = None,
    ) -> None:
        self._check = check
        self._activations, self._share = activations, share or RankShare(len(tokens))
        tokens = tokens[self._share.own.start : self._share.own.stop]
        self._decoder, self._write, self._tokens, self._plan = decoder, write, tokens, plan
        self._batch, self._on_step = plan.batch, on_step
        self._inputs = embed(decoder, tokens, plan.batch, activations) if len(tokens) else torch.empty(0, 0, 0)
        self._dense = (
            embed(decoder, tokens, plan.batch, activations) if plan.target == "stream" and len(tokens) else None
        )
        decoder.drop_embedding()  # no block needs it

    def reports(self, store: Store, finished: int, *, prefetch: bool) -> Iterator[BlockReport]:
        """Replay the segments whose blocks are all among the first `finished`, prune the others; yield the reports."""
        segments, counts = self._plan.segments, iter(self._plan.budgets or [])
        for segment, following in zip_longest(segments, segments[1:]):
            start = time.perf_counter()
            own = [next(counts, None) for _ in segment.windows]
            after = following.blocks if prefetch and following else range(0)
            done = segment.blocks.stop <= finished
            reports = self.replay(segment, store) if done else self.prune(segment, own, after)
            for index in segment.blocks:
                self._decoder.drop(index)
            seconds = (time.perf_counter() - start) / len(reports)
            for report in reports:
                yield replace(report, seconds=seconds, peak_memory=compute.peak_memory())

    def replay(self, segment: Segment, store: Store) -> list[BlockReport]:
        """Propagate the streams, but for those of the check, through finished blocks and return their reports."""
        for index in segment.blocks:
            if self._dense is not None:
                self._decoder.load(index)
                self._advance(index, self._dense)
            self._decoder.load(index, store.read(index))
            self._advance(index, self._inputs)
        return [store.report(index) for index in segment.blocks]

    def prune(self, segment: Segment, budgets: Sequence[int | None], after: Sequence[int] = ()) -> list[BlockReport]:
        """Decide the segment's windows in order, store its blocks and return their reports; prefetch blocks `after`."""
        sources = {index: self._decoder.load(index) for index in segment.blocks}
        for index in after:
            self._decoder.prefetch(index)
        if self._check is not None:
            for index in segment.blocks:
                self._check.advance("dense", index)
        targets = self._dense_targets(segment)
        single = len(segment.windows) == 1
        segment_target = None if single else self._segment_target(segment)
        outcomes: list[WindowOutcome] = []
        for window, budget, target in zip(segment.windows, budgets, targets, strict=True):
            block = Block(
                window, self._weights(window, sources), budget=budget,
                inputs=self._inputs if single else self._collect(window.inputs_from, self._inputs),
                tokens=self._tokens, batch=self._batch, target=target, seed=self._plan.seed,
                sensitivity=self._sensitivity(window.blocks[-1]),
                on_step=self._on_step, activations=self._activations, rank_share=self._share,
            )  # fmt: skip
            decision = snap_codes(block.weights, self._plan.decide(block))
            check_counts(block, decision)
            stored = apply_mask(block.weights, decision)
            self._share.world.broadcast_(list(stored.values()))
            outcomes.append(WindowOutcome(window=window, decision=decision, stored=stored, unreached=block.unreached))
            if segment_target is None:
                segment_target = block.target
            if not single:
                self._write_into_block(outcomes[-1])
            del block
        return self._commit(segment, sources, outcomes, segment_target)

    def _sensitivity(self, index: int) -> Tensor | None:
        table = self._plan.sensitivity
        return None if table is None else table[index].to(self._decoder.device)

    def _advance(self, index: int, hidden: Tensor) -> None:
        advance(
            self._decoder, index, hidden, self._tokens, self._batch, lambda part, output: self._activations.release()
        )

    def _collect(self, function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Return `function` of the hidden states and their tokens, computed batch by batch."""
        device = self._decoder.device
        parts = batches(len(hidden), self._batch)
        with torch.no_grad():
            outputs = (function(hidden[part].to(device), self._tokens[part]) for part in parts)
            return concatenate(outputs, len(hidden), self._activations)

    def _dense_targets(self, segment: Segment) -> list[Tensor | None]:
        """Return each window's output in the dense stream (None without one), which is propagated past the segment."""
        if self._dense is None:
            return [None for _ in segment.windows]
        single = len(segment.windows) == 1
        halves = [] if single else [self._collect(window.output_from, self._dense) for window in segment.windows]
        for index in segment.blocks:
            self._advance(index, self._dense)
        return [self._dense] if single else [*halves]

    def _segment_target(self, segment: Segment) -> Tensor:
        """Return the target output of a block with several windows, for the error in its report."""
        if self._dense is not None:
            return self._dense
        (index,) = segment.blocks
        return self._collect(lambda hidden, tokens: self._decoder.forward(index, hidden, tokens), self._inputs)

    def _weights(self, window: Window, sources: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        places = {index: self._decoder.tensor_places(index) for index in window.blocks}
        return {
            name: places[index][f"{inner}.weight"].of(sources[index]).to(self._decoder.device)
            for name, (index, inner) in window.locations.items()
        }

    def _write_into_block(self, outcome: WindowOutcome) -> None:
        """Copy the stored weights into the loaded block, so that its next window gets compressed inputs."""
        with torch.no_grad():
            for name, weight in outcome.stored.items():
                outcome.window.linears[name].weight.copy_(weight)

    def _commit(
        self,
        segment: Segment,
        sources: Mapping[int, Mapping[str, Tensor]],
        outcomes: Sequence[WindowOutcome],
        target: Tensor | None,
    ) -> list[BlockReport]:
        """Propagate the stream through the stored weights, write the segment's blocks, and return their reports."""
        changed: dict[int, list[tuple[TensorPlace, Tensor]]] = {index: [] for index in segment.blocks}
        places = {index: self._decoder.tensor_places(index) for index in segment.blocks}
        codes: dict[int, dict[str, Tensor]] = {index: {} for index in segment.blocks}
        linears: dict[int, list[LinearReport]] = {index: [] for index in segment.blocks}
        for outcome in outcomes:
            for name, weight in outcome.stored.items():
                index, inner = outcome.window.locations[name]
                place = places[index][f"{inner}.weight"]
                changed[index].append((place, weight.cpu()))
                if name in outcome.decision.quantized:
                    codes[index] |= affine.to_tensors(outcome.decision.quantized[name], place.linear)
                mask, unreached = outcome.decision.masks[name], name in outcome.unreached
                linears[index].append(linear_report(inner, place, weight, mask, unreached=unreached))
        tensors = {index: replaced(source, changed[index]) for index, source in sources.items()}
        errors: list[float] = []
        sensitivity = self._sensitivity(segment.blocks[-1])
        channels = None if sensitivity is None else losses.channel_weights(sensitivity)

        def compare(part: slice, output: Tensor) -> None:
            if target is not None:
                error = losses.token(output, target[part].to(output.device), channels=channels)
                errors.append(float(error) * len(output))
            self._activations.release()
            self._on_step(part.stop, len(self._inputs), "propagation")

        for index in segment.blocks:
            if self._check is not None:
                self._decoder.load(index, self._uniform(index, sources[index], outcomes))
                self._check.advance("uniform", index)
            self._decoder.load(index, tensors[index])
            if self._check is not None:
                self._check.advance("pruned", index)
            last = index == segment.blocks[-1]
            advance(self._decoder, index, self._inputs, self._tokens, self._batch, compare if last else None)
        error = self._share.world.all_reduce_float(math.fsum(errors)) / self._share.samples if errors else None
        reports = [
            block_report(index, len(self._decoder), linears[index], outcomes, error if last else None)
            for index, last in ((index, index == segment.blocks[-1]) for index in segment.blocks)
        ]
        for report in reports:
            last = report is reports[-1]
            state = self._check.state(segment.blocks.stop) if self._check is not None and last else None
            self._write(report, tensors[report.index], codes[report.index], state)
        return reports

    def _uniform(
        self, index: int, source: Mapping[str, Tensor], outcomes: Sequence[WindowOutcome]
    ) -> dict[str, Tensor]:
        """Return the tensors of a block with the uniform masks of its windows."""
        places = self._decoder.tensor_places(index)
        matrices: list[tuple[TensorPlace, Tensor]] = []
        for outcome in outcomes:
            if outcome.decision.uniform is None:
                raise RuntimeError("the pruner gave no uniform masks, with which it is to be compared")
            for name, mask in outcome.decision.uniform.items():
                block, inner = outcome.window.locations[name]
                if block == index:
                    place = places[f"{inner}.weight"]
                    matrices.append((place, place.of(source).masked_fill(~mask.cpu(), 0.0)))
        return replaced(source, matrices)
