"""Sensitivity of a model's channels: how much the end's loss changes with the hidden states behind every block.

It is the root mean square, over calibration tokens, of the gradient of the dense model's loss at a block's output, with
labels drawn from the model's own distribution: the square root of the diagonal of the Fisher information.
"""

import time

import torch
from torch import Tensor
from typing_extensions import override

from besa_cli.decoder import conduct
from besa_cli.decoder.decoder import Decoder
from besa_cli.ops import losses
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.backward import BackwardStream, StoredBlocks
from besa_cli.stream.block import OnStep
from besa_cli.stream.propagation import embed

SAMPLES = 16  # at most so many calibration samples, the first ones
SEED = 0  # of the labels


def measure(
    decoder: Decoder,
    tokens: Tensor,
    *,
    on_step: OnStep = lambda done, total, phase: None,
    activations: ActivationStore | None = None,
) -> Tensor:
    """Measure the sensitivity of every channel at the output of every block: fp32, of shape (blocks, hidden).

    Parameters
    ----------
    decoder : Decoder
        The dense model; its head is dropped afterwards.
    tokens : Tensor of shape (samples, seqlen)
        Calibration samples, of which the first `SAMPLES` are used.
    activations : ActivationStore, optional
        Storage of the hidden states behind all blocks; in memory by default.

    Raises
    ------
    BesaError
        A hidden state or a gradient overflows.
    """
    rows = tokens[:SAMPLES]
    stream = BackwardStream(decoder, _Counted(decoder, on_step), rows, activations=activations)
    generator = torch.Generator(decoder.device).manual_seed(SEED)
    _, gradient = stream.head_gradient(stream.forward(), lambda logits, *_: losses.own_labels(logits, generator))
    decoder.drop_head()
    found: dict[int, Tensor] = {}

    def visit(index: int, weights: object, gradient: Tensor) -> None:
        squares = sum((sample.double().square().sum(0) for sample in gradient), torch.zeros(()))
        found[index] = (squares / rows.numel()).sqrt().float().cpu()
        if not bool(found[index].isfinite().all()):
            raise conduct.overflow(f"the gradient behind block {index} is NaN or infinite", decoder.dtype)

    stream.backward(gradient, visit)
    return torch.stack([found[index] for index in range(len(decoder))])


def seconds(decoder: Decoder, tokens: Tensor) -> float:
    """Estimate the seconds that `measure` takes, from one sample, the first block and the head."""
    rows = tokens[:1]
    hidden = embed(decoder, rows, 1)
    stream = BackwardStream(decoder, StoredBlocks(decoder), rows)
    began = time.perf_counter()
    decoder.load(0)
    loading = time.perf_counter() - began
    with torch.no_grad():
        output = decoder.forward(0, hidden, rows)  # what a first pass prepares is not timed
    began = time.perf_counter()
    decoder.forward(0, hidden.detach().requires_grad_(), rows).sum().backward()
    passing = (time.perf_counter() - began) * 4 / 3  # a pass forward, and another one with the pass backward
    decoder.drop(0)
    began = time.perf_counter()
    generator = torch.Generator(decoder.device).manual_seed(SEED)
    stream.head_gradient(output, lambda logits, part, positions: losses.own_labels(logits, generator))
    head = time.perf_counter() - began
    decoder.drop_head()
    return len(decoder) * 2 * loading + min(len(tokens), SAMPLES) * (len(decoder) * passing + head)


class _Counted(StoredBlocks):
    """A decoder's own blocks, each of which is passed twice: forward, and backward."""

    def __init__(self, decoder: Decoder, on_step: OnStep) -> None:
        super().__init__(decoder)
        self._passes, self._done, self._on_step = 2 * len(decoder), 0, on_step

    @override
    def drop(self, index: int) -> None:
        super().drop(index)
        self._done += 1
        self._on_step(self._done, self._passes, "sensitivity")
