"""Perplexity of a sparse export, run as a whole from its packed weights."""

import time
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from besa_cli.decoder import attention
from besa_cli.evaluation.measurement import Loss, Perplexity, PerplexityMeasurement, WindowComparison
from besa_cli.evaluation.perplexity import PerplexityStep, WindowRange, is_finite, split_passes, sum_last
from besa_cli.evaluation.token_figures import losses_of_logits
from besa_cli.inference import loading
from besa_cli.stream.forecast import Forecast
from besa_cli.system import compute, disk

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PackedPerplexityRun:
    """Measurement of several texts with one sparse export, batch by batch; iterating over it does the work.

    It has the interface of `besa_cli.evaluation.perplexity.PerplexityRun`, without a baseline. Attention is computed as
    there.

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
    comparisons : list of lists of WindowComparison
        Empty lists.
    portions : list of lists of WindowRange
        Windows of each batch that are left to measure.
    """

    baseline_digest = None
    notes: Sequence[str] = ()

    def __init__(self, jobs: Sequence[PerplexityMeasurement], known: Sequence[Sequence[Loss]] | None = None) -> None:
        self._jobs, self._batch = jobs, jobs[0].settings.batch_size
        self.losses: list[list[Loss]] = [list(takewhile(is_finite, losses)) for losses in known or [()] * len(jobs)]
        self.comparisons: list[list[WindowComparison]] = [[] for _ in jobs]
        left = [(len(losses), len(job.windows)) for job, losses in zip(jobs, self.losses, strict=True)]
        self.portions = split_passes(left, self._batch, self._batch)

    @property
    def steps(self) -> int:
        """Number of steps that iterating yields."""
        return len(self.portions)

    @property
    def work(self) -> list[float]:
        """Relative work of each step: its windows."""
        return [float(sum(part.stop - part.start for part in portion)) for portion in self.portions]

    def __iter__(self) -> Iterator[PerplexityStep]:
        model = self._load()
        for index, portion in enumerate(self.portions):
            start = time.perf_counter()
            for part in portion:
                self.losses[part.text] += self._window_losses(model, part)
            yield PerplexityStep(
                index=index,
                steps=self.steps,
                phase="",
                seconds=time.perf_counter() - start,
                measured=tuple(part.text for part in portion),
            )

    def results(self) -> list[Perplexity]:
        """Return the result of each text, after the last step.

        Raises
        ------
        BesaError
            A figure is NaN or infinite.
        """
        return [job.result(losses) for job, losses in zip(self._jobs, self.losses, strict=True)]

    def baseline_results(self) -> list[Perplexity]:
        """Return no results: there is no baseline."""
        return []

    def forecast(self, directory: Path) -> Forecast:
        """Forecast memory and time from a trial on the first batch; no losses are kept.

        Parameters
        ----------
        directory : Path
            Directory of the results, whose free disk space is reported.
        """
        began = time.perf_counter()
        model = self._load()
        loaded = time.perf_counter()
        for part in self.portions[0]:
            self._window_losses(model, part)
        blocks = int(model.config.get_text_config().num_hidden_layers)
        return Forecast(
            memory=compute.peak_resident(),
            phase="the whole model",
            batch=self._batch,
            disk=0,
            free=disk.free(directory),
            seconds=loaded - began + (time.perf_counter() - loaded) * sum(self.work) / self.work[0],
            blocks=blocks,
            left=blocks,
        )

    def _load(self) -> "PreTrainedModel":
        model = loading.load(self._jobs[0].directory, self._jobs[0].dtype)
        attention.use_chunked_attention(model)
        return model

    def _window_losses(self, model: "PreTrainedModel", part: WindowRange) -> list[Loss]:
        """Return the loss of each window of a part, with the number of its counted tokens."""
        job = self._jobs[part.text]
        tokens = job.windows[part.start : part.stop]
        losses = losses_of_logits(_logits(model, tokens), tokens)
        found = []
        for row in range(len(tokens)):
            counted = job.counted_tokens(part.start + row)
            loss = sum_last(losses[row : row + 1], counted)
            job.require_finite(loss)
            found.append((loss, counted))
        return found


def _logits(model: "PreTrainedModel", tokens: Tensor) -> Tensor:
    """Return the logits of a batch, of shape (samples, seqlen, vocabulary)."""
    run: Any = model
    with torch.no_grad():
        logits: Tensor = run(input_ids=tokens, use_cache=False).logits
    return logits
