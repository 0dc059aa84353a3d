"""Learning of a whole model from the dense one: the divergence of its predictions, sample by sample and pass by pass.

Each step passes one sample forward and backward through the block stream, so the weights of one block are enough. A
pass counts only if the divergence on samples that are not learned from is smaller than ever before.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from besa_cli.checkpoint.reports import PassReport
from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import BesaError
from besa_cli.ops import losses
from besa_cli.stream import held_out
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.backward import BackwardStream, Blocks, Visit
from besa_cli.stream.block import OnStep
from besa_cli.stream.propagation import advance, embed
from besa_cli.system import compute

BETAS = (0.9, 0.95)  # of Adam
SAVED = 16  # steps after which the state is stored


@dataclass(frozen=True, kw_only=True)
class LearningPlan:
    """Settings of the learning of a whole model.

    Attributes
    ----------
    epochs : int
        Passes over the samples.
    rate : float
        Learning rate, decaying to 0 along a half cosine.
    batch : int
        Samples in a pass without gradients.
    seed : int
    resident : bool
        Keep all blocks loaded; changes no result.
    """

    epochs: int
    rate: float
    batch: int
    seed: int
    resident: bool = False


@dataclass(kw_only=True)
class LearningProgress:
    """Divergences of what was learned so far, in nats per token.

    Attributes
    ----------
    history : list of float
        Divergence of the sample of each step, before the step.
    held : list of float
        Divergence on samples that are not learned from, before the first pass and after each.
    parts : list of float
        For each of `held` the part of the way from the start at which it was found; empty if all are whole ways.
    """

    history: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    parts: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "LearningProgress":
        """Return the progress that `tensors` describes."""
        return cls(**{name: tensors[name].tolist() for name in ("history", "held", "parts") if name in tensors})

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors."""
        values = {"history": self.history, "held": self.held} | ({"parts": self.parts} if self.parts else {})
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    @property
    def step(self) -> int:
        """Number of steps that were done."""
        return len(self.history)

    @property
    def kept(self) -> int:
        """Pass with the smallest divergence on samples that are not learned from; 0: the start."""
        return int(np.argmin(self.held))

    @property
    def kept_part(self) -> float:
        """Part of the way from the start that is kept of pass `kept`."""
        return self.parts[self.kept] if self.parts else 1.0


