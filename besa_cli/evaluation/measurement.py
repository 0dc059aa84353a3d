"""Perplexity measurement of one text: settings, windows of the text, and the result."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor

from besa_cli.decoder.conduct import overflow
from besa_cli.errors import BesaError, UsageError, require_counts
from besa_cli.evaluation.texts import EvaluationText
from besa_cli.inference.prompts import require_known
from besa_cli.system import compute, disk
from besa_cli.system.disk import JsonObject
from besa_cli.text.spool import Numbers
from besa_cli.text.tokenizing import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Loss = tuple[float, int]  # of a window: sum of −log p over its counted tokens, and their number


class WindowComparison(NamedTuple):
    """Comparison of a model with its baseline on the counted tokens of a window; their number is that of the loss.

    Attributes
    ----------
    baseline : float
        Sum of the baseline's −log p.
    divergence : float
        Sum of KL(baseline ‖ model) in nats.
    same : int
        Number of tokens for which both predict the same token as the most likely one.
    """

    baseline: float
    divergence: float
    same: int


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings:
    """Settings of a perplexity measurement.

    Attributes
    ----------
    seqlen : int
        Tokens in a window (the context length).
    stride : int, optional
        Tokens between the starts of two windows; by default windows do not overlap. With overlap only the last `stride`
        tokens of each window count (of the first window all do).
    limit : int, optional
        Number of windows to measure, from the start of the text.
    batch_size : int
        Windows in a pass.
    device, dtype : str
        Values of the command-line options; may be ``auto``.
    """

    seqlen: int = 2048
    stride: int | None = None
    limit: int | None = None
    batch_size: int = 1
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.seqlen < 2:
            raise UsageError(f"--seqlen {self.seqlen} is too short to predict a token", "give 2 or more")
        if self.stride is not None and not 1 <= self.stride <= self.seqlen:
            raise UsageError(
                f"--stride {self.stride} is not in 1 … {self.seqlen} (--seqlen)", "leave it out for no overlap"
            )
        require_counts(limit=self.limit, batch_size=self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity of a model on a text, with all that determines it; the last six fields give the text's source.

    The three fields before them compare the model with its baseline, the model it was made from, on the same tokens;
    they are None where that was not measured.

    Attributes
    ----------
    kl : float, optional
        Mean of KL(baseline ‖ model) over the counted tokens, in nats.
    same_token : float, optional
        Share of the counted tokens for which both predict the same token as the most likely one.
    baseline_digest : str, optional
        Content digest of the baseline.
    """

    dataset: str
    split: str | None
    text_digest: str
    tokenizer_digest: str
    model_digest: str
    tokens: int
    windows: int
    windows_in_text: int
    seqlen: int
    stride: int | None
    device: str
    dtype: str
    nll: float
    perplexity: float
    kl: Annotated[float, Ge(0)] | None = None
    same_token: Annotated[float, Ge(0), Le(1)] | None = None
    baseline_digest: str | None = None
    source: str | None = None
    file: str | None = None
    revision: str | None = None
    records: int | None = None
    official: bool | None = None
    note: str | None = None

    def is_compared_with(self, digest: str | None) -> bool:
        """Return whether the result has the figures that compare the model with the baseline of this digest."""
        measured = self.kl is not None and self.same_token is not None
        return measured and self.baseline_digest is not None and self.baseline_digest == digest


def tokenize(text: EvaluationText, tokenizer: "PreTrainedTokenizerBase", vocabulary: int) -> Tensor:
    """Tokenize the whole text, cut to `text.longest` tokens if set, and return its ids, of shape (tokens,).

    There is one BOS, at the start, if the tokenizer adds any.

    Raises
    ------
    BesaError
        The tokenizer yields ids beyond the model's vocabulary.
    """
    ids = _to_tensor(islice(Encoder(tokenizer)(text.text), text.longest))
    require_known(ids, vocabulary)
    return ids


def _to_tensor(ids: Iterable[int]) -> Tensor:
    """Collect token ids in a tensor, which is memory-mapped from a temporary file if it is large."""
    numbers = Numbers()
    if not numbers.add(ids):
        return torch.empty(0, dtype=torch.long)
    return torch.frombuffer(numbers.whole(), dtype=torch.long)


def windows(ids: Tensor, settings: PerplexitySettings, name: str) -> tuple[Tensor, int]:
    """Cut a text into windows, of shape (windows, seqlen), without the partial last one; also return their number.

    The number counts the windows of the whole text, regardless of `settings.limit`.

    Raises
    ------
    BesaError
        The text is shorter than one window.
    """
    step = settings.stride or settings.seqlen
    if len(ids) < settings.seqlen:
        raise BesaError(
            f"{name} has {len(ids)} tokens, less than one window of {settings.seqlen}",
            "give a smaller --seqlen or a longer text",
        )
    cut = ids.unfold(0, settings.seqlen, step)
    return cut[: settings.limit].contiguous(), len(cut)


