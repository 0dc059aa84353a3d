"""Perplexity by the block stream: several texts at once, with a model that may be larger than memory."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from torch import Tensor

from besa_cli.decoder.decoder import Decoder
from besa_cli.evaluation.measurement import Loss, Perplexity, PerplexityMeasurement, WindowComparison
from besa_cli.evaluation.token_figures import compare_tokens, token_losses
from besa_cli.stream import memory_model, propagation
from besa_cli.stream.forecast import Forecast
from besa_cli.stream.windows import BLOCK, segments
from besa_cli.system import compute, disk

_BYTES = 1 << 30  # bytes of hidden states that a portion may always have
_CPU_TOKENS = 32_768  # maximum tokens of a portion on a CPU


@dataclass(frozen=True, kw_only=True)
class PerplexityStep:
    """Progress of a `PerplexityRun`: one portion has passed one block or the head.

    Attributes
    ----------
    index, steps : int
        Number of the step, from 0, and number of steps in all.
    phase : str
        Description of the step, e.g. ``block 3/32 of pass 1/2``.
    seconds : float
        Duration of the step.
    measured : tuple of int
        Numbers of the texts that got new losses; empty except after the head.
    """

    index: int
    steps: int
    phase: str
    seconds: float
    measured: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WindowRange:
    """Consecutive windows of one text, from `start` up to and excluding `stop`."""

    text: int
    start: int
    stop: int


class PerplexityRun:
    """Measurement of several texts with one checkpoint, portion by portion; iterating over it does the work.

    A portion of the windows, of the size given by `windows_at_once`, passes all blocks, each loaded once, and then the
    head, which gives its losses. Batches are counted from the start of each text, so that the losses of a text are
    bit-identical to those of the text measured alone, regardless of the portions.

    With a baseline, every portion first passes all blocks of the baseline; at the end, the heads of both turn the
    hidden states into logits, some positions at a time. That gives the losses of both, each bit-identical to those of
    the model measured alone, and the comparison of their predictions.

    Parameters
    ----------
    jobs : sequence of PerplexityMeasurement
        Texts for the same checkpoint with the same settings.
    known : sequence of sequences of Loss, optional
        For each text, losses of its first windows that were measured before.
    baseline : sequence of PerplexityMeasurement, optional
        For each text, the same windows for the checkpoint to compare with.
    compared : sequence of sequences of WindowComparison, optional
        For each text, comparisons of its first windows that were made before; windows with only one of loss and
        comparison are measured again.

    Attributes
    ----------
    losses : list of lists of Loss
        For each text, the losses of its first windows measured so far.
    comparisons : list of lists of WindowComparison
        The same for the comparisons with the baseline; empty lists without one.
    portions : list of lists of WindowRange
        Windows of each portion that are left to measure.
    """

    def __init__(
        self,
        jobs: Sequence[PerplexityMeasurement],
        known: Sequence[Sequence[Loss]] | None = None,
        baseline: Sequence[PerplexityMeasurement] = (),
        compared: Sequence[Sequence[WindowComparison]] | None = None,
    ) -> None:
        self._jobs, self._baseline = jobs, baseline
        self._batch = jobs[0].settings.batch_size
        self.losses: list[list[Loss]] = [list(takewhile(is_finite, losses)) for losses in known or [()] * len(jobs)]
        self.comparisons: list[list[WindowComparison]] = [[] for _ in jobs]
        if baseline:
            both = list(zip(self.losses, compared or [()] * len(jobs), strict=True))
            self.losses = [losses[: len(others)] for losses, others in both]
            self.comparisons = [list(others[: len(losses)]) for losses, others in both]
        self._decoder = Decoder(jobs[0].directory, jobs[0].device, jobs[0].dtype, quick=True)
        self._outer = self._other = self._decoder  # of the baseline: what embeds and has the head; what has the blocks
        if baseline:
            shared = self._decoder.has_same_outside(baseline[0].directory)
            self._other = Decoder(baseline[0].directory, jobs[0].device, jobs[0].dtype, quick=True)
            if shared:
                self._other.drop_embedding()
            else:
                self._outer = self._other
        left = [(len(losses), len(job.windows)) for job, losses in zip(jobs, self.losses, strict=True)]
        at_once = windows_at_once(self._decoder, jobs[0].settings.seqlen, self._batch, models=1 + bool(baseline))
        self.portions = split_passes(left, self._batch, at_once)

    @property
    def baseline_digest(self) -> str | None:
        """Content digest of the baseline; None without one."""
        return self._baseline[0].digest if self._baseline else None

    @property
    def notes(self) -> list[str]:
        """Notes for the user on mismatches between checkpoint and model."""
        return list(dict.fromkeys([*self._decoder.notes, *self._other.notes]))

    @property
    def steps(self) -> int:
        """Number of steps that iterating yields."""
        return len(self.portions) * (sum(len(decoder) for decoder in self._models) + 1)

    @property
    def work(self) -> list[float]:
        """Relative work of each step: its windows × its parameters, without attention."""
        config = self._decoder.config.get_text_config()
        blocks = [
            sum(parameter.numel() for parameter in block.parameters())
            for decoder in self._models
            for block in decoder.blocks
        ]
        heads = len(self._models) * int(config.vocab_size) * int(config.hidden_size)
        windows = [sum(part.stop - part.start for part in portion) for portion in self.portions]
        return [float(count * size) for count in windows for size in (*blocks, heads)]

    @property
    def _models(self) -> list[Decoder]:
        """Decoders whose blocks a portion passes, in order."""
        return [self._other, self._decoder] if self._baseline else [self._decoder]

    def __iter__(self) -> Iterator[PerplexityStep]:
        index = 0
        for number, portion in enumerate(self.portions, 1):
            suffix = f" of pass {number}/{len(self.portions)}" if len(self.portions) > 1 else ""
            start = time.perf_counter()
            outputs = []
            for decoder in self._models:
                outer = self._decoder if decoder is self._decoder else self._outer
                states = [propagation.embed(outer, self._tokens(part), self._batch) for part in portion]
                which = " of the baseline" if decoder is not self._decoder else ""
                for block in range(len(decoder)):
                    self._pass(decoder, block, portion, states)
                    yield self._step(index, f"block {block + 1}/{len(decoder)}{which}{suffix}", start)
                    start, index = time.perf_counter(), index + 1
                outputs.append(states)
            for part, *hidden in zip(portion, *outputs, strict=True):
                self._finish(part, hidden)
            del outputs, states, hidden  # before the next portion is embedded
            yield self._step(index, f"head{suffix}", start, *(part.text for part in portion))
            index += 1

    def results(self) -> list[Perplexity]:
        """Return the result of each text, after the last step, with the comparison with the baseline if there is one.

        Raises
        ------
        BesaError
            A figure is NaN or infinite.
        """
        measured = zip(self._jobs, self.losses, self.comparisons, strict=True)
        return [job.result(losses, comparisons, self.baseline_digest) for job, losses, comparisons in measured]

    def baseline_results(self) -> list[Perplexity]:
        """Return the result of the baseline for each text, after the last step; empty without a baseline.

        Raises
        ------
        BesaError
            A loss is NaN or infinite.
        """
        measured = zip(self._baseline, self.losses, self.comparisons, strict=True) if self._baseline else ()
        return [
            job.result([(other.baseline, count) for (_, count), other in zip(losses, comparisons, strict=True)])
            for job, losses, comparisons in measured
        ]

    def forecast(self, directory: Path) -> Forecast:
        """Forecast memory and time, from the memory model and a trial on the first batch; no losses are kept.

        The trial does not load a block of the baseline, which is of the model's size.

        Parameters
        ----------
        directory : Path
            Directory of the results, whose free disk space is reported.
        """
        seqlen, blocks, models = self._jobs[0].settings.seqlen, len(self._decoder), len(self._models)
        sizes = [sum(part.stop - part.start for part in portion) for portion in self.portions]
        shapes = [memory_model.shape(decoder, segments(decoder, BLOCK)) for decoder in self._models]
        heads = {id(decoder): decoder.head_bytes() for decoder in (self._decoder, self._outer)}
        most = max(sizes)
        demand = memory_model.eval_demand(
            max(shapes, key=lambda shape: shape.loaded * (shape.dtype.itemsize + shape.source)),
            tokens=most * seqlen,
            passing=min(self._batch, most) * seqlen,
            seqlen=seqlen,
            head=sum(heads.values()),
            portions=len(self.portions),
            compared=bool(self._baseline),
        )
        memory = compute.resident() + demand.peak()
        first = self.portions[0][0]
        part = WindowRange(text=first.text, start=first.start, stop=min(first.stop, first.start + self._batch))
        began = time.perf_counter()
        hidden = propagation.embed(self._decoder, self._tokens(part), self._batch)
        embedded = time.perf_counter()
        self._decoder.load(0)
        loaded = time.perf_counter()
        propagation.advance(self._decoder, 0, hidden, self._tokens(part), self._batch)
        passed = time.perf_counter()
        self._decoder.drop(0)
        for decoder in (self._decoder, self._outer):
            decoder.load_head()
        ready = time.perf_counter()
        _ = list(self._window_figures(part, [hidden] * models))
        batch_seconds = models * ((embedded - began) + blocks * (passed - loaded)) + (time.perf_counter() - ready)
        reading = models * blocks * len(sizes) * (loaded - embedded)
        return Forecast(
            memory=max(memory, compute.peak_resident()),
            phase=demand.phase,
            in_files=False,
            batch=self._batch,
            disk=0,
            free=disk.free(directory),
            seconds=batch_seconds * sum(sizes) / (part.stop - part.start) + reading,
            blocks=blocks,
            left=blocks,
        )

    def _step(self, index: int, phase: str, start: float, *measured: int) -> PerplexityStep:
        seconds = time.perf_counter() - start
        return PerplexityStep(index=index, steps=self.steps, phase=phase, seconds=seconds, measured=measured)

    def _tokens(self, part: WindowRange) -> Tensor:
        return self._jobs[part.text].windows[part.start : part.stop]

    def _pass(self, decoder: Decoder, block: int, portion: Sequence[WindowRange], states: Sequence[Tensor]) -> None:
        decoder.load(block)
        for part, hidden in zip(portion, states, strict=True):
            propagation.advance(decoder, block, hidden, self._tokens(part), self._batch)
        decoder.drop(block)

    def _finish(self, part: WindowRange, hidden: Sequence[Tensor]) -> None:
        """Append the figures of a part's windows, all at once, so that losses and comparisons stay equally many."""
        figures = list(self._window_figures(part, hidden))
        self.losses[part.text] += [loss for loss, _ in figures]
        self.comparisons[part.text] += [comparison for _, comparison in figures if comparison is not None]

    def _window_figures(
        self, part: WindowRange, hidden: Sequence[Tensor]
    ) -> Iterator[tuple[Loss, WindowComparison | None]]:
        """Yield the figures of each window from the outputs of the last blocks, in the order of `_models`."""
        job, tokens = self._jobs[part.text], self._tokens(part)
        for row in range(len(tokens)):
            counted, window = job.counted_tokens(part.start + row), tokens[row : row + 1]
            *others, own = (states[row : row + 1] for states in hidden)
            if not others:
                loss = sum_last(token_losses(self._decoder, own, window), counted)
                job.require_finite(loss)
                yield (loss, counted), None
                continue
            compared = compare_tokens((self._decoder, own), (self._outer, others[0]), window)
            loss, baseline, divergence, same = (sum_last(figures, counted) for figures in compared)
            job.require_finite(loss)
            self._baseline[part.text].require_finite(baseline)
            job.require_finite(divergence, "divergence")
            yield (loss, counted), WindowComparison(baseline=baseline, divergence=divergence, same=int(same))


