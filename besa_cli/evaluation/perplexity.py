"""Perplexity by the block stream: several texts at once, with a model that may be larger than memory."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from torch import Tensor

from besa_cli.decoder.decoder import Decoder
from besa_cli.evaluation.measurement import Loss, Perplexity, PerplexityMeasurement, token_losses
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

    Parameters
    ----------
    jobs : sequence of PerplexityMeasurement
        Texts for the same checkpoint with the same settings.
    known : sequence of sequences of Loss, optional
        For each text, losses of its first windows that were measured before.

    Attributes
    ----------
    losses : list of lists of Loss
        For each text, the losses of its first windows measured so far.
    portions : list of lists of WindowRange
        Windows of each portion that are left to measure.
    """

    def __init__(self, jobs: Sequence[PerplexityMeasurement], known: Sequence[Sequence[Loss]] | None = None) -> None:
        self._jobs = jobs
        self._batch = jobs[0].settings.batch_size
        self.losses: list[list[Loss]] = [list(takewhile(_is_finite, losses)) for losses in known or [()] * len(jobs)]
        self._decoder = Decoder(jobs[0].directory, jobs[0].device, jobs[0].dtype, quick=True)
        left = [(len(losses), len(job.windows)) for job, losses in zip(jobs, self.losses, strict=True)]
        self.portions = split_passes(
            left, self._batch, windows_at_once(self._decoder, jobs[0].settings.seqlen, self._batch)
        )

    @property
    def notes(self) -> list[str]:
        """Notes for the user on mismatches between checkpoint and model."""
        return self._decoder.notes

    @property
    def steps(self) -> int:
        """Number of steps that iterating yields."""
        return len(self.portions) * (len(self._decoder) + 1)

    @property
    def work(self) -> list[float]:
        """Relative work of each step: its windows × its parameters, without attention."""
        config = self._decoder.config.get_text_config()
        blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in self._decoder.blocks]
        head = int(config.vocab_size) * int(config.hidden_size)
        windows = [sum(part.stop - part.start for part in portion) for portion in self.portions]
        return [float(count * size) for count in windows for size in (*blocks, head)]

    def __iter__(self) -> Iterator[PerplexityStep]:
        blocks, index = len(self._decoder), 0
        for number, portion in enumerate(self.portions, 1):
            suffix = f" of pass {number}/{len(self.portions)}" if len(self.portions) > 1 else ""
            start = time.perf_counter()
            states = [propagation.embed(self._decoder, self._tokens(part), self._batch) for part in portion]
            for block in range(blocks):
                self._pass(block, portion, states)
                yield self._step(index, f"block {block + 1}/{blocks}{suffix}", start)
                start, index = time.perf_counter(), index + 1
            for part, hidden in zip(portion, states, strict=True):
                self.losses[part.text] += list(self._window_losses(part, hidden))
            yield self._step(index, f"head{suffix}", start, *(part.text for part in portion))
            index += 1

    def forecast(self, directory: Path) -> Forecast:
        """Forecast memory and time, from the memory model and a trial on the first batch; no losses are kept.

        Parameters
        ----------
        directory : Path
            Directory of the results, whose free disk space is reported.
        """
        seqlen, blocks = self._jobs[0].settings.seqlen, len(self._decoder)
        sizes = [sum(part.stop - part.start for part in portion) for portion in self.portions]
        shape = memory_model.shape(self._decoder, segments(self._decoder, BLOCK))
        most = max(sizes)
        demand = memory_model.eval_demand(
            shape,
            tokens=most * seqlen,
            passing=min(self._batch, most) * seqlen,
            seqlen=seqlen,
            head=self._decoder.head_bytes(),
            portions=len(self.portions),
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
        self._decoder.load_head()
        ready = time.perf_counter()
        _ = list(self._window_losses(part, hidden))
        batch_seconds = (embedded - began) + blocks * (passed - loaded) + (time.perf_counter() - ready)
        seconds = batch_seconds * sum(sizes) / (part.stop - part.start) + blocks * len(sizes) * (loaded - embedded)
        return Forecast(
            memory=max(memory, compute.peak_resident()),
            phase=demand.phase,
            in_files=False,
            batch=self._batch,
            disk=0,
            free=disk.free(directory),
            seconds=seconds,
            blocks=blocks,
            left=blocks,
        )

    def _step(self, index: int, phase: str, start: float, *measured: int) -> PerplexityStep:
        seconds = time.perf_counter() - start
        return PerplexityStep(index=index, steps=self.steps, phase=phase, seconds=seconds, measured=measured)

    def _tokens(self, part: WindowRange) -> Tensor:
        return self._jobs[part.text].windows[part.start : part.stop]

    def _pass(self, block: int, portion: Sequence[WindowRange], states: Sequence[Tensor]) -> None:
        self._decoder.load(block)
        for part, hidden in zip(portion, states, strict=True):
            propagation.advance(self._decoder, block, hidden, self._tokens(part), self._batch)
        self._decoder.drop(block)

    def _window_losses(self, part: WindowRange, hidden: Tensor) -> Iterator[Loss]:
        job, tokens = self._jobs[part.text], self._tokens(part)
        for row in range(len(tokens)):
            counted = job.counted_tokens(part.start + row)
            losses = token_losses(self._decoder, hidden[row : row + 1], tokens[row : row + 1])[0]
            total = float(losses[len(losses) - counted :].double().sum())
            job.require_finite(total)
            yield total, counted


def _is_finite(loss: Loss) -> bool:
    return math.isfinite(loss[0])


def windows_at_once(decoder: Decoder, seqlen: int, batch: int) -> int:
    """Return the number of windows in a portion: a multiple of `batch`, at least one batch.

    Their hidden states take at most the memory of two blocks, or 1 GiB if that is more. So memory does not grow with
    the texts, and the time to read the blocks again for each portion is small beside the computation. On a CPU, where
    reading is cheap compared to computing, a portion has at most 32,768 tokens (or one batch), which limits the work
    lost by an interruption.
    """
    size = int(decoder.config.get_text_config().hidden_size) * decoder.dtype.itemsize
    largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in decoder.blocks)
    most = max(2 * largest * decoder.dtype.itemsize, _BYTES) // (seqlen * size)
    if decoder.device.type == "cpu":
        most = min(most, _CPU_TOKENS // seqlen)
    return max(most // batch, 1) * batch


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
    return [job.result(losses) for job, losses in zip(jobs, run.losses, strict=True)]
