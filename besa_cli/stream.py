"""The one loop over the model: load a block, let one function change it, store it, pass the activations on, drop it."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from besa_cli import compute
from besa_cli.activations import Shelf
from besa_cli.choices import Target
from besa_cli.decoder import Decoder
from besa_cli.errors import BesaError
from besa_cli.ops import affine, losses
from besa_cli.ops.affine import Quantized
from besa_cli.reports import BlockReport, LinearReport
from besa_cli.windows import Segment, Window

Step = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What a pruner or a quantizer decided for one block.

    Attributes
    ----------
    masks : one boolean Tensor of shape (rows, cols) a linear, True = keep
    weights : the linears whose surviving weights were changed, fp32; the others keep the source's bits
    quantized : the linears on a grid, as de-quantized in `weights`
    error_before, error_after : mean relative error of each token under the uniform masks and under `masks`, on the same
        samples; where a method does not compare, the latter is measured over all samples
    """

    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    error_before: float | None = None
    error_after: float | None = None
    learned_loss: float | None = None
    kept_uniform: bool = False
    exact: bool = True


class Store(Protocol):
    """Where finished blocks go: see `besa_cli.checkpoint.Stage`."""

    def finished(self) -> int:
        """How many blocks are on disk, from the first on without a gap."""

    def read(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block."""

    def report(self, index: int) -> BlockReport:
        """The report of a finished block."""

    def write(self, report: BlockReport, tensors: Mapping[str, Tensor], codes: Mapping[str, Tensor]) -> None:
        """Put a block on disk, whole or not at all; the codes of linears on a grid beside its tensors."""


class Block:
    """A loaded block with its calibration activations, as a pruner sees it; with `--window`, what is pruned together.

    Attributes
    ----------
    index : int
        The (first) block's number.
    linears : dict of name to nn.Linear, weights in the compute dtype
    weights : dict of name to Tensor of shape (rows, cols), in the source's own dtype
    budget : int
        Weights to prune here (see `besa_cli.ops.budget.window_counts`); 0 where a pattern N:M decides.
    exact : bool
        Whether the budget is to be met.
    inputs : Tensor of shape (samples, seqlen, hidden)
        What enters the block in the model as compressed so far.
    seed : int
        From the command's seed and the block's index.
    """

    def __init__(
        self,
        window: Window,
        weights: Mapping[str, Tensor],
        *,
        budget: int | None,
        inputs: Tensor,
        tokens: Tensor,
        batch: int,
        target: Tensor | None = None,
        seed: int = 0,
        on_step: Step = lambda done, total, phase: None,
        shelf: Shelf | None = None,
    ) -> None:
        self._shelf = shelf or Shelf()
        self.index, self.inputs, self.tokens, self.batch = window.blocks[0], inputs, tokens, batch
        self.exact = budget is not None
        self.budget = budget or 0
        self.seed = (seed * 1_000_003 + self.index) % 2**63
        self._on_step = on_step
        self.linears: dict[str, nn.Linear] = window.linears
        self.weights = dict(weights)
        self._window = window
        self._target = target

    def on_step(self, done: int, total: int, phase: str) -> None:
        """Say how far the work on this block is; to be called after every batch."""
        self._shelf.release()
        self._on_step(done, total, phase)

    def parts(self, batch: int | None = None) -> Iterator[slice]:
        """The samples in batches of `batch`, by default the batches that all passes without gradients use."""
        return batches(len(self.inputs), batch or self.batch)

    def forward(self, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output for hidden states of shape (samples, seqlen, hidden).

        Parameters
        ----------
        hidden : Tensor of shape (samples, seqlen, hidden)
        weights : one Tensor of shape (rows, cols) a linear, optional
            Used instead of the linears' own; gradients reach them.
        """
        device = next(iter(self.linears.values())).weight.device
        return self._window.forward(hidden.to(device), self.tokens[: len(hidden)], weights)

    def observe(self, statistic: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Sum a statistic of each linear's inputs over all calibration samples, the block's weights untouched.

        Linears that are given the very same tensor (q, k and v; gate and up) share one statistic. The pass also gives
        the target where that is the block's own output.

        Parameters
        ----------
        statistic : function of the inputs, of shape (samples, seqlen, cols), to a Tensor to be summed

        Returns
        -------
        dict of linear name to the sum, fp32
        """
        sums: dict[str, Tensor] = {}
        leaders: dict[str, str] = {}
        seen: list[tuple[Tensor, str]] = []

        def note(name: str, tensor: Tensor) -> None:
            leader = next((other for known, other in seen if known is tensor), None)
            if leader is None:
                seen.append((tensor, name))
                value = statistic(tensor)
                sums[name] = sums[name].add_(value) if name in sums else value
            leaders[name] = leader or name

        handles = [
            linear.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
            for name, linear in self.linears.items()
        ]
        try:
            self._pass(seen.clear, "statistics")
        finally:
            for handle in handles:
                handle.remove()
        unused = sorted(set(self.linears) - set(leaders))
        if unused:
            raise BesaError(
                f"{unused[0]} of block {self.index} is never called in a forward pass",
                "besa finds a linear's importance from its inputs; this model cannot be pruned",
            )
        return {name: sums[leaders[name]] for name in self.linears}

    def _pass(self, after_batch: Callable[[], None], phase: str) -> None:
        keep = self._target is None
        target = self._shelf.empty(self.inputs.shape, self.inputs.dtype) if keep else self._target
        total = len(self.inputs)
        with torch.no_grad(), compute.repeated_passes():
            for part in self.parts():
                output = self.forward(self.inputs[part])
                if keep and target is not None:
                    target[part] = output
                after_batch()
                self.on_step(part.stop, total, phase)
        self._target = target

    @property
    def target(self) -> Tensor:
        """What the block should give: Tensor of shape (samples, seqlen, hidden)."""
        if self._target is None:
            self._pass(lambda: None, "target")
        if self._target is None:
            raise RuntimeError("the pass over the block left no target")
        return self._target


def batches(samples: int, batch: int) -> Iterator[slice]:
    """Slices of at most `batch` samples that cover `samples`."""
    for start in range(0, samples, batch):
        yield slice(start, min(start + batch, samples))


def embed(decoder: Decoder, tokens: Tensor, batch: int, shelf: Shelf | None = None) -> Tensor:
    """What enters the first block: Tensor of shape (samples, seqlen, hidden), from the shelf if there is one."""
    return _collected((decoder.embed(tokens[part]) for part in batches(len(tokens), batch)), len(tokens), shelf)


def _collected(parts: Iterable[Tensor], samples: int, shelf: Shelf | None) -> Tensor:
    """The parts one after the other in one tensor."""
    if shelf is None:
        return torch.cat(list(parts))
    whole, done = None, 0
    for part in parts:
        if whole is None:
            whole = shelf.empty((samples, *part.shape[1:]), part.dtype)
        whole[done : done + len(part)] = part
        done += len(part)
        shelf.release()
    if whole is None:
        raise ValueError("nothing to collect")
    return whole


def advance(
    decoder: Decoder,
    index: int,
    hidden: Tensor,
    tokens: Tensor,
    batch: int,
    on_part: Callable[[slice, Tensor], None] | None = None,
) -> None:
    """Replace the hidden states by the output of the loaded block `index`, in place, batch by batch.

    The hidden states may lie on another device than the block.

    Raises
    ------
    BesaError
        The block gives NaN or infinity.
    """
    with torch.no_grad(), compute.repeated_passes():
        for part in batches(len(hidden), batch):
            output = decoder.forward(index, hidden[part].to(decoder.device), tokens[part])
            if not bool(output.isfinite().all()):
                raise BesaError(
                    f"block {index} gives hidden states that are NaN or infinite in {compute.name_of(decoder.dtype)}",
                    "compute with --dtype float32",
                )
            if on_part:
                on_part(part, output)
            hidden[part] = output


def compress(
    decoder: Decoder,
    store: Store,
    tokens: Tensor,
    change: Callable[[Block], Pruned],
    *,
    segments: Sequence[Segment],
    budgets: Sequence[int] | None,
    target: Target,
    batch: int,
    seed: int,
    on_step: Step = lambda done, total, phase: None,
    shelf: Shelf | None = None,
) -> Iterator[BlockReport]:
    """Walk the model, let `change` decide each window, store its blocks and go on from what was stored.

    Blocks that `store` has already are replayed, so that an interrupted run ends in the same bytes; where only some
    blocks of a window are there, the window is pruned again.

    Parameters
    ----------
    tokens : Tensor of shape (samples, seqlen)
        Without any samples nothing passes through the blocks, and `change` sees their weights alone.
    change : function of a Block to what becomes of it
    segments : the model's windows
    budgets : one number a window, or None
        Weights to prune; None where a pattern N:M decides.
    target : {"block", "stream"}
        What a window should keep: its own dense output on the compressed inputs, or the dense model's hidden states.
    batch : int
        Samples in a pass without gradients.
    shelf : Shelf, optional
        Where the hidden states lie; in memory by default.
    """
    finished = store.finished()
    if finished == len(decoder):
        yield from (store.report(index) for index in range(finished))
        return
    walk = _Walk(decoder, store, tokens, change, target == "stream", batch, seed, on_step, shelf or Shelf())
    counts = iter(budgets or [])
    for segment in segments:
        start = time.perf_counter()
        own = [next(counts, None) for _ in segment.windows]
        reports = walk.replay(segment) if segment.blocks.stop <= finished else walk.prune(segment, own)
        for index in segment.blocks:
            decoder.drop(index)
        seconds = (time.perf_counter() - start) / len(reports)
        for report in reports:
            yield replace(report, seconds=seconds, peak_memory=peak_memory())


class _Walk:
    """The state of `compress`: the compressed stream, and the dense one where it is the target."""

    def __init__(
        self,
        decoder: Decoder,
        store: Store,
        tokens: Tensor,
        change: Callable[[Block], Pruned],
        dense: bool,
        batch: int,
        seed: int,
        on_step: Step,
        shelf: Shelf,
    ) -> None:
        self._shelf = shelf
        self._decoder, self._store, self._tokens, self._change = decoder, store, tokens, change
        self._batch, self._seed, self._on_step = batch, seed, on_step
        self._inputs = embed(decoder, tokens, batch, shelf) if len(tokens) else torch.empty(0, 0, 0)
        self._dense = embed(decoder, tokens, batch, shelf) if dense and len(tokens) else None

    def replay(self, segment: Segment) -> list[BlockReport]:
        """Pass the streams through blocks that are finished."""
        for index in segment.blocks:
            if self._dense is not None:
                self._decoder.load(index)
                self._advance(index, self._dense)
            self._decoder.load(index, self._store.read(index))
            self._advance(index, self._inputs)
        return [self._store.report(index) for index in segment.blocks]

    def prune(self, segment: Segment, budgets: Sequence[int | None]) -> list[BlockReport]:
        """Decide the segment's windows one after the other, then store its blocks."""
        sources = {index: self._decoder.load(index) for index in segment.blocks}
        targets = self._dense_targets(segment)
        alone = len(segment.windows) == 1
        whole = None if alone else self._whole_target(segment)
        decided: list[_Decided] = []
        for window, budget, target in zip(segment.windows, budgets, targets, strict=True):
            block = Block(
                window, self._weights(window, sources), budget=budget,
                inputs=self._inputs if alone else self._collect(window.enter, self._inputs),
                tokens=self._tokens, batch=self._batch, target=target, seed=self._seed, on_step=self._on_step,
                shelf=self._shelf,
            )  # fmt: skip
            pruned = self._change(block)
            _check_counts(block, pruned)
            decided.append(_Decided(window=window, pruned=pruned, stored=_masked(block.weights, pruned)))
            if whole is None:
                whole = block.target
            if not alone:
                self._put(decided[-1])
            del block
        return self._settle(segment, sources, decided, whole)

    def _advance(self, index: int, hidden: Tensor) -> None:
        advance(self._decoder, index, hidden, self._tokens, self._batch, lambda part, output: self._shelf.release())

    def _collect(self, function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor) -> Tensor:
        """`function` of the hidden states and their tokens, batch by batch."""
        device = self._decoder.device
        parts = batches(len(hidden), self._batch)
        with torch.no_grad():
            outputs = (function(hidden[part].to(device), self._tokens[part]) for part in parts)
            return _collected(outputs, len(hidden), self._shelf)

    def _dense_targets(self, segment: Segment) -> list[Tensor | None]:
        """What each window should give in the dense stream, which is passed on."""
        if self._dense is None:
            return [None for _ in segment.windows]
        alone = len(segment.windows) == 1
        halves = [] if alone else [self._collect(window.reach, self._dense) for window in segment.windows]
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
            for name, (index, inner) in window.places.items()
        }

    def _put(self, decided: "_Decided") -> None:
        """Let the windows that follow in the same block see what was decided."""
        with torch.no_grad():
            for name, weight in decided.stored.items():
                decided.window.linears[name].weight.copy_(weight)

    def _settle(
        self,
        segment: Segment,
        sources: Mapping[int, Mapping[str, Tensor]],
        decided: Sequence["_Decided"],
        target: Tensor | None,
    ) -> list[BlockReport]:
        """Round to the source's dtype, pass the stream through what will be stored, store it, and report."""
        tensors = {index: dict(source) for index, source in sources.items()}
        codes: dict[int, dict[str, Tensor]] = {index: {} for index in segment.blocks}
        linears: dict[int, list[LinearReport]] = {index: [] for index in segment.blocks}
        for each in decided:
            for name, weight in each.stored.items():
                index, inner = each.window.places[name]
                origin = self._decoder.block_names(index)[f"{inner}.weight"]
                tensors[index][origin] = weight.cpu()
                if name in each.pruned.quantized:
                    codes[index] |= affine.tensors(each.pruned.quantized[name], origin.removesuffix(".weight"))
                linears[index].append(_linear_report(inner, weight, each.pruned.masks[name]))
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
        error = math.fsum(errors) / len(self._inputs) if errors else None
        reports = [
            _block_report(index, len(self._decoder), linears[index], decided, error if last else None)
            for index, last in ((index, index == segment.blocks[-1]) for index in segment.blocks)
        ]
        for report in reports:
            self._store.write(report, tensors[report.index], codes[report.index])
        return reports


@dataclass(frozen=True, kw_only=True)
class _Decided:
    """What became of a window; `stored` are its weights as they will be stored, by the names of its linears."""

    window: Window
    pruned: Pruned
    stored: Mapping[str, Tensor]


def _masked(weights: Mapping[str, Tensor], pruned: Pruned) -> dict[str, Tensor]:
    """The weights as they will be stored: in the source's dtype, zero where the mask is false."""
    return {
        name: pruned.weights.get(name, weights[name]).to(weights[name].dtype).masked_fill(~mask, 0.0)
        for name, mask in pruned.masks.items()
    }


def _linear_report(name: str, weight: Tensor, mask: Tensor) -> LinearReport:
    rows, cols = mask.shape
    zeros = int((weight == 0).sum())
    return LinearReport(name=name, rows=rows, cols=cols, pruned=int((~mask).sum()), zeros=zeros)


def _block_report(
    index: int,
    blocks: int,
    linears: Sequence[LinearReport],
    decided: Sequence[_Decided],
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


def _check_counts(block: Block, pruned: Pruned) -> None:
    """No pruner gets away with another count than the one asked: it would be wrong in every table."""
    if set(pruned.masks) != set(block.linears):
        raise RuntimeError(f"the pruner gave masks for {sorted(pruned.masks)}, the block has {sorted(block.linears)}")
    existing = sum(int((weight == 0).sum()) for weight in block.weights.values())
    count = sum(int((~mask).sum()) for mask in pruned.masks.values())
    if block.exact and pruned.exact and count != max(block.budget, existing):
        raise RuntimeError(f"the pruner pruned {count} weights of block {block.index}, {block.budget} were asked")


def peak_memory() -> int:
    """The process's peak resident memory so far, in bytes; on CUDA the device's peak where that is more."""
    return max(compute.peak_resident(), torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
