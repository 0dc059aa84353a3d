"""Learning of the kept weights of a pruned model from the dense model's predictions, masks frozen (`besa tune`).

The loss is the KL divergence to the dense model, over the whole model: see `besa_cli.stream.distillation`. The backward
pass goes block by block, and the weights of a block take their step of Adam as soon as their gradient is known, so the
weights of one block are enough. `docs/method.md`, section "The last pass", has the formulas.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from besa_cli.checkpoint import tensor_places
from besa_cli.checkpoint.reports import PassReport
from besa_cli.decoder.decoder import Decoder
from besa_cli.ops import masks
from besa_cli.stream import descent
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.backward import StoredBlocks
from besa_cli.stream.block import OnStep
from besa_cli.stream.distillation import BETAS, SAVED, Distillation, LearningPlan, LearningProgress
from besa_cli.stream.rank_share import Store

VERSION = 2  # raised with every change by which it learns otherwise, as `besa_cli.pruners.VERSIONS`
RATE = 0.001  # default learning rate: a step of Adam, relative to the root mean square of a linear's kept weights
PARTS = (1.0, 0.75, 0.5, 0.25)  # of the way from the start to the end of a pass, compared after it
STATE_BYTES = 12  # of a weight in a stored state: the weight in fp32, and two moments


class StateFolders(Protocol):
    """Storage of the states after some numbers of steps, such as `besa_cli.checkpoint.tuning_states.TuningStates`."""

    def progress(self) -> dict[str, Tensor]:
        """Return the progress of the newest state; empty if there is none."""

    def block(self, step: int, index: int) -> dict[str, Tensor]:
        """Return the tensors of block `index` after `step` steps."""

    def write(
        self, step: int, blocks: Iterable[Mapping[str, Tensor]], progress: Mapping[str, Tensor], *, best: int
    ) -> None:
        """Store a state, the progress last; then remove all others but the one after `best` steps."""


@dataclass(frozen=True, kw_only=True)
class _LearnedLinear:
    """The kept weights of a linear.

    Attributes
    ----------
    name : str
    dtype : torch.dtype
        Of the checkpoint.
    rate : float
        Learning rate at the beginning.
    places : int32 Tensor of shape (kept,)
        Where the kept weights are in the flattened weight.
    state : Tensor of shape (3, kept), fp32
        The kept weights, and the moments of Adam.
    """

    name: str
    dtype: torch.dtype
    rate: float
    places: Tensor
    state: Tensor

    def put_into(self, weight: Tensor, kept: Tensor) -> None:
        """Write kept weights, as they would be stored, into a contiguous weight of shape (rows, cols)."""
        stored = kept.to(weight.device).to(self.dtype)
        weight.view(-1).index_copy_(0, self.places.to(weight.device).long(), stored.to(weight.dtype))

    def step(self, gradient: Tensor, rate: float, done: int) -> None:
        """Take a step of Adam, after `done` others, by the gradient at the weight of shape (rows, cols)."""
        state = self.state.to(gradient.device)
        weight, first, second = (state[number] for number in range(3))
        weight.grad = gradient.reshape(-1).index_select(0, self.places.to(gradient.device)).float()
        adam = torch.optim.Adam([weight.requires_grad_()], lr=rate, betas=BETAS, fused=True)
        moments = {"exp_avg": first, "exp_avg_sq": second}
        adam.state[weight] = {"step": torch.tensor(float(done), device=gradient.device), **moments}
        adam.step()
        if state is not self.state:
            self.state.copy_(state.detach())


class _LearnedBlocks(StoredBlocks):
    """Blocks of a decoder with the present kept weights, which take gradients; or with those at a part of the way.

    Parameters
    ----------
    decoder : Decoder
    linears : mapping of int to list of _LearnedLinear
    start : function of a block's number
        Returns the block's weights at the start, by the names of its linears.
    resident : bool
    """

    def __init__(
        self,
        decoder: Decoder,
        linears: Mapping[int, list[_LearnedLinear]],
        start: Callable[[int], Mapping[str, Tensor]],
        *,
        resident: bool,
    ) -> None:
        super().__init__(decoder, resident=resident)
        self._linears, self._start, self._part = linears, start, 1.0

    @override
    def load(self, index: int) -> dict[str, Tensor]:
        super().load(index)
        linears = self._decoder.linears(index)
        return {f"{name}.weight": linear.weight.detach().requires_grad_() for name, linear in linears.items()}

    @override
    def _read(self, index: int) -> None:
        super()._read(index)
        self._put(index)

    def _put(self, index: int) -> None:
        own = self._decoder.linears(index)
        start = self._start(index) if self._part < 1 else {}
        for linear in self._linears[index]:
            kept = linear.state[0]
            if self._part < 1:
                kept = part_of_the_way(start[linear.name].flatten()[linear.places.long()], kept, self._part)
            linear.put_into(own[linear.name].weight.detach(), kept)

    def go(self, part: float) -> None:
        """Take the weights at a part of the way from the start; 1: the present ones."""
        if part == self._part:
            return
        self._part = part
        for index in sorted(self._loaded):
            self._put(index)

    def step(self, factor: float, done: int, index: int, weights: Mapping[str, Tensor] | None, arrived: Tensor) -> None:
        """Let the linears of a loaded block take a step, after `done` others, by the gradients at `weights`.

        The learning rates are multiplied by `factor`. See `besa_cli.stream.backward.Visit` for the other parameters.
        """
        for linear in self._linears[index]:
            weight = (weights or {})[f"{linear.name}.weight"]
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            linear.step(gradient, factor * linear.rate, done)
        if self._resident:
            self._put(index)


def part_of_the_way(start: Tensor, end: Tensor, part: float) -> Tensor:
    """Return weights on the line between two, in fp32: `start` at 0, `end` at 1, both exactly."""
    return torch.lerp(start.float(), end.float(), part)


class Tuner:
    """Learner of the kept weights of all linears.

    Parameters
    ----------
    decoder : Decoder
        The pruned model.
    start : Store
        Its blocks.
    dense : function of a block's number
        Returns the dense model's tensors of the block, by checkpoint name.
    tokens : Tensor of shape (samples, seqlen)
    plan : LearningPlan
        With the learning rate relative to the root mean square of each linear's kept weights.
    states : StateFolders
    held_out : Tensor of shape (windows, seqlen), optional
        Token ids that are not learned from, on which the passes are compared; else the first sample serves.
    activations : ActivationStore, optional
        Storage of hidden states, kept weights and moments; in memory by default. Changes no result.
    on_step : function, optional
    """

    def __init__(
        self,
        decoder: Decoder,
        start: Store,
        dense: Callable[[int], Mapping[str, Tensor]],
        tokens: Tensor,
        plan: LearningPlan,
        *,
        states: StateFolders,
        held_out: Tensor | None = None,
        activations: ActivationStore | None = None,
        on_step: OnStep = lambda done, total, phase: None,
    ) -> None:
        self._decoder, self._start, self._dense, self._plan = decoder, start, dense, plan
        self._states, self._activations, self._on_step = states, activations or ActivationStore(), on_step
        self._samples = Distillation(
            decoder, tokens, plan, rate_option="--lr", held_out=held_out, activations=self._activations
        )

    def learn(self) -> Iterator[PassReport]:
        """Learn from the stored state on, and yield a report before the first pass and after each; then see `write`.

        Raises
        ------
        BesaError
            The loss is not finite, or the stored state is damaged.
        """
        stored = self._states.progress()
        progress = LearningProgress.of(stored) if stored else LearningProgress()
        yield from (replace(report, resumed=True) for report in self._samples.reports(progress))
        if progress.step < self._samples.steps:
            yield from self._go_on(progress)
        self._best, self._part = progress.kept * self._samples.samples, progress.kept_part

    def seconds(self) -> float:
        """Estimate the seconds that `learn` takes, from a trial of one sample and the first block."""
        stored = self._states.progress()
        progress = LearningProgress.of(stored) if stored else LearningProgress()
        if progress.step == self._samples.steps:
            return 0.0
        blocks = self._blocks({0: self._linears(0, 0)})
        found = self._samples.seconds(blocks, partial(blocks.step, 1.0, 0), progress, compared=len(PARTS))
        blocks.drop_all()
        return found

    def _go_on(self, progress: LearningProgress) -> Iterator[PassReport]:
        """Do the steps that are left, and yield the report of each pass that they finish."""
        self._samples.observe_dense(lambda index: self._decoder.load(index, self._dense(index)), self._on_step)
        linears = {index: self._linears(index, progress.step) for index in range(len(self._decoder))}
        blocks = self._blocks(linears)
        if not progress.held:
            progress.held.append(self._samples.held_out_divergence(blocks))
            yield self._samples.last_report(progress)
        for sample in itertools.islice(self._samples.order(), progress.step, None):
            self._step(blocks, sample, progress)
            if progress.step % self._samples.samples == 0:
                self._compare(blocks, progress)
                self._save(linears, progress)
                yield self._samples.last_report(progress)
            elif progress.step % SAVED == 0:
                self._save(linears, progress)
        blocks.drop_all()

    def _blocks(self, linears: Mapping[int, list[_LearnedLinear]]) -> _LearnedBlocks:
        return _LearnedBlocks(self._decoder, linears, self._start_weights, resident=self._plan.resident)

    def _start_weights(self, index: int) -> dict[str, Tensor]:
        """Return the weights of a block at the start, by the names of its linears."""
        tensors, places = self._start.read(index), self._decoder.tensor_places(index)
        return {name: places[f"{name}.weight"].of(tensors) for name in self._decoder.linears(index)}

    def _compare(self, blocks: _LearnedBlocks, progress: LearningProgress) -> None:
        """Note the best part of the way from the start to the present weights, on samples not learned from."""
        found = {}
        for part in PARTS:
            blocks.go(part)
            found[part] = self._samples.held_out_divergence(blocks)
        blocks.go(1.0)
        best = min(PARTS, key=lambda part: found[part])  # of equal ones the longest way
        progress.parts += [1.0] * (len(progress.held) - len(progress.parts))  # the start, and passes of version 1
        progress.held.append(found[best])
        progress.parts.append(best)

    def _linears(self, index: int, step: int) -> list[_LearnedLinear]:
        """Return the linears of a block that have kept weights, as they are after so many steps."""
        stored = self._states.block(step, index) if step else {}
        linears = []
        for name, stored_weight in self._start_weights(index).items():
            weight = stored_weight.flatten()
            kept = weight.nonzero().squeeze(1)
            if not len(kept):
                continue
            places = self._activations.empty(kept.shape, torch.int32)
            state = self._activations.empty((3, len(kept)), torch.float32)
            places.copy_(kept)
            own = weight[kept].float()
            state.copy_(stored[name] if stored else torch.stack([own, *torch.zeros(2, len(kept))]))
            rate = self._plan.rate * math.sqrt(float(own.square().mean()))
            linears.append(_LearnedLinear(name=name, dtype=weight.dtype, rate=rate, places=places, state=state))
        self._activations.release()
        return linears

    def _step(self, blocks: _LearnedBlocks, sample: int, progress: LearningProgress) -> None:
        done, steps = progress.step, self._samples.steps
        visit = partial(blocks.step, descent.half_cosine(done / steps), done)
        progress.history.append(self._samples.step(blocks, sample, visit))
        self._on_step(progress.step, steps, "tuning")

    def _save(self, linears: Mapping[int, list[_LearnedLinear]], progress: LearningProgress) -> None:
        def states() -> Iterator[dict[str, Tensor]]:
            for index in range(len(self._decoder)):
                yield {linear.name: linear.state for linear in linears[index]}
                self._activations.release()

        self._states.write(progress.step, states(), progress.tensors(), best=progress.kept * self._samples.samples)

    def write(self, store: Store) -> None:
        """Write all blocks as they were after the best pass, after `learn`; those of the start if no pass was better.

        What was pruned stays counted as that, and no other weight: one that is rounded to 0 is a zero beside it. A
        block's own errors are known of the start alone, so that reports of changed blocks have none.
        """
        for index in range(store.finished(), len(self._decoder)):
            tensors, report = self._start.read(index), self._start.report(index)
            if self._best:
                places, stored = self._decoder.tensor_places(index), self._states.block(self._best, index)
                linears, tuned = [], []
                for linear in report.linears:
                    place = places[f"{linear.name}.weight"]
                    weight = place.of(tensors).clone()
                    if linear.name in stored:
                        start = weight[weight != 0]
                        tuned_weights = part_of_the_way(start, stored[linear.name][0], self._part)
                        weight[weight != 0] = tuned_weights.to(weight.dtype)
                    tuned.append((place, weight))
                    linears.append(replace(linear, zeros=masks.count_zeros(weight)))
                tensors = tensor_places.replaced(tensors, tuned)
                report = replace(
                    report,
                    linears=tuple(linears),
                    error_before=None,
                    error_after=None,
                    learned_loss=None,
                    kept_uniform=False,
                    curve=(),
                )
            store.write(replace(report, resumed=False), tensors, {})
