"""Forecast of a command's peak memory, disk use and run time, the latter from a short trial on the first window."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from besa_cli.decoder.decoder import Decoder
from besa_cli.stream import propagation, windows
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.block import Phase
from besa_cli.stream.held_out import HeldOutCheck
from besa_cli.stream.walk import BlockWalk, PrunePlan

_FIXED: tuple[Phase, ...] = ("update",)  # phases whose duration does not depend on the number of samples
_BATCHES = 2  # batches that the trial passes through the window


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Memory, disk space and time that a command requires.

    Attributes
    ----------
    memory : int
        Peak resident bytes of the process.
    phase : str
        Phase in which the peak occurs.
    in_files : bool, optional
        True if the hidden states are kept in files; None if there are no hidden states.
    batch : int, optional
        Samples in a pass without gradients.
    disk : int
        Bytes written, including the files of hidden states.
    free : int
        Free bytes on the disk.
    seconds : float
        Duration of the remaining work.
    blocks, left : int
        Blocks of the model, and blocks that are not finished yet.
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
    """Stopwatch for the phases of a window, used to extrapolate their duration to more samples."""

    def __init__(self) -> None:
        self._phase: Phase | None = None
        self._done, self._last = 0, 0.0
        self._seconds: dict[Phase, float] = defaultdict(float)
        self._units: dict[Phase, int] = defaultdict(int)
        self._total: dict[Phase, int] = defaultdict(int)

    def step(self, done: int, total: int, phase: Phase) -> None:
        """Record one step, as `besa_cli.stream.block.OnStep`; the first step of a phase only starts its clock."""
        now = time.perf_counter()
        if phase == self._phase and done > self._done:
            self._seconds[phase] += now - self._last
            self._units[phase] += done - self._done
        else:
            self._total[phase] += total
        self._phase, self._done, self._last = phase, done, now

    def extrapolate(self, seconds: float, factor: float) -> float:
        """Return the duration, in seconds, of a trial of `seconds` if it had `factor` times as many samples."""
        more = sum(self._rate(phase) * total for phase, total in self._total.items() if phase not in _FIXED)
        return seconds + (factor - 1) * more

    def replay_seconds(self, factor: float) -> float:
        """Return the duration, in seconds, of one pass over `factor` times as many samples as the trial had."""
        return factor * self._rate("propagation") * self._total.get("propagation", 0)

    def _rate(self, phase: Phase) -> float:
        units = self._units[phase]
        return self._seconds[phase] / units if units else 0.0


def seconds(decoder: Decoder, tokens: Tensor, plan: PrunePlan, finished: int, *, whole_passes: float = 0.0) -> float:
    """Estimate the seconds that `stream.walk.compress` will take, from a trial on the first segment.

    The trial passes two batches through the segment, learning included, and stores nothing.

    Parameters
    ----------
    finished : int
        Number of finished blocks, which are only replayed.
    whole_passes : float
        Passes over all samples and the whole model beside that, each as long as a pass without gradients.
    """
    batch, budgets = plan.batch, plan.budgets
    few = tokens[: _BATCHES * batch]
    factor = len(tokens) / max(len(few), 1)
    first, meter = plan.segments[0], Meter()
    began = time.perf_counter()
    propagation.embed(decoder, few[:batch], batch) if len(few) else None
    embedding = (time.perf_counter() - began) * len(tokens) / max(min(len(few), batch), 1)
    check = None if plan.held_out is None else HeldOutCheck(decoder, plan.held_out, batch, {})
    began = time.perf_counter()
    trial = BlockWalk(
        decoder, lambda report, tensors, codes, state: None, few, plan,
        on_step=meter.step, activations=ActivationStore(), check=check,
    )  # fmt: skip
    trial.prune(first, budgets[: len(first.windows)] if budgets else [None] * len(first.windows))
    for index in first.blocks:
        decoder.drop(index)
    first_seconds = meter.extrapolate(time.perf_counter() - began, factor)
    sizes = [sum(windows.sizes([segment])) for segment in plan.segments]
    left = sum(size for size, segment in zip(sizes, plan.segments, strict=True) if segment.blocks.stop > finished)
    whole = whole_passes * (embedding + len(decoder) * meter.replay_seconds(factor))
    return embedding + first_seconds * left / sizes[0] + finished * meter.replay_seconds(factor) + whole


def combine(forecasts: Sequence[Forecast]) -> Forecast:
    """Return the forecast of several commands that run one after the other in one process."""
    highest = max(forecasts, key=lambda forecast: forecast.memory)
    return replace(
        highest,
        disk=sum(forecast.disk for forecast in forecasts),
        seconds=sum(forecast.seconds for forecast in forecasts),
    )
