"""Search for the candidate that meets all targets, with as few measurements as possible.

Quality falls with the sparsity of a line of candidates, so that one measured candidate decides on all to one side of
it. Which one to measure next follows from a prediction: the divergences that a probe gave for all candidates, scaled by
what was measured nearby. A wrong prediction costs measurements, not the right answer: a candidate is the answer once
it is measured, meets the targets, and every candidate that would be better is decided. Only where a line is predicted
to miss by the factor `HOPELESS` is it left out without a measurement.

Everything follows from the measurements so far, so that an interrupted search goes on where it stopped.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from besa_cli.fitting.space import Candidate, Space

HOPELESS = 2.0  # predicted divergence over the allowed one (or over the best), beyond which a line is left out
_LEAST = 1e-6  # divergences below are taken as this one, for logarithms

Aim = Literal["smallest", "sparsest", "best"]


class Quality(NamedTuple):
    """Quality of a measured candidate: its perplexity, and its divergence from the dense model in nats per token."""

    perplexity: float
    kl: float


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Targets to meet, all together; None is no target.

    Attributes
    ----------
    max_ppl, max_kl : float, optional
        Highest perplexity, and highest divergence from the dense model in nats per token.
    size : int, optional
        Most bytes of the packed model.
    bits_per_weight : float, optional
        Most bits of a weight of the linears.
    """

    max_ppl: float | None = None
    max_kl: float | None = None
    size: int | None = None
    bits_per_weight: float | None = None

    @property
    def limits_size(self) -> bool:
        """True if a size is among them."""
        return self.size is not None or self.bits_per_weight is not None

    def fit_in(self, space: Space, candidate: Candidate) -> bool:
        """Return whether the candidate is small enough."""
        small = self.size is None or space.bytes(candidate) <= self.size
        return small and (self.bits_per_weight is None or space.bits_per_weight(candidate) <= self.bits_per_weight)

    def met_by(self, quality: Quality) -> bool:
        """Return whether the quality is good enough."""
        good = self.max_ppl is None or quality.perplexity <= self.max_ppl
        return good and (self.max_kl is None or quality.kl <= self.max_kl)


