"""The one loop over the model: load a block, let one function change it, store it, pass the activations on, drop it."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from besa_cli.decoder import Decoder
from besa_cli.errors import BesaError
from besa_cli.ops import losses
from besa_cli.reports import BlockReport, LinearReport

Step = Callable[[int, int, str], None]
Target = Literal["block", "stream"]


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What a pruner decided for one block.

    Attributes
    ----------
    masks : one boolean Tensor of shape (rows, cols) a linear, True = keep
    weights : the linears whose surviving weights were changed, fp32; the others keep the source's bits
    error_before, error_after : mean relative error of each token under the uniform masks and under `masks`, on the same
        samples; where a method does not compare, the latter is measured over all samples
    """

    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
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

    def write(self, report: BlockReport, tensors: Mapping[str, Tensor]) -> None:
        """Put a block on disk, whole or not at all."""


class Block:
    """One loaded block with its calibration activations, as a pruner sees it.

    Attributes
    ----------
    index : int
    linears : dict of name to nn.Linear, weights in the compute dtype
    weights : dict of name to Tensor of shape (rows, cols), in the source's own dtype
    budget : int
        Weights to prune in this block (see `besa_cli.ops.budget.window_counts`); 0 where a pattern N:M decides.
    exact : bool
        Whether the budget is to be met.
    inputs : Tensor of shape (samples, seqlen, hidden)
        What enters the block in the model as compressed so far.
    seed : int
        From the command's seed and the block's index.
    """

    def __init__(
        self,
        decoder: Decoder,
        index: int,
        source: Mapping[str, Tensor],
        *,
        budget: int | None,
        inputs: Tensor,
        tokens: Tensor,
        batch: int,
        target: Tensor | None = None,
        seed: int = 0,
        on_step: Step = lambda done, total, phase: None,
    ) -> None:
        self.index, self.inputs, self.tokens, self.batch = index, inputs, tokens, batch
        self.exact = budget is not None
        self.budget = budget or 0
        self.seed = (seed * 1_000_003 + index) % 2**63
        self.on_step = on_step
        self.linears: dict[str, nn.Linear] = decoder.linears(index)
        names = decoder.block_names(index)
        self.weights = {name: source[names[f"{name}.weight"]].to(decoder.device) for name in self.linears}
        self._decoder = decoder
        self._target = target

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
        named = None if weights is None else {f"{name}.weight": weight for name, weight in weights.items()}
        return self._decoder.forward(self.index, hidden, self.tokens[: len(hidden)], named)

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
        target = torch.empty_like(self.inputs) if keep else self._target
        total = len(self.inputs)
        with torch.no_grad():
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


def embed(decoder: Decoder, tokens: Tensor, batch: int) -> Tensor:
    """What enters the first block: Tensor of shape (samples, seqlen, hidden)."""
    return torch.cat([decoder.embed(tokens[part]) for part in batches(len(tokens), batch)])


def advance(
    decoder: Decoder,
    index: int,
    hidden: Tensor,
    tokens: Tensor,
    batch: int,
    on_part: Callable[[slice, Tensor], None] | None = None,
) -> None:
    """Replace the hidden states by the output of the loaded block `index`, in place, batch by batch.

    Raises
    ------
    BesaError
        The block gives NaN or infinity.
    """
    with torch.no_grad():
        for part in batches(len(hidden), batch):
            output = decoder.forward(index, hidden[part], tokens[part])
            if not bool(output.isfinite().all()):
                raise BesaError(
                    f"block {index} gives hidden states that are NaN or infinite in {decoder.dtype}".replace(
                        "torch.", ""
                    ),
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
    budgets: list[int] | None,
    target: Target,
    batch: int,
    seed: int,
    on_step: Step = lambda done, total, phase: None,
) -> Iterator[BlockReport]:
    """Walk the model, let `change` decide each block, store it and go on from what was stored.

    Blocks that `store` has already are replayed, so that an interrupted run ends in the same bytes.

    Parameters
    ----------
    tokens : Tensor of shape (samples, seqlen)
    change : function of a Block to what becomes of it
    budgets : one number a block, or None
        Weights to prune; None where a pattern N:M decides.
    target : {"block", "stream"}
        What a block should keep: its own dense output on the compressed inputs, or the dense model's hidden states.
    batch : int
        Samples in a pass without gradients.
    """
    finished = store.finished()
    if finished == len(decoder):
        yield from (store.report(index) for index in range(finished))
        return
    inputs = embed(decoder, tokens, batch)
    dense = inputs.clone() if target == "stream" else None
    for index in range(len(decoder)):
        start = time.perf_counter()
        if dense is not None or index >= finished:
            source = decoder.load(index)
        if dense is not None:
            advance(decoder, index, dense, tokens, batch)
        if index < finished:
            decoder.load(index, store.read(index))
            advance(decoder, index, inputs, tokens, batch)
            report = store.report(index)
        else:
            budget = budgets[index] if budgets else None
            block = Block(
                decoder, index, source, budget=budget, inputs=inputs, tokens=tokens, batch=batch, target=dense,
                seed=seed, on_step=on_step,
            )  # fmt: skip
            report = _settle(decoder, block, change(block), source, store)
            del block, source
        decoder.drop(index)
        yield replace(report, seconds=time.perf_counter() - start, peak_memory=peak_memory())


def _settle(decoder: Decoder, block: Block, pruned: Pruned, source: Mapping[str, Tensor], store: Store) -> BlockReport:
    """Round to the source's dtype, pass the activations through what will be stored, store it, and report."""
    index, names = block.index, decoder.block_names(block.index)
    target = block.target
    tensors, linears = dict(source), []
    for name, mask in pruned.masks.items():
        origin = names[f"{name}.weight"]
        weight = pruned.weights.get(name, block.weights[name]).to(source[origin].dtype)
        tensors[origin] = weight.masked_fill(~mask, 0.0).cpu()
        zeros = int((tensors[origin] == 0).sum())
        rows, cols = mask.shape
        linears.append(LinearReport(name=name, rows=rows, cols=cols, pruned=int((~mask).sum()), zeros=zeros))
    _check_counts(block, pruned, linears)
    decoder.load(index, tensors)
    errors: list[float] = []

    def compare(part: slice, output: Tensor) -> None:
        errors.append(float(losses.token(output, target[part])) * len(output))
        block.on_step(part.stop, len(block.inputs), "propagation")

    advance(decoder, index, block.inputs, block.tokens, block.batch, compare)
    report = BlockReport(
        index=index,
        blocks=len(decoder),
        linears=tuple(linears),
        error_before=pruned.error_before,
        error_after=math.fsum(errors) / len(target) if pruned.error_after is None else pruned.error_after,
        learned_loss=pruned.learned_loss,
        kept_uniform=pruned.kept_uniform,
    )
    store.write(report, tensors)
    return report


def _check_counts(block: Block, pruned: Pruned, linears: Sequence[LinearReport]) -> None:
    """No pruner gets away with another count than the one asked: it would be wrong in every table."""
    if set(pruned.masks) != set(block.linears):
        raise RuntimeError(f"the pruner gave masks for {sorted(pruned.masks)}, the block has {sorted(block.linears)}")
    existing = sum(int((weight == 0).sum()) for weight in block.weights.values())
    count = sum(linear.pruned for linear in linears)
    if block.exact and pruned.exact and count != max(block.budget, existing):
        raise RuntimeError(f"the pruner pruned {count} weights of block {block.index}, {block.budget} were asked")


def peak_memory() -> int:
    """The process's peak resident memory so far, in bytes; on CUDA the device's peak where that is more."""
    scale = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return max(resident, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
