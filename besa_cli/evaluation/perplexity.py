"""Perplexity over the block stream, of several texts at once: a model larger than memory can be measured."""

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

_BYTES = 1 << 30  # of hidden states that are held at a time
_CPU_TOKENS = 32_768  # that a CPU takes through the model at a time


@dataclass(frozen=True, kw_only=True)
class PerplexityStep:
    """A block, or at the end the head, that a portion of the windows went through.

    Attributes
    ----------
    index, steps : int
        The step, from 0, and how many the whole walk has.
    phase : str
        Where the walk is, in words.
    seconds : float
    measured : tuple of int
        The texts some of whose windows are measured now; none but after the head.
    """

    index: int
    steps: int
    phase: str
    seconds: float
    measured: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WindowRange:
    """Consecutive windows of one text, from `start` to before `stop`."""

    text: int
    start: int
    stop: int


class PerplexityRun:
    """Take the windows of several texts through one model, portion by portion; iterate over it to do so.

    A portion goes through all blocks, each loaded once for it, and through the head; then its windows are measured.
    How many windows a portion has, `windows_at_once` says. A text's windows are batched from its own start, so that its
    losses are, to the bit, those of the text alone, however the windows are spread over portions.

    Parameters
    ----------
    jobs : sequence of Measurement
        Texts for the same checkpoint with the same settings.
    known : sequence of sequences of Loss, optional
        For each text, the losses of its first windows, where they were measured before.

    Attributes
    ----------
    losses : list of lists of Loss
        For each text, those of its first windows, as far as they are measured.
    """

    def __init__(self, jobs: Sequence[PerplexityMeasurement], known: Sequence[Sequence[Loss]] | None = None) -> None:
        self._jobs = jobs
        self._batch = jobs[0].settings.batch_size
        self.losses: list[list[Loss]] = [list(takewhile(_is_number, each)) for each in known or [()] * len(jobs)]
        self._decoder = Decoder(jobs[0].directory, jobs[0].device, jobs[0].dtype, quick=True)
        left = [(len(losses), len(job.windows)) for job, losses in zip(jobs, self.losses, strict=True)]
        self.portions = split_passes(
            left, self._batch, windows_at_once(self._decoder, jobs[0].settings.seqlen, self._batch)
        )

    @property
    def notes(self) -> list[str]:
        """What the user should know of how the checkpoint fits the model."""
        return self._decoder.notes

    @property
    def steps(self) -> int:
        """How often `Step` will be yielded."""
        return len(self.portions) * (len(self._decoder) + 1)

    @property
    def work(self) -> list[float]:
        """Multiplications of each step, but those of attention."""
        config = self._decoder.config.get_text_config()
        blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in self._decoder.blocks]
        head = int(config.vocab_size) * int(config.hidden_size)
        windows = [sum(part.stop - part.start for part in portion) for portion in self.portions]
        return [float(count * size) for count in windows for size in (*blocks, head)]

    def __iter__(self) -> Iterator[PerplexityStep]:
        blocks, index = len(self._decoder), 0
        for number, portion in enumerate(self.portions, 1):
            place = f" of pass {number}/{len(self.portions)}" if len(self.portions) > 1 else ""
            start = time.perf_counter()
            states = [propagation.embed(self._decoder, self._tokens(part), self._batch) for part in portion]
            for block in range(blocks):
                self._pass(block, portion, states)
                yield self._step(index, f"block {block + 1}/{blocks}{place}", start)
                start, index = time.perf_counter(), index + 1
            for part, hidden in zip(portion, states, strict=True):
                self.losses[part.text] += list(self._window_losses(part, hidden))
            yield self._step(index, f"head{place}", start, *(part.text for part in portion))
            index += 1

    def forecast(self, place: Path) -> Forecast:
        """What the walk will take, from the model of memory and a trial of the first windows; nothing is measured.

        Parameters
        ----------
        place : Path
            Where results go.
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
        each = (embedded - began) + blocks * (passed - loaded) + (time.perf_counter() - ready)
        seconds = each * sum(sizes) / (part.stop - part.start) + blocks * len(sizes) * (loaded - embedded)
        return Forecast(
            memory=max(memory, compute.peak_resident()),
            phase=demand.phase,
            in_files=False,
            batch=self._batch,
            disk=0,
            free=disk.free(place),
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
            counted = job.counted(part.start + row)
            losses = token_losses(self._decoder, hidden[row : row + 1], tokens[row : row + 1])[0]
            total = float(losses[len(losses) - counted :].double().sum())
            job.require_number(total)
            yield total, counted


def _is_number(loss: Loss) -> bool:
    return math.isfinite(loss[0])


def windows_at_once(decoder: Decoder, seqlen: int, batch: int) -> int:
    """How many windows go through the model together, in whole batches, at least one.

    Their hidden states take no more memory than two blocks, or 1 GiB where that is more; so memory does not grow with
    the texts, and reading the blocks again for the next windows stays small beside computing on these. On a CPU, where
    it is small anyway, they are 32,768 tokens at most (or one batch): an interruption loses no more than their work.
    """
    size = int(decoder.config.get_text_config().hidden_size) * decoder.dtype.itemsize
    block = max(sum(parameter.numel() for parameter in each.parameters()) for each in decoder.blocks)
    most = max(2 * block * decoder.dtype.itemsize, _BYTES) // (seqlen * size)
    if decoder.device.type == "cpu":
        most = min(most, _CPU_TOKENS // seqlen)
    return max(most // batch, 1) * batch


def split_passes(left: Sequence[tuple[int, int]], batch: int, most: int) -> list[list[WindowRange]]:
    """The windows that are left of each text, from … to before …, in portions of at most `most` windows.

    No batch is torn: batches are counted from the first window of each text that is left, as if it were alone.
    """
    made: list[list[WindowRange]] = []
    room = 0
    for text, (start, stop) in enumerate(left):
        for part in propagation.batches(stop - start, batch):
            size = part.stop - part.start
            if size > room:
                made.append([])
                room = most
            begun = made[-1].pop() if made[-1] and made[-1][-1].text == text else None
            first = begun.start if begun else start + part.start
            made[-1].append(WindowRange(text=text, start=first, stop=start + part.stop))
            room -= size
    return made


def measure(jobs: Sequence[PerplexityMeasurement]) -> list[Perplexity]:
    """The perplexities of several texts on one checkpoint, in one walk."""
    walk = PerplexityRun(jobs)
    for _ in walk:
        pass
    return [job.result(losses) for job, losses in zip(jobs, walk.losses, strict=True)]
