"""Rounds of a measurement: in each, every contender runs every workload once, one after the other; medians count."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from besa_cli.bench.contenders import Runner, RunTiming, TokenLoad

LEAST_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Measurement of one contender on one workload.

    Attributes
    ----------
    name : str
        Title of the contender.
    workload : TokenLoad
    prefill, decode : float
        Medians over the rounds: tokens of the prompts, and new tokens after the first, of all sequences per second.
    prefill_seconds, decode_seconds : list of float
        Of every round.
    resident : int
        Resident bytes of the process after the last round.
    weights_read : int, optional
        Bytes of weights that are read for a token of every sequence.
    share : float, optional
        Bytes of weights read per second while decoding, as a share of what the threads can read from memory.
    """

    name: str
    workload: TokenLoad
    prefill: float
    decode: float
    prefill_seconds: list[float]
    decode_seconds: list[float]
    resident: int
    weights_read: int | None
    share: float | None


@dataclass
class Rounds:
    """Rounds over contenders that are loaded; iterating over it does the work and yields the number of each round.

    Attributes
    ----------
    runners : sequence of Runner
    reader : Runner
        Reads memory, once a round.
    workloads : sequence of TokenLoad
    count : int
        Rounds that count; one more before them warms up.
    """

    runners: Sequence[Runner]
    reader: Runner
    workloads: Sequence[TokenLoad]
    count: int
    _timings: dict[tuple[str, TokenLoad], list[RunTiming]] = field(default_factory=dict)
    _reading: list[float] = field(default_factory=list)

    def __iter__(self) -> Iterator[int]:
        for number in range(self.count + 1):
            counts = number > 0
            read = self.reader.run(self.workloads[0])
            if counts and read is not None:
                self._reading.append(read.prefill)
            for workload in self.workloads:
                for runner in self._in_turn(number):
                    timing = runner.run(workload)
                    if counts and timing is not None:
                        self._timings.setdefault((runner.contender.name, workload), []).append(timing)
            yield number

    def _in_turn(self, number: int) -> list[Runner]:
        """Return the runners in the order of a round: each round begins with the next one."""
        first = number % len(self.runners)
        return [*self.runners[first:], *self.runners[:first]]

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the threads read from memory: the most of all rounds."""
        return (self.reader.weights_read or 0) / min(self._reading)

    def results(self) -> list[Speeds]:
        """Return the results, workload by workload, without those that a contender cannot run."""
        return [
            _speeds(runner, workload, self._timings[runner.contender.name, workload], self.bandwidth)
            for workload in self.workloads
            for runner in self.runners
            if (runner.contender.name, workload) in self._timings
        ]


def _speeds(runner: Runner, workload: TokenLoad, timings: Sequence[RunTiming], bandwidth: float) -> Speeds:
    prefill, decode = [each.prefill for each in timings], [each.decode for each in timings]
    steps = (workload.new - 1) / statistics.median(decode)
    read = runner.weights_read
    return Speeds(
        name=runner.contender.name,
        workload=workload,
        prefill=workload.batch * workload.prompt / statistics.median(prefill),
        decode=workload.batch * steps,
        prefill_seconds=prefill,
        decode_seconds=decode,
        resident=timings[-1].resident,
        weights_read=read,
        share=None if read is None else read * steps / bandwidth,
    )


@dataclass(frozen=True, kw_only=True)
class SpeedComparison:
    """Speed of one contender as a multiple of another's on the same workload, and its memory as a share."""

    name: str
    other: str
    workload: TokenLoad
    prefill: float
    decode: float
    resident: float


def compare(results: Sequence[Speeds], name: str) -> list[SpeedComparison]:
    """Compare one contender with all others, workload by workload."""
    own = {each.workload: each for each in results if each.name == name}
    return [
        SpeedComparison(
            name=name,
            other=other.name,
            workload=other.workload,
            prefill=own[other.workload].prefill / other.prefill,
            decode=own[other.workload].decode / other.decode,
            resident=own[other.workload].resident / other.resident if other.resident else math.nan,
        )
        for other in results
        if other.name != name and other.workload in own
    ]