class Search:
    """Search in a space, as it stands after some measurements.

    Parameters
    ----------
    space : Space
    targets : Targets
    aim : {"smallest", "sparsest", "best"}
        What to find among the candidates that meet the targets: the fewest bytes, the highest sparsity, or the least
        divergence.
    probed : mapping of Candidate to float
        Divergence that the probe gave, in nats per token: of two candidates of each line at least, or its only one.
    dense : float
        Perplexity of the dense model.
    measured : mapping of Candidate to Quality
    """

    def __init__(
        self,
        space: Space,
        targets: Targets,
        aim: Aim,
        *,
        probed: Mapping[Candidate, float],
        dense: float,
        measured: Mapping[Candidate, Quality],
    ) -> None:
        self._space, self._targets, self._aim, self._dense = space, targets, aim, dense
        self._probed = _logarithms(space, probed)
        self.measured = {Candidate(0.0): Quality(dense, 0.0), **measured}
        self._offsets = {  # log(measured divergence / probed divergence)
            candidate: math.log(quality.kl) - self._probed[candidate]
            for candidate, quality in self.measured.items()
            if candidate in self._probed and quality.kl > _LEAST
        }
        self._allowed = self._allowed_divergence()
        self._lines = {
            bits: [candidate for candidate in line if targets.fit_in(space, candidate)]
            for bits, line in space.lines.items()
        }

    @property
    def fitting(self) -> list[Candidate]:
        """Candidates that are small enough."""
        return [candidate for line in self._lines.values() for candidate in line]

    @property
    def answer(self) -> Candidate | None:
        """Best measured candidate that meets the targets, None if none does."""
        met = [candidate for candidate in self.fitting if self._met(candidate)]
        return min(met, key=self._cost, default=None)

    @property
    def nearest(self) -> Candidate | None:
        """Measured candidate that is small enough and nearest to the quality asked, None if there is none."""
        found = [candidate for candidate in self.fitting if candidate in self.measured]
        return min(found, key=lambda candidate: self.measured[candidate].kl, default=None)

    @property
    def left_out(self) -> dict[int | None, Candidate]:
        """For each line that was not tried, by its bits: the least sparse candidate that would be a better answer."""
        found = {}
        for bits, line in self._lines.items():
            better = self._better(line)
            if better and self._is_new(line):
                found[bits] = better[0]
        return found

    def meets(self, candidate: Candidate) -> bool:
        """Return whether a candidate is measured and meets all targets."""
        return self._targets.fit_in(self._space, candidate) and self._met(candidate)

    def next(self) -> Candidate | None:
        """Return the candidate to measure next, or None if the search has ended."""
        wanted = [self._wanted(line) for line in self._lines.values()]
        found = [candidate for candidate in wanted if candidate is not None]
        if not found and self.nearest is None:  # all lines are hopeless: one measurement says how far they are
            return min(self.fitting, key=self.predicted, default=None)
        return min(found, key=self._promise, default=None)

    def predicted(self, candidate: Candidate) -> float:
        """Predict the divergence of a candidate, in nats per token.

        It is that of the probe, scaled by measured over probed divergence of the nearest measured candidates of its
        line: of one to each side in proportion (of the logarithms), else of the one; without any, by the mean of all.
        """
        line = [other for other in self._offsets if other.bits == candidate.bits]
        low = max((other for other in line if other.sparsity <= candidate.sparsity), default=None)
        high = min((other for other in line if other.sparsity >= candidate.sparsity), default=None)
        here = self._probed[candidate]
        if low is not None and high is not None:
            start, end = self._probed[low], self._probed[high]
            share = (here - start) / (end - start) if end > start else 0.0
            return math.exp(here + (1 - share) * self._offsets[low] + share * self._offsets[high])
        near = low if low is not None else high
        if near is not None:
            return math.exp(here + self._offsets[near])
        return math.exp(here + sum(self._offsets.values()) / max(len(self._offsets), 1))

    def _allowed_divergence(self) -> float:
        """Return the divergence at which the quality is expected to reach the limit.

        The logarithm of the perplexity over the dense one is about the divergence; how much of it, the measured
        candidates say.
        """
        allowed = math.inf if self._targets.max_kl is None else self._targets.max_kl
        if self._targets.max_ppl is not None:
            shares = [
                math.log(quality.perplexity / self._dense) / quality.kl
                for quality in self.measured.values()
                if quality.kl > _LEAST and quality.perplexity > self._dense
            ]
            share = sum(shares) / len(shares) if shares else 1.0
            allowed = min(allowed, max(math.log(self._targets.max_ppl / self._dense), 0.0) / share)
        return allowed

    def _cost(self, candidate: Candidate) -> tuple[float, float]:
        """Return what is to be least."""
        size = float(self._space.bytes(candidate))
        if self._aim == "smallest":
            return size, -candidate.sparsity
        if self._aim == "sparsest":
            return -candidate.sparsity, size
        return self.measured[candidate].kl, size

    def _met(self, candidate: Candidate) -> bool:
        return candidate in self.measured and self._targets.met_by(self.measured[candidate])

    def _undecided(self, line: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates between the sparsest that is good enough and the least sparse that is not."""
        measured = [candidate for candidate in line if candidate in self.measured]
        good = max((candidate.sparsity for candidate in measured if self._met(candidate)), default=-1.0)
        bad = min((candidate.sparsity for candidate in measured if not self._met(candidate)), default=math.inf)
        return [candidate for candidate in line if good < candidate.sparsity < bad]

    def _wanted(self, line: Sequence[Candidate]) -> Candidate | None:
        """Return the candidate of a line that is worth a measurement, if any is."""
        better = self._better(line)
        if not better or self._is_hopeless(line, better[0]):
            return None
        good = [candidate for candidate in better if self.predicted(candidate) <= self._allowed]
        return good[-1] if good else better[0]

    def _better(self, line: Sequence[Candidate]) -> list[Candidate]:
        """Return the undecided candidates of a line that would be a better answer; with the aim "best" the first."""
        if self._aim == "best":
            return [candidate for candidate in line[:1] if candidate not in self.measured]
        answer, undecided = self.answer, self._undecided(line)
        return undecided if answer is None else [each for each in undecided if self._cost(each) < self._cost(answer)]

    def _is_hopeless(self, line: Sequence[Candidate], candidate: Candidate) -> bool:
        """Return whether a candidate of a line is predicted to be far from good enough, or from the best so far."""
        if self._aim == "best":
            known = (self.measured[other].kl for other in self.fitting if other in self.measured)
            return self.predicted(candidate) > HOPELESS * min(known, default=math.inf)
        return self._is_new(line) and self.predicted(candidate) > HOPELESS * self._allowed

    def _is_new(self, line: Sequence[Candidate]) -> bool:
        return not any(candidate in self.measured for candidate in line if candidate != Candidate(0.0))

    def _promise(self, candidate: Candidate) -> tuple[float, ...]:
        """Return what is least for the candidate to measure first.

        Those predicted to miss come last: what is measured before may show that they are hopeless.
        """
        if self._aim == "best":
            return (self.predicted(candidate),)
        return (float(self.predicted(candidate) > self._allowed), *self._cost(candidate))


def _logarithms(space: Space, probed: Mapping[Candidate, float]) -> dict[Candidate, float]:
    """Return the logarithm of every candidate's divergence, that of those between probed ones by interpolation."""
    found: dict[Candidate, float] = {}
    for line in space.lines.values():
        known = [candidate for candidate in line if candidate in probed]
        values = np.interp(
            [candidate.sparsity for candidate in line],
            [candidate.sparsity for candidate in known],
            [math.log(max(probed[candidate], _LEAST)) for candidate in known],
        )
        found.update(zip(line, values.tolist(), strict=True))
    return found
