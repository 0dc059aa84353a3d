"""Learning of all rows' sparsities together, under one budget, from the end's own loss (`besa prune --global-epochs`).

It starts from a finished stage: the masks of blocks that were pruned one after the other. The weights of each row stay
in the order of their Wanda scores, what was pruned first, and only how many of each row are pruned is learned, by the
KL divergence to the dense model. Each step passes one sample forward and backward through the block stream, so the
weights of one block are enough. `docs/method.md`, section "The whole model", has the formulas.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from besa_cli.checkpoint import tensor_places
from besa_cli.checkpoint.reports import PassReport
from besa_cli.decoder.decoder import Decoder
from besa_cli.ops import importance, kernels, masks, row_rates
from besa_cli.stream import descent, uniform
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.backward import StoredBlocks
from besa_cli.stream.block import Block, OnStep
from besa_cli.stream.distillation import BETAS, SAVED, Distillation, LearningPlan, LearningProgress
from besa_cli.stream.outcome import linear_report
from besa_cli.stream.propagation import embed
from besa_cli.stream.rank_share import Store
from besa_cli.stream.windows import WholeBlocks

RATE = 0.03  # default learning rate of the logits
NORM_TOKENS = 16384  # tokens whose inputs order the weights of a row


class StateFile(Protocol):
    """Storage of the state between two steps."""

    def read(self) -> dict[str, Tensor] | None:
        """Return the tensors that were written last; None if there are none."""

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the stored tensors, atomically."""


@dataclass(frozen=True, kw_only=True)
class _Linear:
    """A linear of a block, and its rows among the rows of all linears."""

    name: str
    ranks: Tensor
    rows: slice


class _MaskedBlocks(StoredBlocks):
    """Blocks of a decoder whose linears are masked by the present counts; the masked weights take gradients."""

    def __init__(self, decoder: Decoder, linears: Mapping[int, list[_Linear]], *, resident: bool) -> None:
        super().__init__(decoder, resident=resident)
        self._linears = linears
        self.counts = torch.empty(0, dtype=torch.int64)

    @override
    def load(self, index: int) -> dict[str, Tensor]:
        super().load(index)
        weights = {}
        for linear in self._linears[index]:
            own = self._decoder.linears(index)[linear.name].weight.detach()
            pruned = self.counts[linear.rows].to(own.device, torch.int32)
            ranks = linear.ranks.to(own.device)
            weights[f"{linear.name}.weight"] = kernels.mask(own, ranks, pruned, torch.empty_like(own)).requires_grad_()
        return weights