class Distillation:
    """Samples with the dense model's outputs, on which a whole model learns and its passes are compared.

    Parameters
    ----------
    decoder : Decoder
    tokens : Tensor of shape (samples, seqlen)
        Token ids to learn from.
    plan : LearningPlan
    rate_option : str
        Option of the learning rate, for the hint of an error.
    held_out : Tensor of shape (windows, seqlen), optional
        Token ids that are not learned from, on which the passes are compared; else the first sample serves.
    activations : ActivationStore, optional
        Storage of hidden states; in memory by default.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokens: Tensor,
        plan: LearningPlan,
        *,
        rate_option: str,
        held_out: Tensor | None = None,
        activations: ActivationStore | None = None,
    ) -> None:
        self._decoder, self._plan, self._rate_option = decoder, plan, rate_option
        self._activations = activations or ActivationStore()
        self.samples = len(tokens)
        self._tokens = tokens if held_out is None else torch.cat([tokens, held_out])
        self._dense = torch.empty(0)

    @property
    def steps(self) -> int:
        """Steps of all passes."""
        return self._plan.epochs * self.samples

    def observe_dense(self, load: Callable[[int], object], on_step: OnStep) -> None:
        """Compute the dense model's outputs of the last block; `load` loads one of its blocks into the decoder."""
        hidden = embed(self._decoder, self._tokens, self._plan.batch, self._activations)
        for index in range(len(self._decoder)):
            load(index)
            advance(self._decoder, index, hidden, self._tokens, self._plan.batch)
            self._decoder.drop(index)
            self._activations.release()
            on_step(index + 1, len(self._decoder), "target")
        self._dense = hidden

    def order(self) -> Iterator[int]:
        """Yield the samples of all steps."""
        generator = torch.Generator().manual_seed(self._plan.seed)
        for _ in range(self._plan.epochs):
            yield from torch.randperm(self.samples, generator=generator).tolist()

    def step(self, blocks: Blocks, sample: int, visit: Visit) -> float:
        """Pass one sample forward and backward; return its divergence per token.

        Parameters
        ----------
        blocks : Blocks
            Blocks of the model that learns.
        sample : int
        visit : function
            Takes the gradients of each block: see `BackwardStream.backward`. They are those of the divergence summed
            over the tokens.

        Raises
        ------
        BesaError
            The divergence is not finite.
        """
        part = slice(sample, sample + 1)
        stream = self._stream(blocks, part)
        with compute.repeated_passes():
            total, arriving = stream.head_gradient(stream.forward(), self._divergence(part))
            mean = self.require_finite(total / self._tokens.shape[1])
            stream.backward(arriving, visit)
        return mean

    def held_out_divergence(self, blocks: Blocks) -> float:
        """Return the mean divergence per token over the samples that are not learned from.

        The first sample is taken if none is held out.

        Raises
        ------
        BesaError
            It is not finite.
        """
        held = len(self._tokens) > self.samples
        part = slice(self.samples, len(self._tokens)) if held else slice(0, 1)
        outputs = self._stream(blocks, part).forward()
        found = held_out.mean_divergence(self._decoder, outputs, self._dense[part], self._tokens[part])
        return max(self.require_finite(found), 0.0)  # rounding alone can make it negative

    def seconds(self, blocks: Blocks, visit: Visit, progress: LearningProgress, *, compared: int = 1) -> float:
        """Estimate the seconds of what is left, from a trial of one sample, the first block and the head.

        Parameters
        ----------
        blocks : Blocks
            Give the first block of the model that learns.
        visit : function
            See `step`; its time is counted.
        progress : LearningProgress
        compared : int
            Models that are compared after each pass.
        """
        rows, blocks_passed = self._tokens[:1], len(self._decoder)
        stream = BackwardStream(self._decoder, blocks, rows, depth=1)
        stream.forward()  # what a first pass prepares is not timed
        began = time.perf_counter()
        outputs = stream.forward()
        forward = blocks_passed * (time.perf_counter() - began)
        began = time.perf_counter()
        _, gradient = stream.head_gradient(outputs, _Divergence(self._decoder, outputs, rows))
        head = time.perf_counter() - began
        began = time.perf_counter()
        stream.backward(gradient, visit)
        backward = blocks_passed * (time.perf_counter() - began)
        after = compared * (self._plan.epochs - max(len(progress.held) - 1, 0)) + (not progress.held)
        held = max(len(self._tokens) - self.samples, 1)
        left = self.steps - progress.step
        return left * (forward + head + backward) + (len(self._tokens) + after * held) * forward + after * held * head

    def reports(self, progress: LearningProgress) -> Iterator[PassReport]:
        """Return a report of the model before the first pass, and of each pass that was finished."""
        return (self._report(progress, number) for number in range(len(progress.held)))

    def last_report(self, progress: LearningProgress) -> PassReport:
        """Return the last of `reports`."""
        return self._report(progress, len(progress.held) - 1)

    def _report(self, progress: LearningProgress, number: int) -> PassReport:
        own = progress.history[(number - 1) * self.samples : number * self.samples] if number else []
        mean = math.fsum(own) / len(own) if own else None
        part = progress.parts[number] if progress.parts else 1.0
        return PassReport(
            number=number, epochs=self._plan.epochs, held_out=progress.held[number], learned=mean, part=part
        )

    def require_finite(self, value: float) -> float:
        """Return the value unchanged, after checking that it is finite.

        Raises
        ------
        BesaError
            It is NaN or infinite.
        """
        if not math.isfinite(value):
            raise BesaError(
                f"the loss of the whole model became {value}",
                f"compute with --dtype float32, or give a smaller {self._rate_option}",
            )
        return value

    def _stream(self, blocks: Blocks, part: slice) -> BackwardStream:
        return BackwardStream(
            self._decoder, blocks, self._tokens[part], batch=self._plan.batch, activations=self._activations
        )

    def _divergence(self, chosen: slice) -> "_Divergence":
        return _Divergence(self._decoder, self._dense[chosen], self._tokens[chosen])


class _Divergence:
    """KL divergence of logits to those of the dense model, summed over positions."""

    def __init__(self, decoder: Decoder, dense: Tensor, tokens: Tensor) -> None:
        self._decoder, self._dense, self._tokens = decoder, dense, tokens

    def __call__(self, logits: Tensor, part: slice, positions: slice) -> Tensor:
        target = self._decoder.finish(self._dense[part].to(self._decoder.device), self._tokens[part], positions)
        return losses.divergence(logits, target)