class PerplexityMeasurement:
    """Perplexity measurement of one text with one checkpoint.

    Parameters
    ----------
    directory : Path
        Directory of the checkpoint.
    digest : str
        Content digest of the checkpoint.
    text : EvaluationText
    tokenizer, tokenizer_digest
        Tokenizer of the model and its digest.
    settings : PerplexitySettings

    Attributes
    ----------
    directory, settings
        The parameters of the same names.
    windows : Tensor of shape (windows, seqlen)
        Token ids to measure.
    device, dtype : torch.device, torch.dtype
        Device and dtype to compute in.

    Raises
    ------
    UsageError
        A window is longer than the model supports.
    BesaError
        The text is shorter than one window.
    """

    def __init__(
        self,
        directory: Path,
        digest: str,
        text: EvaluationText,
        tokenizer: "PreTrainedTokenizerBase",
        tokenizer_digest: str,
        settings: PerplexitySettings,
    ) -> None:
        from besa_cli.decoder import architecture

        config = architecture.config_of(directory)
        longest = architecture.maximum_length(config)
        if longest is not None and settings.seqlen > longest:
            raise UsageError(
                f"--seqlen {settings.seqlen} is more than the {longest} tokens that {directory} supports",
                f"give --seqlen {longest} or less",
            )
        self.directory, self.settings = directory, settings
        ids = tokenize(text, tokenizer, config.get_text_config().vocab_size)
        self.windows, in_text = windows(ids, settings, text.name)
        self.device = compute.device(settings.device)
        self.dtype = compute.dtype(settings.dtype, self.device)
        self._facts: JsonObject = {
            "dataset": text.name,
            "split": text.split,
            "text_digest": text.digest,
            "tokenizer_digest": tokenizer_digest,
            "model_digest": digest,
            "tokens": len(ids),
            "windows": len(self.windows),
            "windows_in_text": in_text,
            "seqlen": settings.seqlen,
            "stride": settings.stride,
            "device": self.device.type,
            "dtype": compute.name_of(self.dtype),
        }
        self._origin: JsonObject = {
            name: getattr(text, name) for name in ("source", "file", "revision", "records", "official", "note")
        }

    @property
    def digest(self) -> str:
        """Content digest of the checkpoint."""
        return str(self._facts["model_digest"])

    @property
    def dataset(self) -> str:
        """Name of the text."""
        return str(self._facts["dataset"])

    @property
    def file(self) -> str:
        """File name of the result, with a digest of everything that determines it."""
        key = hashlib.sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()[:16]
        return f"ppl-{disk.safe_name(self.dataset)}-{key}.json"

    def matches(self, result: Perplexity) -> bool:
        """Return whether a result is of this measurement and its perplexity is consistent with its mean loss."""
        alike = all(getattr(result, name) == value for name, value in self._facts.items())
        return alike and result.perplexity == _perplexity(result.nll)

    def counted_tokens(self, number: int) -> int:
        """Return the number of last tokens of window `number` that count: those that no earlier window predicts."""
        seqlen, stride = self.settings.seqlen, self.settings.stride
        return seqlen - 1 if number == 0 or stride is None else min(stride, seqlen - 1)

    def require_finite(self, value: float, figure: str = "loss") -> None:
        """Check that a loss, or another figure of this name, is finite.

        Raises
        ------
        BesaError
            It is NaN or infinite.
        """
        if not math.isfinite(value):
            raise overflow(f"{self.directory} gives a {figure} of {value} for tokens of {self.dataset}", self.dtype)

    def result(
        self, losses: Sequence[Loss], comparisons: Sequence[WindowComparison] = (), baseline_digest: str | None = None
    ) -> Perplexity:
        """Return the perplexity, exp of the mean −log p over all counted tokens, from the losses of all windows.

        For windows of equal length this mean equals the mean over windows in the BESA authors' code.

        Parameters
        ----------
        losses : sequence of Loss
            Of every window.
        comparisons : sequence of WindowComparison, optional
            Of every window, with the baseline of the digest `baseline_digest`.

        Raises
        ------
        BesaError
            A loss or divergence is NaN or infinite.
        """
        for total, _ in losses:
            self.require_finite(total)
        count = sum(counted for _, counted in losses)
        nll = math.fsum(total for total, _ in losses) / count
        against: JsonObject = {}
        if comparisons:
            for each in comparisons:
                self.require_finite(each.divergence, "divergence")
            against = {
                "kl": max(math.fsum(each.divergence for each in comparisons) / count, 0.0),  # rounding may be below
                "same_token": sum(each.same for each in comparisons) / count,
                "baseline_digest": baseline_digest,
            }
        return Perplexity(**self._facts, **self._origin, **against, nll=nll, perplexity=_perplexity(nll))


def _perplexity(nll: float) -> float:
    return math.exp(min(nll, 700.0))