def sum_last(figures: Tensor, counted: int) -> float:
    """Sum the last figures of a window, of shape (1, tokens)."""
    return float(figures[0, figures.shape[1] - counted :].double().sum())


def is_finite(loss: Loss) -> bool:
    """Return whether the loss of a window is a number."""
    return math.isfinite(loss[0])


def windows_at_once(decoder: Decoder, seqlen: int, batch: int, *, models: int = 1) -> int:
    """Return the number of windows in a portion: a multiple of `batch`, at least one batch.

    Their hidden states take at most the memory of two blocks, or 1 GiB if that is more. So memory does not grow with
    the texts, and the time to read the blocks again for each portion is small beside the computation. On a CPU, where
    reading is cheap compared to computing, a portion has at most 32,768 tokens (or one batch), which limits the work
    lost by an interruption. Where a portion passes two models, it has half as many windows.
    """
    size = int(decoder.config.get_text_config().hidden_size) * decoder.dtype.itemsize
    largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in decoder.blocks)
    most = max(2 * largest * decoder.dtype.itemsize, _BYTES) // (seqlen * size)
    if decoder.device.type == "cpu":
        most = min(most, _CPU_TOKENS // seqlen)
    return max(most // models // batch, 1) * batch


def split_passes(left: Sequence[tuple[int, int]], batch: int, most: int) -> list[list[WindowRange]]:
    """Split the remaining windows of each text, given as (start, stop), into portions of at most `most` windows.

    No batch is split; batches are counted from the first remaining window of each text.
    """
    portions: list[list[WindowRange]] = []
    room = 0
    for text, (start, stop) in enumerate(left):
        for part in propagation.batches(stop - start, batch):
            size = part.stop - part.start
            if size > room:
                portions.append([])
                room = most
            previous = portions[-1].pop() if portions[-1] and portions[-1][-1].text == text else None
            first = previous.start if previous else start + part.start
            portions[-1].append(WindowRange(text=text, start=first, stop=start + part.stop))
            room -= size
    return portions


def measure(jobs: Sequence[PerplexityMeasurement]) -> list[Perplexity]:
    """Measure the perplexities of several texts with one checkpoint, in one run."""
    run = PerplexityRun(jobs)
    for _ in run:
        pass
    return run.results()
