"""Scores of whole experts: how much each adds to the output of its block, for the tokens that reach it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from besa_cli.decoder import linears
from besa_cli.decoder.decoder import Decoder
from besa_cli.ops import experts
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.block import OnStep
from besa_cli.stream.propagation import advance, embed


@dataclass(frozen=True, kw_only=True)
class ExpertScores:
    """Scores of the experts of every block, and the tokens that reached each; empty for blocks without experts."""

    scores: tuple[tuple[float, ...], ...]
    tokens: tuple[tuple[int, ...], ...]


def measure(
    decoder: Decoder,
    tokens: Tensor,
    *,
    batch: int,
    on_step: OnStep = lambda done, total, phase: None,
    activations: ActivationStore | None = None,
) -> ExpertScores:
    """Measure the scores of all experts in a pass of the samples through the model, one block in memory at a time.

    Parameters
    ----------
    decoder : Decoder
        The dense model, with all experts; its embedding is dropped.
    tokens : Tensor of shape (samples, seqlen)
        Token ids of the calibration samples.
    batch : int
        Samples in a pass.
    activations : ActivationStore, optional
        Storage of the hidden states; in memory by default.
    """
    store = activations or ActivationStore()
    hidden = embed(decoder, tokens, batch, store)
    decoder.drop_embedding()
    meters = []
    for index in range(len(decoder)):
        decoder.load(index)
        with _Meter(decoder, index).watching() as meter:
            advance(decoder, index, hidden, tokens, batch, lambda part, output: store.release())
        decoder.drop(index)
        meters.append(meter)
        on_step(index + 1, len(decoder), "experts")
    return ExpertScores(
        scores=tuple(tuple(experts.scores(meter.sums, meter.tokens).tolist()) for meter in meters),
        tokens=tuple(tuple(meter.tokens.tolist()) for meter in meters),
    )


class _Meter:
    """Sums over the tokens that reach each expert of a loaded block: `sums` in fp64, and `tokens`, their number."""

    def __init__(self, decoder: Decoder, index: int) -> None:
        self._modules = linears.contributions(decoder.blocks[index])
        self.sums = torch.zeros(len(self._modules), dtype=torch.float64)
        self.tokens = torch.zeros(len(self._modules), dtype=torch.int64)

    @contextlib.contextmanager
    def watching(self) -> Iterator["_Meter"]:
        """Add up what the experts contribute while the block is called."""
        handles = [
            module.register_forward_pre_hook(lambda _, args, number=number: self._add(number, args[0]))
            for number, module in enumerate(self._modules)
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, number: int, contributions: Tensor) -> None:
        self.sums[number] += experts.contribution_sum(contributions).cpu()
        self.tokens[number] += len(contributions)
