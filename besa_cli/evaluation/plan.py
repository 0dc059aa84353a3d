"""Plan of an evaluation: which texts have stored results, and which pass through a model, its baseline, or both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from besa_cli.evaluation.measurement import Perplexity, PerplexityMeasurement

Load = Callable[[PerplexityMeasurement], Perplexity | None]


@dataclass(frozen=True, kw_only=True)
class PerplexityPlan:
    """Stored results of several texts, and what is left to measure; texts are named by their numbers.

    Attributes
    ----------
    jobs, baseline : sequence of PerplexityMeasurement
        For each text, the measurement of the model and of its baseline; `baseline` is empty without one.
    stored, stored_baseline : dict of int to Perplexity
        Stored results that need not be measured again.
    replaced : list of int
        Texts whose stored result lacks the comparison with this baseline.
    alone : list of int
        Texts that pass through the model alone.
    together : list of int
        Texts that pass through the model and its baseline side by side, which compares them.
    baseline_alone : list of int
        Texts that pass through the baseline alone.
    """

    jobs: Sequence[PerplexityMeasurement]
    baseline: Sequence[PerplexityMeasurement]
    stored: dict[int, Perplexity]
    stored_baseline: dict[int, Perplexity]
    replaced: list[int]
    alone: list[int]
    together: list[int]
    baseline_alone: list[int]

    @property
    def passes_baseline(self) -> bool:
        """True if a text is left that passes through the baseline."""
        return bool(self.together or self.baseline_alone)

    def of(self, texts: Sequence[int]) -> list[PerplexityMeasurement]:
        """Return the measurements of some texts with the model."""
        return [self.jobs[number] for number in texts]

    def baseline_of(self, texts: Sequence[int]) -> list[PerplexityMeasurement]:
        """Return the measurements of some texts with the baseline."""
        return [self.baseline[number] for number in texts]

    def runs(self) -> list[tuple[list[PerplexityMeasurement], list[PerplexityMeasurement]]]:
        """Return the measurements of every run that is left, and those of the baseline beside them, if any."""
        runs = [
            (self.of(self.alone), []),
            (self.of(self.together), self.baseline_of(self.together)),
            (self.baseline_of(self.baseline_alone), []),
        ]
        return [run for run in runs if run[0]]


def plan(
    jobs: Sequence[PerplexityMeasurement], baseline: Sequence[PerplexityMeasurement], load: Load
) -> PerplexityPlan:
    """Plan the measurement of several texts with a model and its baseline.

    A text is compared unless its stored result already has the comparison with this baseline: both models pass, even
    if the perplexity of either is stored. Texts that the tokenizers of the two models cut into different windows are
    not compared.

    Parameters
    ----------
    jobs, baseline : sequence of PerplexityMeasurement
        For each text, the measurement of the model and of its baseline; the latter may be empty.
    load : function of a PerplexityMeasurement returning a Perplexity or None
        Loads a stored result.
    """
    stored, stored_baseline = _loaded(jobs, load), _loaded(baseline, load)
    together = [
        number
        for number, (job, other) in enumerate(zip(jobs, baseline, strict=False))
        if job.windows.equal(other.windows) and not (number in stored and stored[number].is_compared_with(other.digest))
    ]
    return PerplexityPlan(
        jobs=jobs,
        baseline=baseline,
        stored={number: result for number, result in stored.items() if number not in together},
        stored_baseline=stored_baseline,
        replaced=[number for number in together if number in stored],
        alone=[number for number in range(len(jobs)) if number not in stored and number not in together],
        together=together,
        baseline_alone=[
            number for number in range(len(baseline)) if number not in stored_baseline and number not in together
        ],
    )


def _loaded(jobs: Sequence[PerplexityMeasurement], load: Load) -> dict[int, Perplexity]:
    found = ((number, load(job)) for number, job in enumerate(jobs))
    return {number: result for number, result in found if result is not None}
