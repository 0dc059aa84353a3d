"""What a command will take, before it does any work: memory, disk, and time from a short trial of one block."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from besa_cli.decoder.decoder import Decoder
from besa_cli.stream import propagation, windows
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.walk import BlockWalk, PrunePlan

_FIXED = ("update",)  # phases whose length does not depend on the number of samples
_BATCHES = 2  # that the trial passes through the block


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a command will take.

    Attributes
    ----------
    memory : int
        Peak resident bytes of the process.
    phase : str
        Where that peak is.
    in_files : bool, optional
        Whether the hidden states lie in files; None where there are none.
    batch : int, optional
        Samples in a pass without gradients.
    disk : int
        Bytes that it writes, files of hidden states included.
    free : int
        Bytes that the disk has.
    seconds : float
        For what is left to do.
    blocks, left : int
        Blocks of the model, and those that are not done yet.
    """

    memory: int
    phase: str
    in_files: bool | None = None
    batch: int | None = None
    disk: int
    free: int
    seconds: float
    blocks: int
    left: int


class Meter:
    """Listens to the steps of a window's work and says how long it would take with more samples."""

    def __init__(self) -> None:
        self._phase, self._done, self._last = "", 0, 0.0
        self._seconds: dict[str, float] = defaultdict(float)
        self._units: dict[str, int] = defaultdict(int)
        self._total: dict[str, int] = defaultdict(int)

    def step(self, done: int, total: int, phase: str) -> None:
        """See `besa_cli.stream.block.OnStep`; the first step of a phase only starts its clock."""
        now = time.perf_counter()
        if phase == self._phase and done > self._done:
            self._seconds[phase] += now - self._last
            self._units[phase] += done - self._done
        else:
            self._total[phase] += total
        self._phase, self._done, self._last = phase, done, now

    def extrapolated(self, seconds: float, factor: float) -> float:
        """What took `seconds` in the trial, with `factor` times as many samples."""
        more = sum(self._rate(phase) * total for phase, total in self._total.items() if phase not in _FIXED)
        return seconds + (factor - 1) * more

    def replayed(self, factor: float) -> float:
        """The time of one pass over all samples."""
        return factor * self._rate("propagation") * self._total.get("propagation", 0)

    def _rate(self, phase: str) -> float:
        units = self._units[phase]
        return self._seconds[phase] / units if units else 0.0


def seconds(decoder: Decoder, tokens: Tensor, assignment: PrunePlan, finished: int) -> float:
    """Seconds that `stream.walk.compress` will need for an assignment, from a trial of its first windows.

    The trial passes two batches through them, learning included, and keeps nothing.

    Parameters
    ----------
    finished : int
        Blocks that are done; they are only replayed.
    """
    batch, budgets = assignment.batch, assignment.budgets
    few = tokens[: _BATCHES * batch]
    factor = len(tokens) / max(len(few), 1)
    first, meter = assignment.segments[0], Meter()
    began = time.perf_counter()
    propagation.embed(decoder, few[:batch], batch) if len(few) else None
    embedding = (time.perf_counter() - began) * len(tokens) / max(min(len(few), batch), 1)
    began = time.perf_counter()
    trial = BlockWalk(
        decoder, lambda report, tensors, codes: None, few, assignment, on_step=meter.step, shelf=ActivationStore()
    )
    trial.prune(first, budgets[: len(first.windows)] if budgets else [None] * len(first.windows))
    for index in first.blocks:
        decoder.drop(index)
    of_first = meter.extrapolated(time.perf_counter() - began, factor)
    sizes = [sum(windows.sizes([segment])) for segment in assignment.segments]
    left = sum(size for size, segment in zip(sizes, assignment.segments, strict=True) if segment.blocks.stop > finished)
    return embedding + of_first * left / sizes[0] + finished * meter.replayed(factor)


def combined(forecasts: Sequence[Forecast]) -> Forecast:
    """Several commands one after the other in one process."""
    highest = max(forecasts, key=lambda each: each.memory)
    return replace(highest, disk=sum(each.disk for each in forecasts), seconds=sum(each.seconds for each in forecasts))