class GlobalRates:
    """Learner of the sparsities of all rows.

    Parameters
    ----------
    decoder : Decoder
        The dense model.
    start : Store
        All blocks, pruned; their zeros are the masks to start from.
    tokens : Tensor of shape (samples, seqlen)
    plan : LearningPlan
        With the learning rate of the logits.
    state : StateFile
    held_out : Tensor of shape (windows, seqlen), optional
        Token ids that are not learned from, on which the passes are compared; else the first sample serves.
    activations : ActivationStore, optional
        Storage of hidden states and ranks; in memory by default.
    on_step : function, optional
    """

    def __init__(
        self,
        decoder: Decoder,
        start: Store,
        tokens: Tensor,
        plan: LearningPlan,
        *,
        state: StateFile,
        held_out: Tensor | None = None,
        activations: ActivationStore | None = None,
        on_step: OnStep = lambda done, total, phase: None,
    ) -> None:
        self._decoder, self._start, self._tokens, self._plan = decoder, start, tokens, plan
        self._file, self._activations, self._on_step = state, activations or ActivationStore(), on_step
        self._samples = Distillation(
            decoder, tokens, plan, rate_option="--global-lr", held_out=held_out, activations=self._activations
        )

    def learn(self) -> Iterator[PassReport]:
        """Learn from the stored state on, and yield a report before the first pass and after each; then see `masks`.

        Raises
        ------
        BesaError
            The loss is not finite, or the stored state is damaged.
        """
        stored = self._file.read()
        norms = self._norms() if stored is None else _norms_of(stored)
        self._rank(norms)
        state = _State.begin(self._start_logits(), norms) if stored is None else _State.of(stored)
        yield from (replace(report, resumed=True) for report in self._samples.reports(state.progress))
        if state.progress.step < self._samples.steps:
            yield from self._go_on(state)
        self.kept_pass = state.progress.kept
        self._final = self._counts(state.best) if self.kept_pass else self._start_counts

    def _go_on(self, state: "_State") -> Iterator[PassReport]:
        """Do the steps that are left, and yield the report of each pass that they finish."""
        self._samples.observe_dense(self._decoder.load, self._on_step)
        blocks = _MaskedBlocks(self._decoder, self._linears, resident=self._plan.resident)
        blocks.counts = self._counts(state.theta)
        if not state.progress.held:
            yield self._finish_pass(blocks, state)
        optimizer = state.optimizer(self._plan.rate)
        for sample in itertools.islice(self._samples.order(), state.progress.step, None):
            self._step(blocks, state, optimizer, sample)
            if state.progress.step % self._samples.samples == 0:
                yield self._finish_pass(blocks, state)
            elif state.progress.step % SAVED == 0:
                self._file.write(state.tensors())
        blocks.drop_all()

    def _finish_pass(self, blocks: _MaskedBlocks, state: "_State") -> PassReport:
        state.progress.held.append(self._samples.held_out_divergence(blocks))
        state.keep_best()
        self._file.write(state.tensors())
        return self._samples.last_report(state.progress)

    def masks(self, index: int) -> dict[str, Tensor]:
        """Return the masks of the linears of block `index`, boolean, True = keep, after `learn`."""
        return {
            linear.name: masks.mask_from_ranks(linear.ranks, self._final[linear.rows])
            for linear in self._linears[index]
        }

    def block_counts(self) -> list[int]:
        """Return how many weights each block prunes, after `learn`."""
        return [
            sum(int(self._final[linear.rows].sum()) for linear in self._linears[index])
            for index in range(len(self._decoder))
        ]

    def write(self, store: Store) -> None:
        """Write all blocks with the learned masks, after `learn`; those of the start if no pass was better.

        A block's own errors are known of the start alone, so that reports of other blocks have none.
        """
        for index in range(store.finished(), len(self._decoder)):
            sources, report = self._decoder.load(index), self._start.report(index)
            places = self._decoder.tensor_places(index)
            unreached = {linear.name for linear in report.linears if linear.unreached}
            linears, pruned = [], []
            for name, mask in self.masks(index).items():
                place = places[f"{name}.weight"]
                pruned.append((place, place.of(sources).masked_fill(~mask, 0.0)))
                linears.append(linear_report(name, *pruned[-1], mask, unreached=name in unreached))
            if self.kept_pass:
                report = replace(
                    report, error_before=None, error_after=None, learned_loss=None, kept_uniform=False, curve=()
                )
            store.write(replace(report, linears=tuple(linears)), tensor_places.replaced(sources, pruned), {})
            self._decoder.drop(index)

    def _norms(self) -> dict[tuple[int, str], Tensor]:
        """Return the norm of each input column of every linear in the pruned model, fp32."""
        tokens = self._tokens[: max(1, NORM_TOKENS // self._tokens.shape[1])]
        found: dict[tuple[int, str], Tensor] = {}
        hidden = embed(self._decoder, tokens, self._plan.batch, self._activations)
        for index in range(len(self._decoder)):
            self._decoder.load(index, self._start.read(index))
            window = WholeBlocks(self._decoder, range(index, index + 1))
            block = Block(
                window,
                {},
                budget=None,
                inputs=hidden,
                tokens=tokens,
                batch=self._plan.batch,
                activations=self._activations,
            )
            found |= {(index, name): norms.cpu() for name, norms in uniform.input_norms(block).items()}
            hidden = block.target
            self._decoder.drop(index)
            self._on_step(index + 1, len(self._decoder), "statistics")
        return found

    def _rank(self, norms: Mapping[tuple[int, str], Tensor]) -> None:
        """Rank the weights of every row: existing zeros, then what was pruned, then the rest, each by Wanda's score."""
        self._linears: dict[int, list[_Linear]] = {}
        cols, zeros, pruned = [], [], []
        done = 0
        for index in range(len(self._decoder)):
            sources, start = self._decoder.load(index), self._start.read(index)
            places = self._decoder.tensor_places(index)
            self._linears[index] = []
            for name in self._decoder.linears(index):
                place = places[f"{name}.weight"]
                weight, kept = place.of(sources), place.of(start) != 0
                scores = masks.mark_zeros_(importance.wanda(weight, norms[index, name]), weight)
                order = kernels.ranks(scores).to(torch.float32)
                ranks = kernels.ranks(order.add_(kept, alpha=float(weight.shape[1])))
                stored = self._activations.empty(ranks.shape, ranks.dtype)
                stored.copy_(ranks)
                rows = slice(done, done + len(weight))
                self._linears[index].append(_Linear(name=name, ranks=stored, rows=rows))
                cols.append(torch.full((len(weight),), weight.shape[1], dtype=torch.int64))
                zeros.append((weight == 0).sum(1))
                pruned.append((~kept).sum(1))
                done = rows.stop
            self._decoder.drop(index)
            self._activations.release()
        self._cols, self._zeros = torch.cat(cols), torch.cat(zeros).numpy()
        self._start_counts = torch.cat(pruned)
        self._total = int(self._start_counts.sum())

    def _start_logits(self) -> Tensor:
        theta = row_rates.logits(self._start_counts, self._cols)
        return theta + row_rates.shift(theta, self._cols, self._total)

    def _counts(self, theta: Tensor) -> Tensor:
        return row_rates.counts(theta, self._cols, self._zeros, self._total)

    def _step(self, blocks: _MaskedBlocks, state: "_State", optimizer: torch.optim.Optimizer, sample: int) -> None:
        found = torch.zeros_like(state.theta)

        def visit(index: int, weights: Mapping[str, Tensor] | None, arrived: Tensor) -> None:
            for linear in self._linears[index]:
                gradient = (weights or {})[f"{linear.name}.weight"].grad
                if gradient is not None:
                    own = self._decoder.linears(index)[linear.name].weight.detach()
                    pruned = blocks.counts[linear.rows]
                    ranks = linear.ranks.to(own.device)
                    found[linear.rows] = row_rates.gradient(gradient, own, ranks, pruned).cpu()

        loss = self._samples.step(blocks, sample, visit)
        theta = state.theta.detach()
        rates = torch.sigmoid(theta)
        state.theta.grad = found * self._cols * rates * (1 - rates)
        done = state.progress.step / self._samples.steps
        optimizer.param_groups[0]["lr"] = self._plan.rate * descent.half_cosine(done)
        optimizer.step()
        theta += row_rates.shift(theta, self._cols, self._total)
        self._samples.require_finite(float(theta.sum()))
        state.progress.history.append(loss)
        blocks.counts = self._counts(theta)
        self._on_step(state.progress.step, self._samples.steps, "global")


@dataclass(kw_only=True)
class _State:
    """State that a step changes, and the norms that the ranks follow from.

    Attributes
    ----------
    theta : Tensor of shape (rows,)
    best : Tensor of shape (rows,)
        The logits of the pass with the smallest divergence on samples that are not learned from.
    first, second : Tensor of shape (rows,)
        Moments of the optimizer.
    progress : LearningProgress
    """

    theta: Tensor
    best: Tensor
    first: Tensor
    second: Tensor
    norms: Mapping[tuple[int, str], Tensor]
    progress: LearningProgress

    @classmethod
    def begin(cls, theta: Tensor, norms: Mapping[tuple[int, str], Tensor]) -> "_State":
        zero = torch.zeros_like(theta)
        return cls(
            theta=theta, best=theta.clone(), first=zero, second=zero.clone(), norms=norms, progress=LearningProgress()
        )

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "_State":
        names = ("theta", "best", "first", "second")
        return cls(
            **{name: tensors[name].clone() for name in names},
            norms=_norms_of(tensors),
            progress=LearningProgress.of(tensors),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors."""
        return {
            "theta": self.theta.detach().clone(),
            "best": self.best,
            "first": self.first,
            "second": self.second,
            **self.progress.tensors(),
            **{f"norms.{index}.{name}": values for (index, name), values in self.norms.items()},
        }

    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        """Return Adam at this step, which changes `theta`, `first` and `second` in place."""
        self.theta.requires_grad_()
        made = torch.optim.Adam([self.theta], lr=rate, betas=BETAS)
        made.state[self.theta] = {
            "step": torch.tensor(float(self.progress.step)),
            "exp_avg": self.first,
            "exp_avg_sq": self.second,
        }
        return made

    def keep_best(self) -> None:
        """Keep the present logits if they are better than all before."""
        if self.progress.kept == len(self.progress.held) - 1:
            self.best = self.theta.detach().clone()


def result(tensors: Mapping[str, Tensor]) -> tuple[list[float], int]:
    """Return what a stored state says: the divergences on samples held out, and the pass whose rates are kept."""
    progress = LearningProgress.of(tensors)
    return progress.held, progress.kept


def passes(epochs: int, samples: int, seqlen: int) -> float:
    """Return about how many passes without gradients over all samples the learning takes.

    One gives the dense outputs, and a part of one the norms; an epoch passes forward, forward again and backward, which
    costs as much as two, and through the head several times.
    """
    return 1 + min(1.0, NORM_TOKENS / (samples * seqlen)) + 5 * epochs


def _norms_of(tensors: Mapping[str, Tensor]) -> dict[tuple[int, str], Tensor]:
    found = {}
    for key, values in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "norms":
            index, _, name = rest.partition(".")
            found[int(index), name] = values
    return found
